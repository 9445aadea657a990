"""doctor: what this machine has of what fastffl can use, and the command that brings what is missing. Imports no part."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
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
    """NVIDIA's apex is known by its files: another project holds the name on the package index."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Part("apex", "", "absent", "optional optimizers; build NVIDIA's from source, never `pip install apex`")
    places = list(spec.submodule_search_locations or [])
    if not any((Path(p) / "optimizers" / "fused_sgd.py").is_file() for p in places):
        return Part("apex", _version("apex"), "wrong", "this 'apex' is not NVIDIA's: pip uninstall apex")
    return Part("apex", _version("apex"), "ok", "")


def _dali() -> Part:
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        if version := _version(name):
            return Part("dali", f"{version} ({name[-7:]})", "ok", "")
    return Part("dali", "", "absent", 'optional, decodes JPEGs on the GPU: pip install "fastffl[gpu]"')


def _cuda() -> Part:
    import torch  # the one part that has to be asked: a driver can't be seen from files

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
    parts += [_cuda()]
    parts.append(_package("triton", "triton", False, "kernels use the torch reference (same results)"))
    parts += [_dali(), _apex()]
    for extra, distribution in (("onnx", "onnx"), ("tb", "tensorboard"), ("wandb", "wandb"), ("report", "matplotlib")):
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
