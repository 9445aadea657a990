"""Cross-compile kernels for a GPU that is not there, and read from the machine code what they cost.

    report(case, capability) -> Report(registers, spill, shared, loads, ...)

Triton brings ptxas and cuobjdump and needs no driver for this. Nothing here, and nothing in `jit/`, imports torch: the
same cases are compiled by every supported Triton, also where it is the only package installed.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (80, 90, 100, 120)

# Bytes of shared memory one program may have (CUDA C programming guide, table of compute capabilities: opt-in maximum).
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Registers per thread beyond which a kernel of this kind is refused: two programs of 8 warps must fit an SM.
REGISTERS = {"row": 128, "stencil": 128, "gemm": 255}


class Case(NamedTuple):
    """One kernel as the dispatch launches it: what a test compiles and what `fastffl bench kernels` reports.

    signature   argument name -> "*bf16", "*fp32", "i32", "i64", "fp32", a tuple of those, or "constexpr"
    constants   value of every constexpr
    kind        "row", "stencil" or "gemm": decides the register limit
    loads       bytes the widest global load must have (16 unless the reason is in the case's name)
    unaligned   names of pointer and stride arguments without the 16-divisible hint
    stores      bytes the widest global store must have; gradients leave as wide as logits come, and sums do not hide it
    maxnreg     registers the compiler is given; left to itself it may spill a few bytes to fit more programs on a multiprocessor
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int = 2
    kind: str = "row"
    loads: int = 16
    unaligned: tuple[str, ...] = ()
    stores: int = 0
    maxnreg: int | None = None


class Report(NamedTuple):
    registers: int  # per thread
    spill: int  # bytes of stack per thread
    shared: int  # bytes per program
    loads: int  # widest global load, bytes
    stores: int  # widest global store, bytes
    wgmma: int  # warp-group matrix instructions (sm_90), tcgen05 on sm_100
    mma: int  # warp matrix instructions
    atomics: int  # instructions, not executions


def _attributes(case: Case) -> dict[tuple[int, ...], list[list[Any]]]:
    """The hint Triton itself gives to pointers and integers that are multiples of 16."""
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for k, name in enumerate(case.kernel.arg_names):
        kind = case.signature[name]
        parts = [((k,), kind)] if isinstance(kind, str) else [((k, j), t) for j, t in enumerate(kind)]
        for path, t in parts:
            if (t.startswith("*") or t in ("i32", "i64")) and name not in case.unaligned:
                hints[path] = [["tt.divisibility", 16]]
    return hints


def compiled(case: Case, capability: int) -> Any:
    """Triton's compiled kernel (`.asm` has ttir, ptx, cubin) of a case for sm_`capability`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: interpreted kernels can't be compiled; unset it or use another process")
    missing = set(case.kernel.arg_names) ^ set(case.signature)
    if missing:
        raise ValueError(f"{case.name}: arguments and signature differ in {sorted(missing)}")
    constants = {(case.kernel.arg_names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, case.signature, constants, _attributes(case))
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


_GLOBAL = re.compile(r"\b(LDG|STG)\.E((?:\.[A-Z0-9_]+)*)")
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")


def report(case: Case, capability: int) -> Report:
    """Compile and read the machine code. A spilling kernel is reported, not refused: the caller decides."""
    from triton.backends import nvidia

    kernel = compiled(case, capability)
    tools = Path(next(iter(nvidia.__path__))) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    width = {"LDG": 0, "STG": 0}
    for op, suffix in _GLOBAL.findall(sass):
        kind = _WIDTH.search(suffix)
        width[op] = max(width[op], {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(kind[1], 0) or int(kind[1]) // 8 if kind else 4)
    if re.search(r"\bLDGSTS\.E(\.[A-Z0-9_]+)*\.128\b|\bUBLKCP\b|\bUTMALDG\b", sass):  # copies straight to shared memory
        width["LDG"] = max(width["LDG"], 16)
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    return Report(
        registers=found["REG"],
        spill=found.get("STACK", 0) + found.get("LOCAL", 0),
        shared=kernel.metadata.shared,
        loads=width["LDG"],
        stores=width["STG"],
        wgmma=count(r"\bHGMMA\b|\bUTCHMMA\b|\bUTCMMA\b"),
        mma=count(r"\bHMMA\b"),
        atomics=count(r"\bATOMG?\b|\bRED[G]?\b"),
    )


def wrong(case: Case, capability: int, r: Report) -> list[str]:
    """What a report violates, in words; empty if nothing."""
    said = []
    if r.spill:
        said.append(f"spills {r.spill} bytes a thread")
    if r.registers > REGISTERS[case.kind]:
        said.append(f"{r.registers} registers, at most {REGISTERS[case.kind]} for a {case.kind} kernel")
    if r.shared > SHARED[capability]:
        said.append(f"{r.shared} bytes of shared memory, sm_{capability} has {SHARED[capability]}")
    if r.loads < case.loads:
        said.append(f"widest load {r.loads} bytes, expected {case.loads}")
    if r.stores < case.stores:
        said.append(f"widest store {r.stores} bytes, expected {case.stores}")
    if case.kind == "gemm" and capability == 90 and not r.wgmma:
        said.append("no wgmma")
    return [f"{case.name} on sm_{capability}: {text}" for text in said]


OPS = ("distill_graph", "fuse_conv", "bn_act", "augment", "guard", "sgd_flat", "nce")


def cases(op: str) -> list[Case]:
    """Every configuration that the dispatch of `op` picks, one per distinct kernel, type and block."""
    found: list[Case] = importlib.import_module(f"fastffl_kernels.jit.{op}").cases()
    return found


def main() -> None:
    """python _compile.py [--sm=90 ...] [OP ...]: a JSON line per case and capability, with what is wrong. No torch needed."""
    import triton

    asked = tuple(int(word.removeprefix("--sm=")) for word in sys.argv[1:] if word.startswith("--sm="))
    for op in [word for word in sys.argv[1:] if not word.startswith("--")] or OPS:
        for case in cases(op):
            for capability in asked or CAPABILITIES:
                r = report(case, capability)
                row = {"op": op, "case": case.name, "sm": capability, "kind": case.kind, **r._asdict()}
                print(json.dumps({**row, "wrong": wrong(case, capability, r), "triton": triton.__version__}), flush=True)


if __name__ == "__main__":  # the package itself imports torch: stand in for it, then run the module under its own name
    here = Path(__file__).resolve().parent
    package = types.ModuleType("fastffl_kernels")
    package.__path__ = [str(here)]
    sys.modules["fastffl_kernels"] = package
    importlib.import_module("fastffl_kernels._compile").main()
