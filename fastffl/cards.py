"""cards: what there is to know of a method, `fastffl methods NAME`: its facts, and costs that are counted, not claimed."""

from typing import Any, NamedTuple

import torch
from torch import nn

from . import methods, recipes
from .errors import UsageError
from .methods import Method
from .nets import facts as net_facts
from .train import Learner

NET, CLASSES, SIZE, SAMPLES, PEERS = "resnet32", 100, 32, 50_000, 3  # CIFAR-100, for which most results are published


class Cost(NamedTuple):
    """What a method adds while training `peers` nets; what is shipped costs what the plain net costs."""

    peers: tuple[str, ...]
    own: int  # parameters of the method's own modules
    copies: int  # parameters of averaged or frozen nets
    memory: int  # bytes of what it remembers of the images
    macs: float  # multiply-adds of a training forward pass of one image, over those of one plain net
    views: int  # augmentations of each image
    optimizers: int
    runs: int  # runs that are finished first


def cost(kind: type[Method]) -> Cost:
    """Counted on nets of CIFAR-100."""
    from torch.utils.flop_counter import FlopCounterMode

    made = sample(kind)
    x, y = torch.zeros(2 * made.needs.views, 3, SIZE, SIZE), torch.zeros(2, dtype=torch.int64)
    ids = (torch.arange(2),) if made.needs.ids else ()
    made.prepare(torch.arange(SAMPLES) % CLASSES)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made(x, y, torch.ones(()), *ids)
    plain = net_facts(NET, CLASSES, 3, SIZE).macs
    asked = recipes.with_method(recipes.load("cifar100"), kind.name)
    return Cost(
        peers=made.cohort.names,
        own=_count(made.method),
        copies=_count(made.teacher),
        memory=_memory(made.method),
        macs=counter.get_total_flops() / 2 / 2 / plain,
        views=made.needs.views,
        optimizers=1 + len(made.objectives),
        runs=len(methods.ask(kind, "earlier", asked)),
    )


def _count(part: nn.Module | None) -> int:
    return sum(p.numel() for p in part.parameters()) if part is not None else 0


def _memory(method: nn.Module) -> int:
    """Bytes of buffers with a row for each training image."""
    return sum(b.numel() * b.element_size() for b in method.buffers() if SAMPLES in b.shape)


def sample(kind: type[Method], peers: int = PEERS) -> Learner:
    """A learner of the method as a recipe of so many equal nets would have it."""
    nets, config = methods.ask(kind, "arranged", (NET,) * max(peers, kind.min_peers))
    return Learner(nets, config, classes=CLASSES, size=SIZE, samples=SAMPLES)


def of(name: str) -> dict[str, Any]:
    """A method's card as JSON has it; of a method that can't be loaded, why."""
    try:
        kind = methods.load(name)
    except UsageError as error:
        return {
            "name": name,
            "status": "broken",
            "summary": str(error),
            "paper": "",
            "year": 0,
            "deviations": "",
            "parts": {},
            "published": [],
        }
    keys = ("name", "paper", "year", "summary", "status", "deviations", "min_peers", "max_peers", "stem")
    return {**{k: getattr(kind, k) for k in keys}, "parts": {**kind.parts}, "published": [p._asdict() for p in kind.published]}


def text(name: str) -> list[str]:
    """The card for people, line by line."""
    kind = methods.load(name)
    made, spent = sample(kind), cost(kind)
    g = made.graph
    most = f" to {kind.max_peers}" if kind.max_peers and kind.max_peers > kind.min_peers else "" if kind.max_peers else " or more"
    stem = {"either": "shared or separate", "shared": "shared", "separate": "separate nets"}[kind.stem]
    lines = [
        f"{kind.name}: {kind.summary}",
        f"paper    {kind.paper}" + ("" if str(kind.year) in kind.paper else f" ({kind.year})"),
        f"status   {kind.status}",
        f"differs  {kind.deviations}",
        f"peers    {kind.min_peers}{most}; stem: {stem}",
        "",
        f"graph of {len(made.cohort.names)} peers ({', '.join(made.cohort.names)}):",
        *(f"  {line}" for line in _drawn(made)),
        "",
        f"ships    {g.votes[0]}" + (f"; also {', '.join(g.votes[1:])}" if g.votes[1:] else ""),
        *_costs(spent),
    ]
    if kind.published:
        lines += ["", "published (not reproduced here):", *(f"  {p.setting}: {p.value}   [{p.source}]" for p in kind.published)]
    own = [r for r in recipes.names() if not r.startswith("none-") and recipes.load(r).method.name == name]
    lines += ["", f"recipes  {', '.join(own)}" if own else f"recipe   any, with --method {name}"]
    lines.append("settings (--set method.KEY=VALUE):")
    for key, info in kind.Config.model_fields.items():
        if key != "name":
            lines.append(f"  {key:16} {info.default!s:8} {' '.join((info.description or '').split())}")
    return lines


def _drawn(made: Learner) -> list[str]:
    needs, lines = made.needs, made.graph.text().split("\n")
    if needs.frozen:
        lines.append(f"teachers stand still: {', '.join(needs.frozen)}")
    if made.graph.copies:
        lines.append(f"{', '.join(made.graph.copies)}: moving averages of the peers")
    if needs.views > 1:
        lines.append("peer k sees view k of every image")
    lines += [f"{o.name}   by an Adam of its own" for o in made.objectives]
    parts = type(made.method).parts
    return [*lines, "where", *(f"  {name}: {what}" for name, what in parts.items())] if parts else lines


def _costs(spent: Cost) -> list[str]:
    lines = [
        f"costs    beside {len(spent.peers)} peers ({', '.join(spent.peers)}; {CLASSES} classes, {SIZE} px) while training:",
        f"  {spent.own:,} parameters of its own",
        f"  {spent.macs:.2f} x the multiply-adds of one plain {NET} in a forward pass, {spent.views} view(s) of each image",
    ]
    if spent.copies:
        lines.append(f"  {spent.copies:,} parameters of nets that only teach")
    if spent.memory:
        lines.append(f"  {spent.memory / 2**20:.0f} MiB of memory of {SAMPLES:,} images")
    if spent.optimizers > 1:
        lines.append(f"  {spent.optimizers} optimizers")
    if spent.runs:
        lines.append(f"  {spent.runs} run(s) that are finished first, by the same command")
    return lines
