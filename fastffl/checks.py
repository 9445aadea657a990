"""checks: what must hold for every method, unasked, those of other packages included: `fastffl methods check NAME`.

Each check builds small learners of the method and raises Wrong with what does not hold. Nothing here knows any method by name.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import methods
from .errors import FastFFLError, UsageError, first_line
from .exporting import export, load
from .methods import Method
from .nets import plain
from .recipe import Data, Nets, Optim, Recipe
from .train import Learner
from .train.checkpoint import digest
from .train.optim import build
from .train.step import Step
from .values import UNLABELLED

NET, CLASSES, SIZE, ROWS = "resnet8", 5, 8, 16
CPU = torch.device("cpu")


class Wrong(FastFFLError):
    """What does not hold."""


def need(holds: bool, text: str) -> None:
    if not holds:
        raise Wrong(text)


def learner(kind: type[Method], peers: int = 3, **settings: Any) -> Learner:
    """A small learner of a method, at its own defaults but for `settings`, on grey images of 8 pixels."""
    torch.manual_seed(0)
    count = min(max(peers, kind.min_peers), kind.max_peers or 99)
    config: Any = kind.Config(name=kind.name, **settings)
    made = Learner([NET] * count, config, classes=CLASSES, size=SIZE, channels=1, samples=ROWS)
    made.prepare(torch.arange(ROWS) % CLASSES)
    return made


def batch(made: Learner, rows: int = ROWS, ramp: float = 0.7) -> tuple[Tensor, ...]:
    """What the learner's forward takes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows * made.needs.views, 1, SIZE, SIZE, generator=generator)
    ids = (torch.arange(rows),) if made.needs.ids else ()
    return x, torch.arange(rows) % CLASSES, torch.tensor(ramp), *ids


def stepper(made: Learner) -> Step:
    config: Any = made.config
    data, nets = Data(name="custom", batch_size=ROWS), Nets(names=made.cohort.names)
    recipe = Recipe(name="check", data=data, nets=nets, method=config, optim=Optim(lr=0.05, clip=5.0))
    return Step(made, build(made, recipe.optim), recipe, CPU)


def take(step: Step, given: tuple[Tensor, ...]) -> None:
    x, y, ramp, *ids = given
    step.ramp(float(ramp))
    step.rate(0.05)
    step.update(x, y, *ids)


def card(kind: type[Method]) -> None:
    """Its card is whole, and every setting is explained."""
    statuses = ("faithful", "partial", "reconstructed")
    need(kind.status in statuses, f"status is {kind.status!r}; expected {', '.join(statuses)}")
    for key in ("paper", "summary", "deviations"):
        need(bool(getattr(kind, key)), f"{key} is empty")
    need(kind.summary.endswith(".") and kind.deviations.endswith("."), "summary and deviations are sentences and end in a dot")
    need(kind.min_peers <= (kind.max_peers or kind.min_peers), f"min_peers {kind.min_peers} is above max_peers {kind.max_peers}")
    need(1800 < kind.year < 2200, f"year is {kind.year}")
    mute = [k for k, info in kind.Config.model_fields.items() if not info.description and k != "name"]
    need(not mute, f"settings without a docstring: {', '.join(mute)}")


def graph(kind: type[Method]) -> None:
    """Nodes and terms are those that its graph names, of the right shapes; every peer and the shipped vote are scored."""
    made = learner(kind)
    g, (x, y, ramp, *ids) = made.graph, batch(made)
    out = made(x, y, ramp, *ids)  # made nodes of a wrong shape are told by the loss
    peers = made.cohort(x, made.needs.views)
    if made.teacher is not None:
        peers = peers._replace(teacher=made.teacher(x, made.needs.views))
    found = made.method.nodes(peers, y)
    need(tuple(found) == g.made, f"nodes() gives {tuple(found)}; its graph names {g.made} in `made`")
    for name, z in found.items():
        need(z.shape == (ROWS, CLASSES), f"node {name} has shape {tuple(z.shape)}; expected (batch, classes) {ROWS, CLASSES}")
    values = {*zip(g.terms[len(g.hard) + len(g.edges) :], out.extra, strict=True)}
    for name, value in values:
        need(value.shape == (), f"term {name} has shape {tuple(value.shape)}; expected one number")
    votes = made.eval().votes(x[:ROWS])
    need(tuple(votes) == g.scored, f"the votes are {tuple(votes)}; its graph names {g.scored}")
    need(set(g.peers) <= set(votes), "every peer must be a vote")
    need(bool(out.loss.isfinite()), f"the loss is {out.loss.item()}")


def every_parameter_learns(kind: type[Method]) -> None:
    """A gradient of the loss or of an objective reaches every parameter that is not fixed."""
    made = learner(kind)
    out = made(*batch(made))
    wanted = [p for p in made.parameters() if p.requires_grad]
    total = out.loss + sum(out.others, torch.zeros(()))
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    reached = {id(p) for p, g in zip(wanted, grads, strict=True) if g is not None and bool(g.any())}
    still = [n for n, p in made.named_parameters() if p.requires_grad and id(p) not in reached]
    need(not still, f"no gradient reaches {', '.join(still[:4])}{' ...' if len(still) > 4 else ''}")


def fits_one_batch(kind: type[Method]) -> None:
    """Thirty steps on sixteen images teach every labelled node all of them (a teacher that nobody trained may hold it back)."""
    made = learner(kind)
    step, given = stepper(made), batch(made)
    for _ in range(30):
        take(step, given)
    out = made(*given)
    for name, ce in zip(made.graph.hard, out.ce.tolist(), strict=True):
        right = int(out.top1[made.graph.nodes.index(name)])
        need(right == ROWS and ce < 0.7, f"{name} knows {right} of {ROWS} images after 30 steps (cross-entropy {ce:.2f})")


def compiles(kind: type[Method]) -> None:
    """torch.compile traces forward and loss as one graph, to the same loss."""
    made = learner(kind, 2)
    given = batch(made, 4)
    with torch.no_grad():
        want = made.eval()(*given)
    torch._dynamo.reset()
    try:
        got = torch.compile(made, fullgraph=True, backend="eager")(*given)
    except Exception as error:  # dynamo raises many kinds, with pages of advice
        raise Wrong(f"torch.compile(fullgraph=True) fails: {str(error).strip().splitlines()[0][:200]}") from None
    same = torch.allclose(got.loss, want.loss, rtol=1e-4, atol=1e-5) and got.top1.tolist() == want.top1.tolist()
    need(same, f"compiled the loss is {got.loss.item():.6f}, eager {want.loss.item():.6f}")


def ramp(kind: type[Method]) -> None:
    """w(e) scales the ramped edges, further terms where they are ramped, and nothing else."""
    made = learner(kind).eval()
    low, high = (made(*batch(made, ramp=w)) for w in (0.25, 1.0))
    ramped = torch.tensor([float(e.ramp) * e.weight for e in made.graph.edges])
    more = made.graph.ramped * torch.tensor([*made.graph.extra.values(), 0.0]) @ torch.stack([*low.extra, torch.zeros(())])
    want = 0.75 * ((ramped * low.kl.detach()).sum() + more.detach())
    need(
        torch.allclose(high.loss - low.loss, want, rtol=1e-4, atol=1e-4),
        f"from w = 0.25 to 1 the loss grows by {(high.loss - low.loss).item():.6f}; what is ramped makes {want.item():.6f}",
    )


def goes_on(kind: type[Method]) -> None:
    """After saving and loading the next step ends in the same bits: all state is in the checkpoint."""
    made, other = learner(kind), learner(kind)
    step, second = stepper(made), stepper(other)
    given = batch(made)
    for _ in range(2):
        take(step, given)
    second.load(_through_a_file(step.state()))
    take(step, given)
    take(second, given)
    need(digest(step.state()) == digest(second.state()), "a step after loading ends otherwise: some state is not saved")


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        torch.save(state, path)
        return torch.load(path, weights_only=True)


def nothing_of_a_bad_step(kind: type[Method]) -> None:
    """A step that is not finite changes nothing, in the method's own state neither."""
    made = learner(kind)
    step, given = stepper(made), batch(made)
    take(step, given)
    before = digest(_kept(step))
    x = given[0].clone()
    x[3] = float("nan")
    take(step, (x, *given[1:]))
    need(int(step.skipped) == 1, "a batch with a NaN in it did not make the step one that is skipped")
    need(digest(_kept(step)) == before, "a step that was skipped changed weights or other state")


def _kept(step: Step) -> dict[str, Any]:
    return {k: v for k, v in step.state().items() if k not in ("skips", "meters")}


def nothing_of_what_has_no_label(kind: type[Method]) -> None:
    """An image without a label, one that can't be read, adds nothing to the loss or an objective, whatever it shows."""
    made = learner(kind).eval()
    x, y, *more = batch(made)
    y = torch.where(torch.arange(ROWS) % 4 == 1, UNLABELLED, y)
    other = torch.where((y < 0).repeat(made.needs.views)[:, None, None, None], 3 * x.flip(0), x)
    one, two = made(x, y, *more), made(other, y, *more)
    for name, a, b in (
        ("loss", one.loss, two.loss),
        *zip((o.name for o in made.objectives), one.others, two.others, strict=True),
    ):
        same = torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        need(same, f"{name} is {a.item():.6f}, and {b.item():.6f} where images without a label show something else")


def exports(kind: type[Method]) -> None:
    """A peer leaves as the plain net, parameter by parameter; what is shipped comes back from its file."""
    made = learner(kind).eval()
    x = batch(made)[0][:ROWS]
    votes = made.votes(x)
    with tempfile.TemporaryDirectory() as folder:
        for vote in dict.fromkeys(("p0", made.graph.votes[0])):
            path, off = export(made, vote, Path(folder) / f"{vote}.safetensors")
            module, _ = load(path)
            with torch.no_grad():
                same = torch.allclose(module(x), votes[vote], atol=1e-5)
            need(off < 1e-5 and same, f"the exported {vote} gives other logits")
            net = made.plain(vote)
            if net is not None:
                names = list(plain(net.name, CLASSES, 1, SIZE).state_dict())
                need(list(module.state_dict()) == names, f"the exported {vote} has other parameter names than a plain {net.name}")


def too_few(kind: type[Method]) -> None:
    """Fewer peers than it needs are refused in one sentence that names it."""
    if kind.min_peers == 1:
        return
    try:
        Learner([NET] * (kind.min_peers - 1), kind.Config(name=kind.name), classes=CLASSES, size=SIZE, channels=1, samples=ROWS)
    except UsageError as error:
        need(kind.name in str(error) and "\n" not in str(error), f"too few peers are refused without its name: {error}")
    else:
        raise Wrong(f"{kind.min_peers - 1} peers are taken, though min_peers is {kind.min_peers}")


CHECKS: dict[str, Callable[[type[Method]], None]] = {
    c.__name__.replace("_", " "): c
    for c in (
        *(card, graph, every_parameter_learns, fits_one_batch, compiles, ramp),
        *(goes_on, nothing_of_a_bad_step, nothing_of_what_has_no_label, exports, too_few),
    )
}


def run(name: str) -> dict[str, str]:
    """Every check of a method: "" where it holds, else what does not. UsageError where there is no such method."""
    kind = methods.load(name)
    found = {}
    for title, check in CHECKS.items():
        try:
            check(kind)
            found[title] = ""
        except FastFFLError as error:
            found[title] = str(error)
        except Exception as error:  # a stranger's method may raise anything
            found[title] = first_line(error)
    return found
