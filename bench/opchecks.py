"""One op on the GPU against float64: random cases in guard bands, large indices, graph replays, repeats.

    python bench/opchecks.py OP --out FILE [--only random,large,replays,repeats] [--cases 10000] [--seconds 60] [--smoke]

A row per check, appended to FILE; exit code 1 if one of them failed. Each op has a process of its own: an illegal access
ends every later CUDA call of the process it happens in. --smoke walks through all of it on the CPU with the reference.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from checkrows import Row, run
from fastffl.bench import kernels, problems, timing
from fastffl.bench.problems import Inputs, Outputs, Problem
from fastffl_kernels import _launch, class_order

GUARD, CANARY = 512, 0x5A
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = (1 << 31) + 4096  # elements of one tensor: offsets past it need 64 bits
WIDTH = 128  # of the large banks' rows
SAMPLED = 4096  # rows compared on either side of the 2^31st element, and at the end


class Guards:
    """Outputs of the ops between canary bytes; `touched` counts canaries that changed."""

    def __init__(self) -> None:
        self.bands: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = dtype.itemsize
        for n in shape:
            size *= n
        whole = torch.full((size + 2 * GUARD,), CANARY, dtype=torch.uint8, device=device)
        self.bands += [whole[:GUARD], whole[GUARD + size :]]
        return whole[GUARD : GUARD + size].view(dtype).view(shape)

    def touched(self) -> int:
        return int(sum((band != CANARY).sum() for band in self.bands))


@contextmanager
def guarded() -> Iterator[Guards]:
    guards = Guards()
    with mock.patch.object(_launch, "empty", lambda shape, dtype, device: guards.empty(tuple(shape), dtype, device)):
        yield guards


# What kernels are compiled for, in few combinations: a compilation takes a second, a case milliseconds.
LOSSES = ((10, 2), (100, 2), (129, 1), (1000, 4), (1025, 2), (4097, 2))  # classes, peers
FUSIONS = ((16, 16, 7, 10), (64, 33, 2, 1), (128, 64, 8, 100))  # channels, width, side, classes
MAPS = (3, 16, 33, 256)  # channels
CONTRASTS = ((2, 128), (4, 128), (3, 30), (4, 512))  # branches, numbers of a row


def drawn(op: str, pick: random.Random) -> Problem:
    """A random problem of an op: batches, planes, values and all else that costs no compilation are free."""
    dtype, batch = pick.choice(DTYPES), pick.choice((1, 2, 3, 7, 16, 33, 64))
    if op == "distill_graph":
        return problems.loss(batch, *pick.choice(LOSSES), dtype)
    if op == "fuse_conv":
        channels, width, side, classes = pick.choice(FUSIONS)
        several = max(batch, -(-512 // side**2))  # fewer values a channel leave BatchNorm's gradient little but rounding
        return problems.fusion(several, channels, width, side, dtype, classes=classes, training=pick.random() < 0.8)
    if op == "bn_act":
        side = pick.choice((1, 2, 7, 8, 31))
        batch = min(max(batch, -(-64 // side**2)), 4096 // side**2)  # sums of many values cancel to more than 16 eps
        return problems.bn_act(batch, pick.choice(MAPS), side, dtype, residual=pick.random() < 0.5)
    if op == "augment":
        return problems.augment(batch, dtype)
    if op == "guard":
        return problems.guard(pick.randrange(1, 100_000))
    if op == "nce":
        branches, width = pick.choice(CONTRASTS)
        return problems.nce(branches, batch, pick.choice((1, 20, 256, 1500)), pick.choice((64, 300, 5000)), width)
    if op == "sgd_flat":
        sizes = (1, 3, 16, 64, 1000, 1024, 1025)
        return problems.sgd_flat("random", [(pick.choice(sizes), pick.choice((1, 3, 9))) for _ in range(pick.randrange(1, 9))])
    raise ValueError(f"{op}: no random problems; expected one of {', '.join(problems.FULL)}")


def ours(problem: Problem) -> problems.Style:
    return next(s for s in problem.styles if s.group == "ours")


def solve(problem: Problem, inputs: Inputs) -> Outputs:
    return kernels.caller(problem, ours(problem), problems.leaves(inputs)[0].device)(inputs)


def check_random(op: str, device: torch.device, cases: int, seconds: float) -> Row:
    """Values, gradients and guard bands of random problems; case k is a function of (op, k) alone."""
    end, done, worst, touched = time.monotonic() + seconds, 0, 0.0, 0
    failures: list[str] = []
    while done < cases and time.monotonic() < end and len(failures) < 5:
        problem = drawn(op, random.Random(f"{op}/{done}"))
        with guarded() as guards:
            got = solve(problem, problem.draw(device, done))
            bad = guards.touched()
        said = kernels.verdict(problem, ours(problem), got, problems.truth(problem, problem.draw(device, done)))
        worst, touched = max(worst, said["max_err"]), touched + bad
        if said["state"] != "ok" or bad:
            failures.append(
                f"case {done}, {problem.case} {problems.SHORT[problem.dtype]}: {said['state']}, {bad} canaries touched"
            )
        done += 1
    few = "" if done >= cases or failures else f"time for {done} of {cases} cases"
    return {"value": done, "unit": "cases", "max_err": worst, "canaries": touched, "ok": not failures, "said": failures or few}


# Problems whose answers do not change when the batch is repeated, with the inputs that repeat: batch statistics are means,
# and so is the loss, whose gradients shrink by the number of repeats; of sgd_flat the rows of its one parameter repeat.
REPEATED: dict[str, tuple[Callable[[bool], Problem], tuple[str, ...]]] = {
    "distill_graph": (lambda tiny: problems.loss(16 if tiny else 4096, 1000, 1, torch.bfloat16), ("z", "labels")),
    "fuse_conv": (lambda tiny: problems.fusion(2 if tiny else 32, 1024, 512, 7, torch.bfloat16), ("maps", "upstream")),
    "sgd_flat": (lambda tiny: problems.sgd_flat("large", [(4 if tiny else 1024, 1024)]), ("p", "g")),
    "bn_act": (lambda tiny: problems.bn_act(2 if tiny else 64, 64, 56, torch.bfloat16, residual=True), ("x", "upstream")),
}


def _repeat(value: Any, times: int) -> Any:
    """A batch `times` over, in its own memory and layout."""
    if isinstance(value, tuple):
        return tuple(_repeat(x, times) for x in value)
    last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    rows = (value.permute(0, 2, 3, 1) if last else value).detach()
    whole = rows.repeat(times, *(1 for _ in rows.shape[1:]))
    return (whole.permute(0, 3, 1, 2) if last else whole).requires_grad_(value.requires_grad)


def check_large(op: str, device: torch.device, smoke: bool) -> Row:
    """More than 2^31 elements in one tensor: rows round the 2^31st element and the last ones, against the small batch's."""
    if op == "augment":
        return large_augment(device, 12 if smoke else -(-LARGE // (3 * problems.SIDE**2)))
    if op == "guard":
        return large_norm(device, 100_000 if smoke else LARGE)
    if op == "nce":
        return large_banks(device, 5000 if smoke else -(-LARGE // WIDTH))
    build, names = REPEATED[op]
    problem = build(smoke)
    inputs = problem.draw(device, 0)
    truth = problems.truth(problem, problem.draw(device, 0))
    first = problems.leaves(inputs[names[0]])
    batch, each = first[0].shape[0], sum(x[0].numel() for x in first) if op == "fuse_conv" else first[0][0].numel()
    times = 3 if smoke else -(-LARGE // (batch * each))
    got = solve(problem, inputs | {name: _repeat(inputs[name], times) for name in names})
    at = [min((1 << 31) // each, batch * times - 1), batch * times - 1]
    few = max(1, min(SAMPLED, (1 << 26) // each))
    rows = torch.cat([torch.arange(max(0, k - few), min(batch * times, k + few)) for k in at]).unique().to(device)
    worst, right = 0.0, True
    for name, x in got.items():
        if x.ndim and x.shape[0] == batch * times:
            scale = times if op == "distill_graph" else 1
            off = (scale * x.index_select(0, rows).double() - truth.values[name][rows % batch]).abs()
            if name in truth.sure:
                off *= truth.sure[name][rows % batch]
            error = float(off.max() / (problems.EPS[x.dtype] * truth.values[name].abs().max()))
            far = float(off.norm() / truth.values[name][rows % batch].norm())
            right &= error <= problem.rival and far <= problem.far * kernels.FAR[x.dtype]  # NaN is neither
            worst = max(worst, error)
    return {"value": batch * times * each, "unit": "elements", "max_err": worst, "ok": right}


def large_norm(device: torch.device, n: int) -> Row:
    """The factor that clips a gradient of n equal elements, and whether the very last one is looked at."""
    problem = problems.guard(1)
    inputs = problem.draw(device, 0) | {"grads": torch.full((n,), 64.0, device=device)}
    factor = float(solve(problem, inputs)["factor"])
    want = problems.GUARD["clip"] / (64 * n**0.5)  # the loss scale falls out
    inputs["grads"][-1] = torch.nan
    off = abs(factor / want - 1) / problems.EPS[torch.float32]
    return {"value": n, "unit": "elements", "max_err": off, "ok": off <= 64 and not bool(solve(problem, inputs)["ok"])}


def large_banks(device: torch.device, rows: int) -> Row:
    """Banks of 2^31 elements each, whose labelled samples are the first and the last few; against torch's path."""
    problem = problems.nce(2, 8, 64, rows, WIDTH)
    some = torch.cat([torch.arange(100), torch.arange(rows - 100, rows)]).to(device)
    few = problems.nce(2, 8, 64, len(some), WIDTH).draw(device, 0)
    banks = torch.zeros(2, rows, WIDTH, device=device)
    banks[:, some] = few["banks"]
    labels = torch.full((rows,), -100, device=device)
    labels[some] = torch.arange(len(some), device=device) % 3
    ids = some[-8:]
    whole = few | {"banks": banks, "ids": ids, "labels": labels[ids], "classes": tuple(class_order(labels, 3))}
    plainly = next(s for s in problem.styles if s.group == "reference")
    got, want = solve(problem, whole), problems.solved(plainly.forward, problem.wrt, whole)
    found = problems.errors(got, problems.Truth({name: x.double() for name, x in want.items()}, {}), problem.dtype)
    worst = max(found.values())
    return {"value": banks[0].numel(), "unit": "elements", "max_err": worst, "ok": worst <= 2 * problem.limit}


def large_augment(device: torch.device, images: int) -> Row:
    """As many images as 2^31 bytes hold, all of them in one batch; the last ones against torch's path for them alone."""
    base = torch.randint(0, 256, (1, 3, problems.SIDE, problems.SIDE), dtype=torch.uint8, device=device)
    whole = base.repeat(images, 1, 1, 1)
    whole[-SAMPLED:] = torch.randint(0, 256, whole[-SAMPLED:].shape, dtype=torch.uint8, device=device)
    clock = {name: torch.tensor(v, device=device) for name, v in (("seed", problems.SEED), ("epoch", problems.EPOCH))}
    every = torch.arange(images, device=device)
    problem = problems.augment(1, torch.bfloat16)
    plainly = next(s for s in problem.styles if s.group == "reference")
    got = solve(problem, {"images": whole, "ids": every, **clock})["x"][-SAMPLED:]
    want = plainly.forward({"images": whole, "ids": every[-SAMPLED:], **clock})["x"]
    off = float((got.double() - want.double()).abs().max() / want.double().abs().max()) / problems.EPS[torch.bfloat16]
    return {"value": whole.numel(), "unit": "elements", "max_err": off, "ok": off <= 1}


def small_problem(op: str) -> Problem:
    """Of the size that training has, for replays and repeats."""
    made = {
        "distill_graph": lambda: problems.loss(128, 100, 2, torch.bfloat16),
        "fuse_conv": lambda: problems.fusion(128, 128, 64, 8, torch.bfloat16),
        "bn_act": lambda: problems.bn_act(128, 32, 16, torch.bfloat16, residual=True),
    }
    return made[op]() if op in made else problems.full([op], quick=True)[0]


def same(a: Outputs, b: Outputs) -> bool:
    return all(torch.equal(x, b[name]) for name, x in a.items())


def check_repeats(op: str, device: torch.device, times: int) -> Row:
    """The same inputs give the same bits each time."""
    problem = small_problem(op)
    first = solve(problem, problem.draw(device, 0))
    other = [k for k in range(times) if not same(first, solve(problem, problem.draw(device, 0)))]
    return {"value": times, "unit": "repeats", "ok": not other, "said": f"repeats {other[:5]} differ" if other else ""}


def check_replays(op: str, device: torch.device, times: int) -> Row:
    """A captured graph, replayed on other inputs each time, gives the bits of an eager call."""
    if op in ("sgd_flat", "guard"):
        return replayed_steps(small_problem(op), device, times)
    problem = small_problem(op)
    held = problem.draw(device, 0)
    fresh = [problem.draw(device, k) for k in range(5)]
    want = [solve(problem, problem.draw(device, k)) for k in range(5)]
    with timing.clock_of(device) as clock:
        kept: list[Outputs] = []
        ready = clock.prepare(lambda inputs: kept.append(solve(problem, inputs)), [held, held])
        wrong = 0
        for k in range(times):
            for mine, theirs in zip(problems.leaves(held), problems.leaves(fresh[k % 5]), strict=True):
                mine.detach().copy_(theirs.detach())
            ready.replay()
            wrong += not same(kept[-1], want[k % 5])
    return {"value": times, "unit": "replays", "graph": ready.graph, "ok": not wrong, "said": f"{wrong} differ" if wrong else ""}


def _state(inputs: Inputs) -> list[Tensor]:
    """What calls move: an optimizer's weights and momentum, or a state that is given."""
    optimizer = inputs["_ours"][0] if "_ours" in inputs else None
    return [optimizer.flat.p, optimizer.flat.shadow, optimizer.m] if optimizer else problems.leaves(inputs["state"])


def replayed_steps(problem: Problem, device: torch.device, times: int) -> Row:
    """Replays of what moves a state go on from one another: as many eager steps end in the same bits."""
    captured, eager = problem.draw(device, 0), problem.draw(device, 0)
    solve(problem, eager)
    with timing.clock_of(device) as clock:
        ready = clock.prepare(lambda inputs: solve(problem, inputs), [captured])
        solve(problem, captured)
        for mine, theirs in zip(_state(captured), _state(eager), strict=True):
            mine.copy_(theirs)
        for _ in range(times):
            ready.replay()
            for _ in range(ready.calls):
                solve(problem, eager)
        right = all(torch.equal(a, b) for a, b in zip(_state(captured), _state(eager), strict=True))
    return {"value": times * ready.calls, "unit": "replayed steps", "graph": ready.graph, "ok": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=tuple(problems.FULL))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="random,large,replays,repeats")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60, help="for the random cases")
    parser.add_argument("--what", default="checks:", help="how its rows begin")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.smoke else "cuda")
    few = args.smoke
    todo: dict[str, Callable[[], Row]] = {
        "random": lambda: check_random(args.op, device, 4 if few else args.cases, args.seconds),
        "large": lambda: check_large(args.op, device, few),
        "replays": lambda: check_replays(args.op, device, 4 if few else 1000),
        "repeats": lambda: check_repeats(args.op, device, 3 if few else 100),
    }
    if not few and not problems.has_triton(args.op):
        todo = dict.fromkeys(todo, lambda: {"ok": False, "error": "no Triton path in this version"})
    sys.exit(run(todo, args.only, args.out, f"{args.what} {args.op}", "smoke" if few else "ours"))


if __name__ == "__main__":
    main()
