"""sgd_flat's reference and FlatSGD: torch.optim.SGD's trajectories, states, schedulers and scaler, and what neither may touch."""

import copy
from typing import Any

import pytest
import torch
from kernelkit import draws
from torch import Tensor, nn
from torch.optim import SGD

from fastffl_kernels import explain, use
from fastffl_kernels.sgd_flat import CHUNK, FlatParameters, FlatSGD, bytes_moved, sgd_flat, sgd_flat_reference

SHAPES = ((16, 3, 3, 3), (16,), (1,), (CHUNK,), (CHUNK + 1,), (5, 7), (8, 16, 1, 1), (0,), ())


def model(seed: int = 0) -> list[nn.Parameter]:
    """Parameters of odd sizes; maps in channels_last."""
    torch.manual_seed(seed)
    made = [torch.randn(s) for s in SHAPES]
    return [nn.Parameter(p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p) for p in made]


def twins(**options: Any) -> tuple[list[nn.Parameter], SGD, list[nn.Parameter], FlatSGD]:
    """The same parameters under torch's optimizer and ours, in two groups."""
    extra = {k: options.pop(k) for k in ("shadow", "zero") if k in options}

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[::2], "weight_decay": 5e-4}, {"params": params[1::2], "weight_decay": 0.0}]

    theirs, ours = model(), model()
    return theirs, SGD(groups(theirs), fused=False, **options), ours, FlatSGD(groups(ours), **options, **extra)


def close(theirs: list[nn.Parameter], ours: list[nn.Parameter]) -> None:
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6)  # weights of 1 to 4 after up to 50 roundings


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("rule", ["foreach", "fused"])
def test_trajectories_are_torchs(options: dict[str, Any], rule: str) -> None:
    """50 steps: the rate changes, some are skipped, some gradients are None until later, some are scaled."""
    for r in draws(7, 3):
        theirs, a, ours, b = twins(lr=0.1, **options)
        for group in a.param_groups:
            group[rule] = True
            for p in group["params"] if rule == "fused" and options else ():
                a.state[p]["momentum_buffer"] = torch.zeros_like(p)  # it takes no mixture of first and later steps
        late = {2, 5}
        for step in range(50):
            lr = r.choice([0.1, 0.05, 0.2])
            scale = r.choice([1.0, 0.5, 0.001])
            for one in (a, b):
                for group in one.param_groups:
                    group["lr"] = lr
            for k, (x, y) in enumerate(zip(theirs, ours, strict=True)):
                if k in late and step < 20:
                    continue
                grad = torch.randn_like(x)  # in the order of x: torch's fused SGD on the CPU misreads any other
                x.grad = grad * scale
                y.grad = grad.clone() if y.grad is None else y.grad.copy_(grad)
            skip = r.random() < 0.2
            if not skip:
                a.step()
            before = [y.detach().clone() for y in ours]
            b.step(found_inf=torch.tensor(float(skip)), scale=torch.tensor(scale))
            assert not skip or all(torch.equal(x, y) for x, y in zip(before, ours, strict=True))
            close(theirs, ours)
        assert not options or any(not torch.equal(x, y) for x, y in zip(model(), ours, strict=True))
        if options:
            for x, y in zip(theirs, ours, strict=True):
                torch.testing.assert_close(b.state[y]["momentum_buffer"], a.state[x]["momentum_buffer"], rtol=2e-6, atol=4e-6)


def test_a_net_learns_the_same() -> None:
    """Gradients come from autograd into the flat buffer; parameters stay the module's own objects."""

    def net() -> nn.Module:
        torch.manual_seed(3)
        layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)

    a, b = net(), net()
    names = [id(p) for p in b.parameters()]
    one = SGD(a.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    two = FlatSGD(b.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, shadow=torch.bfloat16)
    assert [id(p) for p in b.parameters()] == names
    for _ in range(20):
        x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))
        for m, o in ((a, one), (b, two)):
            o.zero_grad()
            nn.functional.cross_entropy(m(x), y).backward()
            o.step()
        assert all(p.grad is g for p, g in zip(b.parameters(), two.flat.grads, strict=True)), "no gradient is copied"
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert torch.equal(two.shadow_of(q), q.bfloat16()) and two.shadow_of(q).stride() == q.stride()
    state = b.state_dict()
    b.load_state_dict({k: v + 1 for k, v in state.items()})
    two.flat.refresh()
    assert all(torch.equal(two.shadow_of(q), q.bfloat16()) for q in b.parameters())


def test_gradients_that_are_none_are_skipped_as_torch_does() -> None:
    theirs, a, ours, b = twins(lr=0.1, momentum=0.9)
    kept = [p.detach().clone() for p in ours]
    for params, one in ((theirs, a), (ours, b)):
        params[0].grad = torch.ones_like(params[0])
        one.step()
    close(theirs, ours)
    assert all(torch.equal(x, y) for x, y in zip(kept[1:], ours[1:], strict=True)), "weight decay waits for a gradient"
    b.zero_grad(set_to_none=True)
    a.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in ours)
    for params, one in ((theirs, a), (ours, b)):
        params[5].grad = torch.ones_like(params[5])
        one.step()
    close(theirs, ours)
    b.zero_grad()
    a.zero_grad(set_to_none=False)
    grad = ours[5].grad
    assert grad is not None and grad.untyped_storage().data_ptr() == b.flat.g.data_ptr() and not grad.any()
    assert ours[0].grad is None
    a.step(), b.step()
    close(theirs, ours)


def test_gradients_made_elsewhere_are_taken_over() -> None:
    """Before the optimizer was made, or after: copied once, zeroed where they now are."""
    params = model()
    params[0].grad = torch.full_like(params[0], 2.0)
    b = FlatSGD(params, lr=1.0)
    want = params[0].detach() - 2.0
    b.step()
    assert torch.equal(params[0], want) and params[0].grad is b.flat.grads[0]
    params[1].grad = torch.ones_like(params[1])
    b.zero_grad()
    assert params[1].grad is b.flat.grads[1] and not params[1].grad.any() and not b.flat.g.any()


def test_zero_in_the_same_pass() -> None:
    _, _, ours, b = twins(lr=0.1, momentum=0.9, zero=True)
    for found in (0.0, 1.0):
        for p in ours:
            p.grad = torch.ones_like(p)
        b.step(found_inf=torch.tensor(found))
        assert not b.flat.g.any() and all(p.grad is g for p, g in zip(b.flat.params, b.flat.grads, strict=True))


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_states_go_to_torch_and_back(started: bool, momentum: float) -> None:
    theirs, a, ours, b = twins(lr=0.1, momentum=momentum)

    def run(params: list[nn.Parameter], one: Any, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g)
            one.step()

    if started:
        run(theirs, a, 1), run(ours, b, 1)
    saved, mine = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    assert saved["param_groups"][0].keys() == mine["param_groups"][0].keys()
    _, c, others, d = twins(lr=0.7, momentum=momentum)
    back = [nn.Parameter(p.detach().clone()) for p in ours]
    e = SGD([{"params": back[::2]}, {"params": back[1::2]}], lr=0.3, momentum=momentum)
    with torch.no_grad():
        for p, q in zip(others, theirs, strict=True):
            p.copy_(q)
    d.load_state_dict(saved)
    e.load_state_dict(mine)
    before = copy.deepcopy(saved)
    run(theirs, a, 2), run(others, d, 2), run(back, e, 2), run(ours, b, 2)
    close(theirs, others), close(theirs, back), close(theirs, ours)
    for k, v in before["state"].items():
        kept = saved["state"][k].get("momentum_buffer")
        assert kept is None or torch.equal(v["momentum_buffer"], kept), "the snapshot is not written to"
    assert d.param_groups[0]["lr"] == 0.1 and d.param_groups[0]["weight_decay"] == 5e-4
    if momentum:
        assert all(d.state[p]["momentum_buffer"].untyped_storage().data_ptr() == d.m.data_ptr() for p in others)
        with pytest.raises(ValueError, match="a state with momentum for FlatSGD without"):
            twins(lr=0.1)[3].load_state_dict(saved)
    assert c.state_dict()["state"] == {}


def test_rates_of_schedulers_and_tensors() -> None:
    theirs, a, ours, b = twins(lr=0.1, momentum=0.9)
    first, second = (torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (a, b))
    for _ in range(10):
        for x, y in zip(theirs, ours, strict=True):
            x.grad = torch.randn(x.shape)
            y.grad = x.grad.clone()
        a.step(), b.step()
        first.step(), second.step()
        close(theirs, ours)
    theirs, a, ours, b = twins(lr=torch.tensor(0.1), momentum=0.9)
    assert b.fill_rates().data_ptr() == b.param_groups[0]["lr"].data_ptr(), "a device scalar is read where it is"
    for lr in (0.1, 0.3):
        for o in (a, b):
            o.param_groups[0]["lr"].fill_(lr)
        for x, y in zip(theirs, ours, strict=True):
            x.grad, y.grad = torch.ones(x.shape), torch.ones(x.shape)
        a.step(), b.step()
        close(theirs, ours)
    b.param_groups[0]["lr"], b.param_groups[1]["lr"] = torch.tensor(0.5, dtype=torch.float64), 0.25
    assert b.fill_rates().tolist() == [0.5, 0.25]


def test_torchs_gradient_scaler_drives_it() -> None:
    """GradScaler hands over scale and found_inf as attributes and reads nothing itself."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    p = nn.Parameter(torch.ones(3))
    b = FlatSGD([p], lr=0.5)
    scaler.scale((p * 2).sum()).backward()
    assert p.grad is not None and torch.equal(p.grad, torch.full((3,), 16.0))
    scaler.step(b)
    scaler.update()
    assert torch.equal(p, torch.zeros(3))
    b.zero_grad()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(b)
    scaler.update()
    assert torch.equal(p, torch.zeros(3)) and scaler.get_scale() == 4.0


def test_groups_and_tied_parameters() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    b = FlatSGD([{"params": [p, p]}, {"params": q, "lr": 0.5}], lr=0.25)
    b.step()
    assert p.tolist() == [0.75] * 3 and q.tolist() == [0.5] * 3
    assert b.flat.groups.tolist() == [0, 1] and b.flat.p.numel() == 2 * CHUNK
    with pytest.raises(ValueError, match="can't take another group"):
        b.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_closure() -> None:
    p = nn.Parameter(torch.ones(3))
    b = FlatSGD([p], lr=0.5)

    def closure() -> Tensor:
        b.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert b.step(closure) == 3.0 and p.tolist() == [0.0] * 3


def test_padding_stays_zero() -> None:
    _, _, ours, b = twins(lr=0.1, momentum=0.9, nesterov=True, shadow=torch.float16)
    for _ in range(3):
        for p in ours:
            p.grad = torch.randn(p.shape)
        b.step()
    inside = torch.zeros(b.flat.p.numel(), dtype=torch.bool)
    for k in range(len(ours)):
        b.flat.view(inside, k).fill_(True)
    assert inside.sum() == sum(p.numel() for p in ours)
    assert b.flat.shadow is not None and b.m is not None
    for flat in (b.flat.p, b.flat.g, b.m, b.flat.shadow):
        assert not flat[~inside].any() and flat[inside].any()


def test_the_reference_in_float64() -> None:
    n = 2 * CHUNK
    p, g, m = (torch.randn(n, dtype=torch.float64) for _ in range(3))
    want_m = 0.9 * m + (g + 0.5 * p)
    want = p - 0.125 * want_m
    sgd_flat(p, g, m, groups=torch.zeros(2, dtype=torch.int32), lr=torch.tensor(0.125), decay=torch.tensor([0.5]))
    torch.testing.assert_close(p, want, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(m, want_m, rtol=1e-14, atol=1e-14)


def test_compiles_whole() -> None:
    n, groups = 2 * CHUNK, torch.tensor([0, -1], dtype=torch.int32)
    whole = torch.compile(sgd_flat, fullgraph=True, backend="aot_eager")
    made = []
    for call in (whole, sgd_flat):
        torch.manual_seed(1)
        p, g, m = (torch.randn(n) for _ in range(3))
        call(p, g, m, groups=groups, lr=torch.tensor(0.1), decay=torch.tensor([0.5]), found_inf=torch.tensor(0.0))
        made.append((p, m))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_modelled_bytes() -> None:
    """22 an element: 25.6 million parameters of ResNet-50 are 0.56 GB, 0.13 ms at 4.3 TB/s."""
    n = 1000 * CHUNK
    assert bytes_moved(n) == 22 * n + 4000 and bytes_moved(n, grads=torch.bfloat16) == 20 * n + 4000
    assert bytes_moved(n, zero=True) == 26 * n + 4000
    assert bytes_moved(n, shadow=False, momentum=False) == 12 * n + 4000


def flats(n: int = 2 * CHUNK) -> dict[str, Any]:
    return {
        **{"p": torch.zeros(n), "g": torch.zeros(n), "m": torch.zeros(n)},
        **{"groups": torch.zeros(n // CHUNK, dtype=torch.int32), "lr": torch.tensor(0.1), "decay": torch.zeros(2)},
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"p": torch.zeros(CHUNK + 1)}, "expected flat fp32, whole chunks of 1024"),
        ({"p": torch.zeros(2 * CHUNK, dtype=torch.bfloat16)}, "p is .* torch.bfloat16"),
        ({"p": torch.zeros(4 * CHUNK)[::2]}, r"p has strides \(2,\)"),
        ({"g": torch.zeros(CHUNK)}, r"g is \(1024,\)"),
        ({"g": torch.zeros(4 * CHUNK)[::2]}, r"g has strides \(2,\); expected a contiguous"),
        ({"m": torch.zeros(2 * CHUNK, dtype=torch.float16)}, "m is .* torch.float16"),
        ({"m": None}, "momentum=0.9, nesterov=False, m None; they must agree"),
        ({"momentum": 0.0}, "m given; they must agree"),
        ({"m": None, "momentum": 0.0, "nesterov": True}, "nesterov=True"),
        ({"shadow": torch.zeros(2 * CHUNK)}, "shadow is .* torch.float32"),
        ({"groups": torch.zeros(2)}, "groups is .* expected .* torch.int32"),
        ({"groups": torch.zeros(3, dtype=torch.int32)}, r"groups is \(3,\)"),
        ({"lr": torch.zeros(3)}, r"lr is \(3,\) .* expected \(\) or \(2,\)"),
        ({"lr": torch.zeros((), dtype=torch.float64)}, "lr is .* torch.float64"),
        ({"decay": torch.zeros(())}, r"decay is \(\)"),
        ({"found_inf": torch.zeros(2)}, "found_inf is .* one element"),
        ({"found_inf": torch.tensor(True)}, "found_inf is .* torch.bool"),
        ({"scale": torch.zeros(2)}, "scale is"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        sgd_flat(**{**flats(), **change})


def test_what_the_optimizer_refuses() -> None:
    def p() -> nn.Parameter:
        return nn.Parameter(torch.ones(3))

    for make, text in (
        (lambda: FlatSGD([nn.Parameter(torch.ones(3).double())]), "parameter 0 is torch.float64"),
        (lambda: FlatSGD([torch.ones(3, requires_grad=True) * 2]), "non-leaf|not a leaf"),
        (lambda: FlatSGD([p()], lr=-1), "lr=-1"),
        (lambda: FlatSGD([p()], nesterov=True), "nesterov needs momentum"),
        (lambda: FlatSGD([p()], shadow=torch.float32), "shadow=torch.float32"),
        (lambda: FlatSGD([{"params": [p()], "momentum": 0.5}, {"params": [p()]}], momentum=0.9), "expected the same for all"),
        (lambda: FlatSGD([{"params": [p()], "dampening": 0.1}], momentum=0.9), "dampening=0.1"),
        (lambda: FlatSGD([p()], lr=0.1).shadow_of(p()), "no shadow"),
        (lambda: FlatParameters([torch.ones(4)[:2], torch.ones(4)], [0, 0], torch.int8), "shadow=torch.int8"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    base = torch.ones(4)
    with pytest.raises(ValueError, match="shares its memory"):
        FlatSGD([nn.Parameter(base), nn.Parameter(base)])
    one = p()
    b = FlatSGD([one], lr=0.1)
    one.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        b.step()
    one.grad = None
    one.data = torch.ones(3)
    with pytest.raises(RuntimeError, match="left the flat buffer"):
        b.step()
    b = FlatSGD([p()], lr=0.1)
    b.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="made without momentum"):
        b.step()


def test_nothing_to_do() -> None:
    FlatSGD([nn.Parameter(torch.ones(0))], lr=0.1).step()
    none = torch.zeros(0)
    sgd_flat(none, none, None, momentum=0.0, groups=none.int(), lr=torch.tensor(0.1), decay=torch.zeros(1))


def test_triton_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use("triton"), pytest.raises(ValueError, match="on cpu; Triton needs CUDA"):
        sgd_flat(**flats())
    assert "the op has a Triton path" in explain("sgd_flat", torch.zeros(1)) and callable(sgd_flat_reference)


def test_a_gradient_that_stays_away_leaves_the_flat_buffer_empty() -> None:
    """What is in the buffer counts in the gradient's norm."""
    _, _, ours, b = twins(lr=0.1, momentum=0.9)
    for p in ours:
        p.grad = torch.ones_like(p)
    b.step()
    b.zero_grad(set_to_none=True)
    ours[0].grad = torch.full_like(ours[0], 2.0)
    b.step()
    assert float(b.flat.g.sum()) == 2.0 * ours[0].numel()


def test_leaves_take_the_place_of_parameters_and_their_gradients_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last)), nn.Parameter(torch.randn(5))]
    b = FlatSGD(params, lr=0.1, momentum=0.9, shadow=torch.bfloat16)
    leaves = b.flat.lower(params[:1])
    assert list(leaves) == params[:1] and leaves[params[0]].dtype == torch.bfloat16
    assert torch.equal(leaves[params[0]].float(), params[0].bfloat16().float())
    parts = [torch.full((4, 3, 1, 1), v).bfloat16() for v in (256.0, 1.0, 1.0)]  # bf16 can't hold 257
    for part in parts:
        leaves[params[0]].grad = part
        b.flat.adopt()
    assert params[0].grad is b.flat.grads[0] and float(params[0].grad.amax()) == 258.0 and leaves[params[0]].grad is None
    params[1].grad = torch.ones(5)
    before = params[0].detach().clone()
    b.step()
    assert not torch.equal(params[0], before)
    assert torch.equal(leaves[params[0]], params[0].bfloat16()), "a leaf sees what the step wrote"
    with pytest.raises(ValueError, match="shadow"):
        FlatSGD([nn.Parameter(torch.ones(2))], lr=0.1).flat.lower([])
