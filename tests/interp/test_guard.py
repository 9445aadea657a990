"""guard's kernel, interpreted: every output and every state against the reference, guard bands, one launch, seeded bugs.

All is equal to the bit where the norm is given; the interpreter's division rounds as IEEE says. Where it is taken, torch's own
sum of 1e6 squares in fp32 is 1e-5 off, and 3e-5 are allowed to the clipping factor; against float64 it is 2e-6.
"""

import importlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastinterp import fast
from guardcase import Case, draw, named
from kernelkit import device_work, draws, guarded
from torch import Tensor

from fastffl_kernels import GuardState, _launch, guard, guard_reference, use
from fastffl_kernels.guard import EVERY
from fastffl_kernels.jit import guard as jit

op: Any = importlib.import_module("fastffl_kernels.guard")  # the file, not the function of that name


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with fast():
        yield


def copy(c: Case, put: Callable[[Tensor], Tensor]) -> Case:
    state = GuardState(*(None if x is None else put(x) for x in c.state))
    return Case(tuple(put(x) for x in c.given), state, {k: put(x) for k, x in c.by.items()}, c.options)  # type: ignore[arg-type]


def same(name: str, got: Tensor, want: Tensor, exact: bool) -> bool:
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if not got.is_floating_point():
        return torch.equal(got, want)
    got, want = got.nan_to_num(7.0), want.nan_to_num(7.0)
    return torch.equal(got, want) if exact or name != "factor" else torch.allclose(got, want, rtol=3e-5, atol=0)


def check(c: Case) -> None:
    """The Triton path on guarded copies of `c`: inputs stay, outputs and state are the reference's."""
    ref = copy(c, Tensor.clone)
    want = named(guard_reference(*ref.given, ref.state, **ref.by, **ref.options), ref.state)
    with guarded() as g, use("triton"):
        mine = copy(c, g.put)
        got = named(guard(*mine.given, mine.state, **mine.by, **mine.options), mine.state)
    for a, b in zip([*mine.given, *mine.by.values()], [*c.given, *c.by.values()], strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), "an input was changed"
    for name, w in want.items():
        v = got[name]
        assert (v is None) == (w is None), name
        assert v is None or w is None or same(name, v, w, "norm" in c.by), f"{name}: {v} for {w}"
    assert not any(bool(k.any()) for pair in _launch._counters.values() for k in pair), "an arrival counter was not reset"


def size(r: random.Random) -> int:
    """1 to 1e6, round whole tiles and whole programs, mostly small."""
    at = r.choice((1, 2, 3, jit.BLOCK, 2 * jit.BLOCK, r.randrange(1, 60_000), r.randrange(1, 60_000)))
    return max(1, at + r.choice((-1, 0, 0, 1)))


@pytest.mark.parametrize("batch", range(4))
def test_a_norm_taken_equals_the_reference(batch: int) -> None:
    for r in draws(batch, 60):
        check(draw(r, True, size(r)))


@pytest.mark.parametrize("n", [999_983, 1_000_000])
def test_a_million_gradients(n: int) -> None:
    for r in draws(n, 3):
        check(draw(r, True, n))


@pytest.mark.parametrize("batch", range(4))
def test_a_norm_given_equals_the_reference_to_the_bit(batch: int) -> None:
    for r in draws(100 + batch, 100):
        check(draw(r, False))


def test_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than programs, the last program ragged."""
    monkeypatch.setattr(jit, "PROGRAMS", 4)
    assert jit.plan(11 * jit.BLOCK + 5) == (4, 3 * jit.BLOCK)
    for k, r in enumerate(draws(9, 20)):
        check(draw(r, True, 11 * jit.BLOCK + 5 + k))


def test_every_element_belongs_to_one_program() -> None:
    r = random.Random(0)
    for _ in range(2000):
        n = r.randrange(1, 1 << r.randrange(1, 34))
        parts, per = jit.plan(n)
        assert parts <= jit.PROGRAMS and (parts - 1) * per < n <= parts * per and per % jit.BLOCK == 0
    assert jit.plan(0) == (1, jit.BLOCK)


def test_the_norm_is_that_of_float64() -> None:
    """A clipped factor is clip / norm: 1e6 elements of very different size, and squares that fp32 can't hold."""
    torch.manual_seed(0)
    c = draw(random.Random(3), True)
    calm = tuple(torch.ones_like(x) for x in c.given)
    state = c.state._replace(streak=torch.tensor(0), scale=None, good=None)
    for spread in (0.0, 3.0):
        x = torch.randn(300_000) * torch.exp(torch.randn(300_000) * spread)
        with use("triton"):
            got = guard(*calm, state, grads=x, clip=0.01, limit=5)
        assert got.factor is not None and got.ok
        assert got.factor.item() == pytest.approx(0.01 / (x.double().norm().item() + 1e-6), rel=2e-6)
    with use("triton"):
        assert not guard(*calm, state, grads=torch.full((10,), 1e25), limit=5).ok  # as in torch: a norm beyond fp32


def test_one_launch_and_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    c = draw(random.Random(1), True, 20_000)

    def call() -> None:
        with use("triton"):
            guard(*c.given, c.state, **c.by, **c.options)

    with _launch.recorded() as seen:
        call()
    assert [k.kernel for k in seen] == ["guard_kernel"] and seen[0].grid == (5,)
    monkeypatch.setattr(_launch, "launch", lambda *_, **__: None)  # interpreted kernels copy their arguments with torch
    assert device_work(call) == ([], [])


def test_one_order_whatever_the_run() -> None:
    c = draw(random.Random(2), True, 50_000)
    c = c._replace(options={**c.options, "clip": 0.1})
    found = []
    for _ in range(2):
        mine = copy(c, Tensor.clone)
        with use("triton"):
            found.append(guard(*mine.given, mine.state, **mine.by, **mine.options).factor)
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


@pytest.mark.parametrize("grads", [True, False])
def test_opcheck(grads: bool) -> None:
    for r in draws(5, 4):
        c = draw(r, grads, 100)
        by = c.by.get("grads"), c.by.get("norm")
        args = (*c.given, *by, *c.state, c.options["clip"], c.options["decay"], c.options["limit"])
        finite = [x.nan_to_num(1.0) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        torch.library.opcheck(torch.ops.fastffl.guard.default, tuple(finite))


def _swap(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda a: a.update({name: value(a[name]) if callable(value) else value})


BUGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a part too few": _swap("parts", lambda n: n - 1),
    "counter not at zero": _swap("counter", lambda k: k + 1),
    "stretches too short": _swap("per", lambda n: n // 2),
    "last element left out": _swap("n", lambda n: n - 1),
    "halted a step late": _swap("limit", lambda n: n + 1),
    "no clipping": _swap("clip", None),
    "clip 1 %": _swap("clip", lambda v: v and v * 1.01),
    "decay": _swap("decay", lambda v: v * 0.99),
    "floor": _swap("FLOOR", 0.5),
    "growth a step early": _swap("EVERY", EVERY - 1),
    "a term unseen": _swap("H", lambda n: max(n - 1, 0)),
    "an edge unseen": _swap("E", lambda n: max(n - 1, 0)),
    "a node unseen": _swap("N", lambda n: n - 1),
    "no scale": _swap("scale", None),
    "no average": _swap("count", None),
    "terms of another step": _swap("ce", lambda v: v + 0.1),
    "loss scaled": _swap("loss", lambda v: v * 2),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_sees_seeded_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong launch is seen by one of 200 cases."""
    real = _launch.launch

    def broken(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **more: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=True))
        BUGS[bug](given)
        real(kernel, grid, device, *given.values(), **more)

    monkeypatch.setattr(_launch, "launch", broken)
    for r in draws(7, 200):
        c = draw(r, True, 2 * jit.BLOCK + r.randrange(5))
        c.by["grads"][-1] = 50.0 * c.by["grads"].nan_to_num(0.0, 0.0, 0.0).abs().max()  # leaving it out shows
        try:
            check(c)
        except AssertionError:
            return
        finally:
            for pair in _launch._counters.values():  # a bug here must not reach the next case
                for k in pair:
                    k.zero_()
    pytest.fail(f"{bug}: not seen")
