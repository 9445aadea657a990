"""sgd_flat: momentum SGD over all parameters of a model in one launch, on flat buffers.

    d = scale g + decay p        m = momentum m + d        p = p - lr m,  or with nesterov  p - lr (d + momentum m)

as torch.optim.SGD with dampening 0, whose first step (m = d) is that of a zero m. Where `found_inf` is not zero, or the
parameter has no gradient, p, m and the shadow keep their bits. Letters: n elements in chunks of 1024, each chunk of one
parameter; G groups. Bytes an element: read p 4, m 4, g 4 (bf16: 2), write p 4, m 4 and a half-precision shadow 2 = 22, 4 more
to zero g in the same pass; and 4 a chunk. Adding lr and decay by group costs nothing: a few kilobytes that stay in the cache.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import _launch
from ._dispatch import choice, register, run

CHUNK = 1024  # a parameter is padded to whole chunks: 0.3 % of ResNet-50, and no kernel ever needs a mask
GRADS = (torch.float32, torch.bfloat16, torch.float16)
SHADOWS = (torch.bfloat16, torch.float16)


def sgd_flat_reference(
    p: Tensor,
    g: Tensor,
    m: Tensor | None,
    *,
    groups: Tensor,
    lr: Tensor,
    decay: Tensor,
    momentum: float = 0.9,
    nesterov: bool = False,
    shadow: Tensor | None = None,
    found_inf: Tensor | None = None,
    scale: Tensor | None = None,
    zero: bool = False,
) -> None:
    """The update in plain torch: the CPU path, the oracle of the tests and the benchmark's baseline. Takes float64 too."""
    live, at = groups >= 0, groups.clamp(min=0).long()
    if found_inf is not None:
        live = live & (found_inf.reshape(()) == 0)
    live, old = live[:, None], p.view(-1, CHUNK)
    d = g.view(-1, CHUNK).to(p.dtype)
    if scale is not None:
        d = d * scale.to(p.dtype)
    d = d + decay.to(p.dtype)[at][:, None] * old
    if m is not None:
        b = momentum * m.view(-1, CHUNK) + d
        d = d + momentum * b if nesterov else b
        m.view(-1, CHUNK).copy_(torch.where(live, b, m.view(-1, CHUNK)))
    new = old - lr.to(p.dtype).expand(len(decay))[at][:, None] * d
    if shadow is not None:
        shadow.view(-1, CHUNK).copy_(torch.where(live, new.to(shadow.dtype), shadow.view(-1, CHUNK)))
    old.copy_(torch.where(live, new, old))
    if zero:
        g.zero_()


@torch.library.custom_op("fastffl::sgd_flat", mutates_args=("p", "g", "m", "shadow"))
def _sgd_flat(
    p: Tensor,
    g: Tensor,
    m: Tensor | None,
    shadow: Tensor | None,
    groups: Tensor,
    lr: Tensor,
    decay: Tensor,
    found_inf: Tensor | None,
    scale: Tensor | None,
    momentum: float,
    nesterov: bool,
    zero: bool,
) -> None:
    from .jit.sgd_flat import WARPS, sgd_flat_kernel

    _launch.launch(
        sgd_flat_kernel,
        (len(groups),),
        p.device,
        *(p, g, m, shadow, groups, lr, lr.stride(0) if lr.ndim else 0, decay, found_inf, scale, momentum),
        NESTEROV=nesterov,
        ZERO=zero,
        CHUNK=CHUNK,
        warps=WARPS,
    )


@_sgd_flat.register_fake
def _(p, g, m, shadow, groups, lr, decay, found_inf, scale, momentum, nesterov, zero):  # type: ignore[no-untyped-def]
    return None


_launch.LAUNCHES["fastffl::sgd_flat"] = 1


def _triton(p: Tensor, g: Tensor, m: Tensor | None, **options: Any) -> None:
    if p.dtype != torch.float64:
        _sgd_flat(p, g, m, **options)
    elif choice() == "triton":
        raise ValueError("FASTFFL_KERNELS=triton: p is torch.float64; the kernel takes torch.float32, the reference both")
    else:
        sgd_flat_reference(p, g, m, **options)


register("sgd_flat", _triton)


@torch.no_grad()
def sgd_flat(
    p: Tensor,
    g: Tensor,
    m: Tensor | None,
    *,
    groups: Tensor,
    lr: Tensor,
    decay: Tensor,
    momentum: float = 0.9,
    nesterov: bool = False,
    shadow: Tensor | None = None,
    found_inf: Tensor | None = None,
    scale: Tensor | None = None,
    zero: bool = False,
) -> None:
    """One step of momentum SGD, in place (Sutskever et al. 2013, as torch.optim.SGD computes it; dampening 0).

    p, m        (n,) fp32, contiguous, n a multiple of 1024; m None and `momentum` 0 for plain SGD
    g           (n,) fp32, bf16 or fp16; zeroed too with `zero`, also where nothing else changes
    groups      (n / 1024,) int32: the group of every chunk, -1 where the chunk keeps its bits
    lr, decay   () or (G,), and (G,), fp32: learning rate and weight decay
    shadow      (n,) bf16 or fp16: gets the new p rounded
    found_inf   one fp32 on the device; not zero: p, m and shadow keep their bits
    scale       one fp32 on the device that multiplies the gradient: 1 / loss scale, or a clipping factor

    float64 p, g and m go to the reference. ValueError says what was wrong with shapes, dtypes or devices.
    """
    n, device = p.numel(), p.device
    if p.ndim != 1 or n % CHUNK or p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"p is {tuple(p.shape)} {p.dtype}; expected flat fp32, whole chunks of {CHUNK}")
    wide = (p.dtype,)
    checks: tuple[tuple[str, Tensor | None, tuple[torch.dtype, ...], bool, str], ...] = (
        ("g", g, (p.dtype, *GRADS), g.shape == p.shape, f"({n},)"),
        ("m", m, wide, m is None or m.shape == p.shape, f"({n},)"),
        ("shadow", shadow, SHADOWS, shadow is None or shadow.shape == p.shape, f"({n},)"),
        ("groups", groups, (torch.int32,), groups.shape == (n // CHUNK,), f"({n // CHUNK},)"),
        ("decay", decay, (torch.float32,), decay.ndim == 1, "(G,)"),
        ("lr", lr, (torch.float32,), lr.ndim == 0 or lr.shape == decay.shape, f"() or {tuple(decay.shape)}"),
        ("found_inf", found_inf, (torch.float32,), found_inf is None or found_inf.numel() == 1, "one element"),
        ("scale", scale, (torch.float32,), scale is None or scale.numel() == 1, "one element"),
    )
    for name, x, dtypes, fits, shape in checks:
        if x is not None and not (fits and x.dtype in dtypes and x.device == device):
            kinds = " or ".join(str(k) for k in dict.fromkeys(dtypes))
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; expected {shape}, {kinds} on {device}")
        if x is not None and name != "lr" and not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}; expected a contiguous tensor")
    if not p.is_contiguous():
        raise ValueError(f"p has strides {p.stride()}; expected a contiguous tensor")
    if (m is not None) != (momentum > 0) or (nesterov and m is None):
        raise ValueError(f"momentum={momentum}, nesterov={nesterov}, m {'given' if m is not None else 'None'}; they must agree")
    run(
        *("sgd_flat", p, sgd_flat_reference),
        *(p, g, m),
        groups=groups,
        lr=lr,
        decay=decay,
        momentum=float(momentum),
        nesterov=nesterov,
        shadow=shadow,
        found_inf=found_inf,
        scale=scale,
        zero=zero,
    )


def bytes_moved(
    n: int, *, grads: torch.dtype = torch.float32, shadow: bool = True, momentum: bool = True, zero: bool = False
) -> int:
    """Bytes that a step reads and writes, whole chunks: 22 an element with fp32 gradients, momentum and a shadow."""
    each = 4 + 4 + 8 * momentum + grads.itemsize * (1 + zero) + 2 * shadow
    return n * each + 4 * (n // CHUNK)


class FlatParameters:
    """Parameters and their gradients as views of flat buffers; the parameters stay the same objects, shapes and strides.

    `params` are fp32, of one device, each in one of the `of` groups. A parameter starts at a whole chunk; the padding is zero
    and stays zero under SGD. A gradient becomes a view when the first one is there (`adopt`): until then it is None.
    """

    def __init__(self, params: Sequence[Tensor], of: Sequence[int], shadow: torch.dtype | None = None):
        self.params, self.of = list(params), list(of)
        device = self.params[0].device if self.params else torch.device("cpu")
        seen: set[int] = set()
        for k, p in enumerate(self.params):
            if p.dtype != torch.float32 or p.device != device or not p.is_leaf:
                what = f"{p.dtype} on {p.device}{'' if p.is_leaf else ', not a leaf'}"
                raise ValueError(f"parameter {k} is {what}; expected torch.float32 leaves on {device}")
            if p.numel() and not p.is_meta and p.data_ptr() in seen:
                raise ValueError(f"parameter {k} {tuple(p.shape)} shares its memory with another one; give one of them")
            seen.add(p.data_ptr())
        if shadow not in (None, *SHADOWS):
            raise ValueError(f"shadow={shadow}; expected torch.bfloat16, torch.float16 or None")
        self.chunks = [_launch.divup(p.numel(), CHUNK) for p in self.params]
        self.starts = [CHUNK * sum(self.chunks[:k]) for k in range(len(self.chunks))]
        # what preserve_format makes of an expanded or stepped parameter is dense; any dense order of strides is kept
        self.strides = [torch.empty_like(p, device="meta").stride() for p in self.params]
        n = CHUNK * sum(self.chunks)
        self.p, self.g = (torch.zeros(n, device=device) for _ in range(2))
        self.shadow = torch.zeros(n, dtype=shadow, device=device) if shadow else None
        self.groups = torch.full((n // CHUNK,), -1, dtype=torch.int32, device=device)
        self._active = [False] * len(self.params)
        with torch.no_grad():
            for k, p in enumerate(self.params):
                p.data = self.view(self.p, k).copy_(p)
        self.grads = [self.view(self.g, k) for k in range(len(self.params))]
        self.leaves: list[nn.Parameter | None] = [None] * len(self.params)
        self._places = [p.data_ptr() for p in self.params]
        self.refresh()

    def view(self, flat: Tensor, k: int) -> Tensor:
        """The k-th parameter's part of a flat buffer, with its shape and strides."""
        return flat.as_strided(self.params[k].shape, self.strides[k], self.starts[k])

    @torch.no_grad()
    def refresh(self) -> None:
        """Shadows from the weights: after a checkpoint was loaded, or whatever else wrote the weights but a step."""
        if self.shadow is not None:
            self.shadow.copy_(self.p)

    def lower(self, params: Iterable[Tensor]) -> dict[Tensor, nn.Parameter]:
        """Leaves over the shadows of some parameters, for a net to compute with in their place: no cast each step. Their
        gradients, in half precision, are taken over by `adopt`. ValueError where there are no shadows."""
        if self.shadow is None:
            raise ValueError("shadow=None; leaves in half precision need shadow=torch.bfloat16 or torch.float16")
        wanted = set(params)
        for k, p in enumerate(self.params):
            if p in wanted and self.leaves[k] is None:
                self.leaves[k] = nn.Parameter(self.view(self.shadow, k), p.requires_grad)
        return {p: leaf for p, leaf in zip(self.params, self.leaves, strict=True) if leaf is not None}

    @torch.no_grad()
    def adopt(self) -> None:
        """Bring gradients that autograd made elsewhere into the flat buffer, and mark the parameters that have one.

        A leaf's gradient is added where its parameter has one in the buffer already, so that parts of a batch are summed in fp32.
        RuntimeError where a parameter left the buffer (`module.to`, `p.data = ...`) or, inside a CUDA graph capture, where
        another set of parameters has gradients than on the last step: the graph could not know.
        """
        copied, added = _Moves(), _Moves()
        active = []
        for p, grad, leaf, place in zip(self.params, self.grads, self.leaves, self._places, strict=True):
            if p.data_ptr() != place:
                raise RuntimeError(f"a parameter {tuple(p.shape)} left the flat buffer; move a net before its optimizer is made")
            if p.grad is not None and p.grad is not grad:
                copied.append(grad, p.grad)
                p.grad = grad
            if leaf is not None and leaf.grad is not None:
                (copied if p.grad is None else added).append(grad, leaf.grad)
                leaf.grad, p.grad = None, grad
            active.append(p.grad is not None)
        for kept, made in copied.lists():
            torch._foreach_copy_(kept, made)
        for kept, made in added.lists():
            torch._foreach_add_(kept, made)
        if active != self._active:
            if self.p.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the parameters with a gradient changed inside a CUDA graph capture; take a step before it")
            for grad, on, was in zip(self.grads, active, self._active, strict=True):
                if was and not on:
                    grad.zero_()  # what is in the buffer counts in its norm
            table = [g if on else -1 for g, on, n in zip(self.of, active, self.chunks, strict=True) for _ in range(n)]
            self.groups.copy_(torch.tensor(table, dtype=torch.int32))
            self._active = active


class _Moves:
    """Pairs of tensors for torch's list functions, which launch once for many where one list has one dtype and equal strides."""

    def __init__(self) -> None:
        self._pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}

    def append(self, to: Tensor, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            raise ValueError(f"a gradient {tuple(grad.shape)} is sparse; expected a dense one")
        if grad.stride() != to.stride() and all(
            n == 1 or a == b for n, a, b in zip(grad.shape, grad.stride(), to.stride(), strict=True)
        ):
            grad = grad.as_strided(to.shape, to.stride())  # 1x1 convolutions: the same places, other numbers for sizes of 1
        kept, made = self._pairs.setdefault(grad.dtype, ([], []))
        kept.append(to)
        made.append(grad)

    def lists(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        return list(self._pairs.values())


class FlatSGD(Optimizer):
    """torch.optim.SGD (dampening 0) in one launch a step, writing half-precision shadow weights in the same pass.

    params          as for any optimizer: parameters or groups, fp32 and of one device. They move into one flat buffer
    lr              per group, a float or a 0-d tensor; floats are written to the device when they change, never inside a CUDA
                    graph capture: after a scheduler call `fill_rates()` before the replay
    weight_decay    per group; `momentum` and `nesterov` are the same for all groups
    shadow          torch.bfloat16 or torch.float16: `shadow_of(p)` is the weight rounded, up to date after every step
    zero            True: a step zeroes the gradients too, and `zero_grad` need not be called

    A parameter whose gradient is None is skipped, as torch does. `zero_grad()` zeroes gradients and keeps them where they are,
    as torch does with set_to_none=False; with True the next backward makes new ones and the next step copies them.
    `found_inf` (an argument of `step` or, as for torch's fused optimizers, an attribute) other than zero: nothing changes.
    State dicts are interchangeable with torch.optim.SGD's. Groups can't be added later.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf and reads nothing

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        shadow: torch.dtype | None = None,
        zero: bool = False,
    ):
        fixed = {"dampening": 0, "maximize": False, "foreach": None, "differentiable": False, "fused": None}
        groups = list(params)
        groups = [dict(group) for group in groups] if groups and isinstance(groups[0], dict) else [{"params": groups}]
        for group in groups:  # a tied parameter counts once
            members = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
            group["params"] = list(dict.fromkeys(members))
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, **fixed})
        members = [(p, k) for k, group in enumerate(self.param_groups) for p in group["params"]]
        self._check()
        self.flat = FlatParameters([p for p, _ in members], [k for _, k in members], shadow)
        self.m = torch.zeros_like(self.flat.p) if self.param_groups[0]["momentum"] else None
        self._index = {p: k for k, p in enumerate(self.flat.params)}
        self._zero = zero
        device = self.flat.p.device
        self._lr, self._decay = (torch.zeros(len(self.param_groups), device=device) for _ in range(2))
        self._sent: list[Any] = [None] * (2 * len(self.param_groups))
        self._place_state()
        self.fill_rates()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "flat"):
            raise ValueError("FlatSGD can't take another group: its parameters lie in one buffer; make it with all groups")
        super().add_param_group(param_group)

    def _check(self) -> None:
        for group in self.param_groups:
            for name in ("lr", "momentum", "weight_decay"):
                if not isinstance(group[name], Tensor) and not group[name] >= 0:
                    raise ValueError(f"{name}={group[name]}; expected at least 0")
            if group["dampening"] or group["maximize"]:
                raise ValueError(f"dampening={group['dampening']}, maximize={group['maximize']}; FlatSGD has neither")
        self._momentum()

    def _momentum(self) -> tuple[float, bool]:
        """Momentum and nesterov of all groups."""
        found = {(group["momentum"], group["nesterov"]) for group in self.param_groups}
        if len(found) != 1:
            raise ValueError(f"groups with (momentum, nesterov) {sorted(found)}; expected the same for all")
        momentum, nesterov = found.pop()
        if nesterov and not momentum:
            raise ValueError("nesterov=True with momentum=0; nesterov needs momentum")
        return momentum, nesterov

    def _place_state(self) -> None:
        for k, p in enumerate(self.flat.params):
            if self.m is not None:
                self.state[p] = {"momentum_buffer": self.flat.view(self.m, k)}

    def shadow_of(self, p: Tensor) -> Tensor:
        """The half-precision copy of a parameter, with its shape and strides. ValueError where there is none."""
        if self.flat.shadow is None or p not in self._index:
            raise ValueError(f"no shadow of {tuple(p.shape)} {p.dtype}: shadow=None, or not one of the optimizer's parameters")
        return self.flat.view(self.flat.shadow, self._index[p])

    @torch.no_grad()
    def fill_rates(self) -> Tensor:
        """Write the groups' learning rates and weight decays to the device where they changed; () or (G,) rates to step with.

        Inside a CUDA graph capture a change is an error: the graph would repeat it for ever.
        """
        rates = [group["lr"] for group in self.param_groups]
        values = [*rates, *(group["weight_decay"] for group in self.param_groups)]
        shared = rates[0] if rates and all(r is rates[0] for r in rates) else None
        direct = isinstance(shared, Tensor) and shared.device == self._lr.device and shared.dtype == torch.float32
        slots = [*self._lr, *self._decay]
        for k, (value, slot) in enumerate(zip(values, slots, strict=True)):
            if isinstance(value, Tensor):
                if not (direct and k < len(rates)):
                    slot.copy_(value.reshape(()))
            elif value != self._sent[k]:
                if slot.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError("a learning rate changed inside a CUDA graph capture; call fill_rates() before it")
                slot.fill_(value)
            self._sent[k] = None if isinstance(value, Tensor) else value
        return shared.reshape(()) if direct and isinstance(shared, Tensor) else self._lr

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, found_inf: Tensor | None = None, scale: Tensor | None = None
    ) -> Any:
        """One update; returns what `closure` returns. `scale` (one fp32 on the device) multiplies the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.flat.adopt()
        momentum, nesterov = self._momentum()
        if (self.m is not None) != (momentum > 0):
            raise ValueError(f"momentum={momentum}; FlatSGD was made {'with' if self.m is not None else 'without'} momentum")
        found_inf = getattr(self, "found_inf", None) if found_inf is None else found_inf
        grad_scale = getattr(self, "grad_scale", None)
        if scale is None and grad_scale is not None:
            scale = 1 / grad_scale
        flat = self.flat
        sgd_flat(
            flat.p,
            flat.g,
            self.m,
            groups=flat.groups,
            lr=self.fill_rates(),
            decay=self._decay,
            momentum=momentum,
            nesterov=nesterov,
            shadow=flat.shadow,
            found_inf=found_inf,
            scale=scale,
            zero=self._zero,
        )
        return loss

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients with one fill; see the class for `set_to_none`."""
        if not set_to_none:
            self.flat.g.zero_()
        for p, grad, leaf in zip(self.flat.params, self.flat.grads, self.flat.leaves, strict=True):
            if leaf is not None:
                leaf.grad = None
            if p.grad is not None and p.grad is not grad:
                p.grad = grad
            if set_to_none:
                p.grad = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state of this class or of torch.optim.SGD, copied; shadows are made anew from the weights as they are."""
        super().load_state_dict(state_dict)
        self._check()
        if self.m is None and self.param_groups[0]["momentum"]:
            raise ValueError("a state with momentum for FlatSGD without; make it with the momentum of the state")
        for p in self.flat.params:
            buffer = self.state[p].get("momentum_buffer") if p in self.state else None
            if self.m is not None:
                mine = self.flat.view(self.m, self._index[p])
                mine.zero_() if buffer is None else mine.copy_(buffer)
        self._place_state()
        self.flat.refresh()
