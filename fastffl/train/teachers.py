"""teachers: trained nets that teach and do not learn; where they come from, and the runs that make them first."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..errors import CheckpointError, UsageError
from ..recipe import MethodConfig
from . import checkpoint

if TYPE_CHECKING:
    from .learner import Learner


class Taught(NamedTuple):
    """A trained net: its architecture, its classes' names, its weights under the plain net's names."""

    net: str
    classes: tuple[str, ...]
    state: dict[str, Tensor]


def read(where: str) -> Taught:
    """The net in a run folder (RUN: its first peer, RUN:p1 another) or an exported file. UsageError where there is none."""
    folder, colon, peer = (where, "", "") if Path(where).exists() else where.rpartition(":p")
    if Path(folder).is_dir() and (colon or not peer):
        return _of_run(folder, peer or "0", where)
    run, colon, vote = where.rpartition(":")
    if colon and not Path(where).is_file() and Path(run).is_dir():
        raise UsageError(f"teacher {where}: {vote} is no peer of that run, and one net teaches; name one of its peers, {run}:p0")
    if not Path(where).is_file():
        raise UsageError(
            f"teacher {where}: there is no such run or file; expected a run folder, RUN:p1 or a file of `fastffl export` in "
            "--set method.teachers=..."
        )
    from ..exporting import read_file

    try:
        state, about = read_file(where)
        classes = tuple(json.loads(about["classes"]))
    except (UsageError, ValueError, TypeError) as error:
        raise UsageError(f"teacher {where}: {error}; export it again, or name another with --set method.teachers=...") from None
    if about["net"] == about["vote"]:
        raise UsageError(
            f"teacher {where} is the vote {about['vote']} of several nets, expected one net; export a peer, `fastffl export RUN "
            "--vote p0`"
        )
    return Taught(about["net"], classes, state)


def _of_run(folder: str, peer: str, where: str) -> Taught:
    try:
        state = checkpoint.newest(Path(folder) / "last")
    except CheckpointError as error:
        raise UsageError(f"teacher {where}: {error}") from None
    if state is None:
        raise UsageError(
            f"teacher {where}: {folder} holds no checkpoint of a run; train it first, or name another with --set "
            "method.teachers=..."
        )
    try:
        recipe = json.loads(state["recipe"])
        names, classes = recipe["nets"]["names"], tuple(state["classes"])
        weights = state["average"]["model"] if recipe["ema"]["decay"] else state["learner"]
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"teacher {where}: its checkpoint is not one of this version of fastffl; train it again") from None
    if not peer.isdigit() or int(peer) >= len(names):
        peers = ", ".join(f"p{k}" for k in range(len(names)))
        raise UsageError(f"teacher {where}: that run has the peers {peers}; name one of them, {folder}:p0")
    start = f"cohort.p{int(peer)}.plain."
    mine = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    return Taught(names[int(peer)], classes, mine)


def settled(config: MethodConfig, peers: tuple[str, ...], method: str) -> MethodConfig:
    """The settings with the architectures of their teachers written out, so that no file is needed to build the learner again."""
    named: tuple[str, ...] = getattr(config, "teachers", ())
    nets: tuple[str, ...] = getattr(config, "teacher_nets", ())
    if not named or nets:
        return config
    try:
        return config.model_copy(update={"teacher_nets": tuple(read(where).net for where in named)})
    except UsageError as error:
        raise UsageError(f"method {config.name}: {error}") from None


def load(learner: "Learner", classes: Sequence[str]) -> None:
    """The weights of the teachers that the settings name, into the learner. UsageError where they do not fit.

    classes   names of the data's
    """
    named: tuple[str, ...] = getattr(learner.config, "teachers", ())
    if learner.teacher is None or not named:
        return
    if len(named) != len(learner.teacher.nets):
        raise UsageError(
            f"method {learner.method.name}: {len(named)} teachers are named and {len(learner.teacher.nets)} nets for them; "
            "leave method.teacher_nets out"
        )
    for net, where in zip(learner.teacher.nets, named, strict=True):
        found = read(where)
        if len(found.classes) != len(classes) or (found.classes != tuple(classes) and not _numbered(found.classes)):
            other = "other " if len(found.classes) == len(classes) else ""
            raise UsageError(
                f"method {learner.method.name}: teacher {where} knows {len(found.classes)} {other}classes and the data has "
                f"{len(classes)}; name one trained on this data with --set method.teachers=..., or none to train it first"
            )
        try:
            net.plain.load_state_dict(found.state)
        except RuntimeError as error:
            why: Any = str(error).splitlines()[-1].strip()
            raise UsageError(
                f"method {learner.method.name}: teacher {where} does not fit {net.name} ({why}); name another with --set "
                "method.teachers=..."
            ) from None


def _numbered(classes: tuple[str, ...]) -> bool:
    """Whether nobody named the classes of an exported file."""
    return classes == tuple(map(str, range(len(classes))))
