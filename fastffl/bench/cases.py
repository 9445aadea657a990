"""What `fastffl bench train` measures: its cases, and the goals of a whole training step on an H200."""

from collections.abc import Iterable
from typing import NamedTuple

from .. import recipes
from ..recipe import Recipe, change
from .goals import Goal, Measured, Row

S9_SECONDS = 300.0  # what 300 epochs of CIFAR-100 with an evaluation after each may take


class Case(NamedTuple):
    """FFL on the settings of the official code: two peers, one batch size, images of one size.

    shared  one stem for both peers     heavy  its activations fill a GPU twice: two variants at a time, CUDA only
    usual   measured where no --case is named on a CPU; with `quick` on any device
    """

    name: str
    nets: tuple[str, ...]
    batch: int
    shared: bool = False
    size: int = 32
    classes: int = 100
    heavy: bool = False
    usual: bool = False
    quick: bool = False

    def recipe(self, device: str, amp: bool) -> Recipe:
        """The recipe that trains this case's nets on random images."""
        made = recipes.load("ffl-cifar100-resnet32")
        for path, value in (
            ("nets.names", list(self.nets)),
            ("nets.share_stem", self.shared),
            ("data.batch_size", self.batch),
            ("data.loader", "synthetic"),
            ("data.size", self.size),
            ("data.classes", self.classes),
            ("amp.enabled", amp),
            ("run.device", device),
        ):
            made = change(made, path, value)
        return made

    def alone(self, device: str, amp: bool) -> list[Recipe]:
        """A recipe for each different net: that peer, from the labels only."""
        base = self._replace(shared=False).recipe(device, amp)
        return [change(recipes.with_method(base, "none"), "nets.names", [net]) for net in dict.fromkeys(self.nets)]


_ALL = (
    Case("resnet8x2-32", ("resnet8", "resnet8"), 32, usual=True, quick=True),
    Case("shared-resnet32-128", ("resnet32", "resnet32"), 128, shared=True, usual=True, quick=True),
    Case("resnet32x2-128", ("resnet32", "resnet32"), 128, usual=True, quick=True),
    Case("resnet32x2-1024", ("resnet32", "resnet32"), 1024),
    Case("resnet56x2-128", ("resnet56", "resnet56"), 128),
    Case("wrn16_2x2-128", ("wrn16_2", "wrn16_2"), 128),
    Case("resnet32+wrn16_2-128", ("resnet32", "wrn16_2"), 128, usual=True),
    Case("resnet50x2-256", ("resnet50", "resnet50"), 256, size=224, classes=1000, heavy=True),
)
CASES = {case.name: case for case in _ALL}
OFFICIAL = "shared-resnet32-128"  # the authors' own net; measured with their loader, too
COLD = "resnet32x2-128"  # where the time to the first optimised step is measured

GOALS = (
    Goal("S1", "step", OFFICIAL, "official with data", 8, 12),
    Goal("S2", "step", "resnet32x2-128", "eager", 3, 5),
    Goal("S3", "step", "resnet32x2-128", "compile", 1.2, 1.7),
    Goal("S4", "step", "resnet32x2-1024", "eager", 1.3, 1.6),
    Goal("S4", "step", "resnet32x2-1024", "compile", 1.1, 1.3),
    Goal("S5", "step", "resnet56x2-128", "eager", 2.5, 4),
    Goal("S5", "step", "resnet56x2-128", "compile", 1.1, 1.5),
    Goal("S5", "step", "wrn16_2x2-128", "eager", 2.5, 4),
    Goal("S5", "step", "wrn16_2x2-128", "compile", 1.1, 1.5),
    Goal("S6", "step", "resnet32+wrn16_2-128", "its peers alone", 1 / 0.92, 1 / 0.80),
    Goal("S7", "step", "any case", "its serial graph", 0.98, 1.0),
    Goal("S8", "cold start", COLD, "compile", 2, 4),
    Goal("S9", "300 epochs", "ffl-cifar100-resnet32", "5 minutes", 1, 5 / 3),
    Goal("M1", "peak memory", "resnet50x2-256", "eager", 1.0, 1 / 0.95),
    Goal("M1", "peak memory", "resnet50x2-256", "compile", 1.0, 1.0),
)


def goals(rows: Iterable[Row]) -> list[Measured]:
    """Each goal from the newest rows of a CUDA device; against a group, its best variant. All are rival / ours."""
    newest: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.get("cuda") and row.get("state") == "ok":
            newest[row["kind"], row["case"], row["variant"]] = row
    return [Measured(goal, *min(_figures(goal, newest), default=(None, ""))) for goal in GOALS]


def _figures(goal: Goal, newest: dict[tuple[str, str, str], Row]) -> list[tuple[float, str]]:
    """(how many times better ours is, what it was measured against)."""
    if goal.op == "300 epochs":
        runs = [row for (kind, case, _), row in newest.items() if kind == "run" and case == goal.case]
        return [(S9_SECONDS * row["epochs"] / 300 / row["seconds"], f"{row['seconds']:.0f} s") for row in runs]
    if goal.op == "cold start":
        ours = newest.get(("cold", goal.case, "ours"))
        rival = newest.get(("cold", goal.case, goal.against))
        return [(rival["setup_s"] / ours["setup_s"], goal.against)] if ours and rival else []
    if goal.case == "any case":
        serial = [row for (kind, _, variant), row in newest.items() if kind == "step" and variant == "ours serial"]
        return [(row["ratio"], row["case"]) for row in serial]
    of_case = [r for (kind, case, _), r in newest.items() if kind in ("step", "with data") and case == goal.case]
    found = [r for r in of_case if r["group"] == goal.against and r.get("against", "").startswith("ours")]
    if goal.op == "peak memory":
        mine = {r["variant"]: r for r in of_case}.get("ours", {}).get("peak_mib")
        return [(r["peak_mib"] / mine, r["variant"]) for r in found if mine and r.get("peak_mib")]
    return [(r["ratio"], r["variant"]) for r in found]
