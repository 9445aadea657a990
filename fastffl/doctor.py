"""doctor: what this machine has of what fastffl can use, and the command that brings what is missing.

Parts are looked up, not imported, but for torch and the compiled part of apex, which tell only then whether they work.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from typing import NamedTuple


class Part(NamedTuple):
    """One line of the report. state: ok, absent (optional), wrong (present but not what its name says), missing (needed)."""

    part: str
    version: str
    state: str
    fix: str


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package(part: str, distribution: str, needed: bool, fix: str) -> Part:
    version = _version(distribution)
    if version:
        return Part(part, version, "ok", "")
    return Part(part, "", "missing" if needed else "absent", fix)


def _apex() -> Part:
    """Optional fused optimizers: another project holds the name on the package index."""
    try:
        from .train import apex  # needs torch, which knows the compiler that would build it
    except ImportError:
        return Part("apex", "", "absent", "optional optimizers; install torch first")
    at = apex.found()
    if at.state == "absent":
        return Part("apex", "", "absent", f"optional optimizers (optim.impl=apex), never `pip install apex`; {at.fix}")
    return Part("apex", at.version, "ok" if at.state == "ok" else "wrong", f"{at.said}; {at.fix}" if at.said else "")


def _dali(cuda: str) -> Part:
    """`cuda` is what torch was built for, or nothing. Two CUDAs in one process end in errors far from their cause."""
    for name, major in (("nvidia-dali-cuda130", "13"), ("nvidia-dali-cuda120", "12")):
        if version := _version(name):
            shown = f"{version} ({name[-7:]})"
            if cuda and cuda.partition(".")[0] != major:
                extra = "gpu" if cuda.startswith("13.") else "gpu-cu12"
                fix = f'torch has CUDA {cuda}: pip uninstall {name}, then pip install "fastffl[{extra}]"'
                return Part("dali", shown, "wrong", fix)
            return Part("dali", shown, "ok", "")
    return Part("dali", "", "absent", 'optional, decodes JPEGs on the GPU: pip install "fastffl[gpu]"')


def _cuda() -> Part:
    try:
        import torch  # the one part that has to be asked: a driver can't be seen from files
    except ImportError:
        return Part("cuda", "", "absent", "install torch first")

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return Part("cuda", f"{torch.version.cuda} on {name}", "ok", "")
    if shutil.which("nvidia-smi"):
        return Part("cuda", torch.version.cuda or "", "wrong", "there is a driver, but torch can't use it: check its version")
    return Part("cuda", torch.version.cuda or "", "absent", "no GPU found: training runs on the CPU")


def report() -> list[Part]:
    """Every part, needed ones first."""
    python = ".".join(map(str, sys.version_info[:3]))
    needed = [("torch", "torch"), ("torchvision", "torchvision"), ("timm", "timm"), ("numpy", "numpy")]
    needed += [("safetensors", "safetensors"), ("pydantic", "pydantic"), ("cyclopts", "cyclopts"), ("rich", "rich")]
    parts = [
        Part(
            "python",
            python,
            "ok" if sys.version_info >= (3, 11) else "wrong",
            "" if sys.version_info >= (3, 11) else "use 3.11+",
        )
    ]
    parts += [_package(p, d, True, f"pip install {d}") for p, d in needed]
    cuda = _cuda()
    parts += [cuda, _package("triton", "triton", False, "kernels use the torch reference (same results)")]
    parts += [_dali(cuda.version.partition(" ")[0]), _apex()]
    for extra, distribution in (("onnx", "onnx"), ("tb", "tensorboard"), ("wandb", "wandb")):
        parts.append(_package(extra, distribution, False, f'optional: pip install "fastffl[{extra}]"'))
    asked = os.environ.get("FASTFFL_KERNELS", "auto")
    known = asked in ("auto", "triton", "reference")
    parts.append(
        Part(
            "kernels",
            f"FASTFFL_KERNELS={asked}",
            "ok" if known else "wrong",
            "" if known else "auto, triton or reference",
        )
    )
    return parts
