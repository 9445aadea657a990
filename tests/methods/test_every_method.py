"""What must hold for every method, unasked: a new file in fastffl/methods is tested here without a line being added."""

import inspect
import statistics
from typing import Any

import pytest
import torch

from fastffl import checks, methods
from fastffl.errors import UsageError
from fastffl.methods import Method

ALL = methods.names()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("check", checks.CHECKS)
def test_holds(check: str, name: str) -> None:
    checks.CHECKS[check](methods.load(name))


def test_methods_are_short() -> None:
    lines = {n: inspect.getsource(inspect.getmodule(methods.load(n))).count("\n") for n in ALL}  # type: ignore[arg-type]
    assert max(lines.values()) <= 140, lines
    assert statistics.median(lines.values()) <= 60, lines


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no method is called 'fll'; did you mean ffl"):
        methods.load("fll")


# ---- every check can fail: a method with one fault, and the check that must see it


def broken(name: str, **parts: Any) -> type[Method]:
    return type("Broken", (methods.load(name),), {"name": name, **parts})


def no_gradient(self: Any, peers: Any, y: Any = None) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"fused": self.fuse(peers.maps)}


def wrong_shape(self: Any, peers: Any, y: Any = None) -> dict[str, torch.Tensor]:
    return {"fused": self.fuse(peers.maps)[:, :3]}


def other_name(self: Any, peers: Any, y: Any = None) -> dict[str, torch.Tensor]:
    return {"fused": self.fuse(peers.maps), "more": peers.z[0]}


def host_read(self: Any, peers: Any, y: Any = None) -> dict[str, torch.Tensor]:
    u = self.fuse(peers.maps)
    return {"fused": u if float(u.sum()) > 0 else u + 0}


def remembers(self: Any, peers: Any, y: Any = None) -> dict[str, torch.Tensor]:
    self.calls = getattr(self, "calls", 0) + 1
    return {"fused": self.fuse(peers.maps) * (1 + 0.01 * self.calls)}


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "card": ("ffl", {"summary": "no dot"}),
    "every parameter learns": ("ffl", {"nodes": no_gradient}),
    "compiles": ("ffl", {"nodes": host_read}),
    "goes on": ("ffl", {"nodes": remembers}),
}


@pytest.mark.parametrize("check", FAULTS)
def test_a_fault_is_seen(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, parts = FAULTS[check]
    kind = broken(name, **parts)
    monkeypatch.setattr(methods, "load", lambda name: kind)
    with pytest.raises(checks.Wrong):
        checks.CHECKS[check](kind)


@pytest.mark.parametrize("nodes", [wrong_shape, other_name])
def test_wrong_nodes_are_seen(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = broken("ffl", nodes=nodes)
    monkeypatch.setattr(methods, "load", lambda name: kind)
    with pytest.raises(Exception, match=r"shape|every node|names"):
        checks.CHECKS["graph"](kind)
