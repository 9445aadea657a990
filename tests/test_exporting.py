"""Exports other than one plain peer: the fused classifier, the gate and the mean from a file again, and ONNX in its runtime."""

import warnings
from pathlib import Path

import pytest
import torch

from fastffl import Learner, export, methods, nets
from fastffl.errors import UsageError
from fastffl.exporting import _state, load, read_file
from fastffl.methods.pcl import PCL
from fastffl.values import Peers


def learner(nets: list[str], method: str) -> Learner:
    model = Learner(nets, method, classes=5, size=16)
    model(torch.randn(8, 3, 16, 16), torch.arange(8) % 5, torch.tensor(1.0))  # running statistics move
    return model


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize(
    ("nets", "method", "vote", "dropped"),
    [
        (["resnet8", "wrn16_2"], "ffl", "fused", 4),
        (["resnet8", "resnet8"], "ffl", "fused", 4),
        (["resnet8", "wrn16_2"], "ffl", "mean", 8),
        (["resnet8"] * 3, "one", "gate", 0),
        (["resnet8", "mobilenetv3_small_050"], "dml", "p1", 0),
    ],
)
def test_a_vote_comes_back_from_its_file(
    nets: list[str], method: str, vote: str, dropped: int, form: str, tmp_path: Path
) -> None:
    model = learner(nets, method)
    path, off = export(model, vote, tmp_path / f"x{'.pt' if form == 'torch' else '.safetensors'}", form, classes=list("abcde"))  # type: ignore[arg-type]
    assert off == 0
    again, about = load(path)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval().votes(x)[vote])
    assert about["vote"] == vote and about["classes"] == '["a", "b", "c", "d", "e"]'
    if vote == "fused":
        gone = model.state_dict().keys() - _state(model, vote).keys()
        assert len(gone) == dropped and all(".fc." in k for k in gone), "the peers' classifiers, and nothing else"


def test_onnx_runs_at_any_batch_size(tmp_path: Path) -> None:
    import onnxruntime

    model = learner(["resnet8", "mobilenetv3_small_050"], "ffl")
    for vote in ("p0", "p1", "fused"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            path, off = export(model, vote, tmp_path / f"{vote}.onnx", "onnx", classes=list("abcde"))
        assert 0 <= off < 1e-4
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert session.get_modelmeta().custom_metadata_map["vote"] == vote
        for n in (1, 2, 7):
            x = torch.randn(n, 3, 16, 16)
            got = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
            with torch.no_grad():
                torch.testing.assert_close(got, model.eval().votes(x)[vote], rtol=1e-3, atol=1e-4)


def test_the_comparison_stops_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastffl import exporting
    from fastffl.errors import FastFFLError

    model = learner(["resnet8", "wrn16_2"], "ffl")
    real = exporting._state
    monkeypatch.setattr(exporting, "_state", lambda m, v: {k: t * 1.1 if k == "fc.weight" else t for k, t in real(m, v).items()})
    with pytest.raises(FastFFLError, match="gives other logits"):
        export(model, "p0", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_foreign_file_is_refused(name: str, tmp_path: Path) -> None:
    for content in (b"", b"text", bytes(200)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="can't be read as an export of fastffl"):
            load(tmp_path / name)


class Own(torch.nn.Module):
    """A net no name builds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_a_vote_over_a_net_of_the_users_own(tmp_path: Path) -> None:
    """Written and compared through a copy; to build it again needs the class, which load says."""
    model = Learner([Own(), "resnet8"], "ffl", classes=5, size=16)
    path, off = export(model, "fused", tmp_path / "fused.safetensors")
    assert off == 0
    with pytest.raises(UsageError, match="no model is called 'Own'"):
        load(path)


FAMILY = {
    "cl-ilr": ["resnet8"] * 4,
    "okddip": ["resnet8"] * 3,
    "kdcl": ["resnet8", "wrn16_2"],
    "pcl": ["resnet8"] * 2,
    "oem-kd": ["resnet8", "resnet8@0.6", "resnet8@0.2"],
    "mfef": ["resnet8", "resnet8@0.6"],
}


@pytest.mark.parametrize("method", FAMILY)
def test_every_peer_is_exported_as_the_plain_net(method: str, tmp_path: Path) -> None:
    """Exactly its names, whatever it shares and whoever teaches it, in their order; and it answers as it did among the others."""
    model = learner(FAMILY[method], method)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        votes = model.eval().votes(x)
    for vote in (*model.graph.peers, *model.graph.copies):
        path, off = export(model, vote, tmp_path / f"{vote}.safetensors")
        state, about = read_file(path)
        plain = nets.plain(FAMILY[method][int(vote[-1])], 5, 3, 16).eval()
        assert off == 0 and about["net"] == FAMILY[method][int(vote[-1])] and about["vote"] == vote
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in plain.state_dict().items()}
        plain.load_state_dict(state, strict=True)
        with torch.no_grad():
            assert torch.equal(plain(x), votes[vote])


class Leaning(PCL):
    """An ensemble that asks the averages."""

    name = "pcl"

    def nodes(self, peers: Peers, y: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        made = super().nodes(peers, y)
        return {**made, "ens": made["ens"] + made["ema1"]}


def test_a_vote_that_asks_the_averages_brings_them_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "load", lambda name: Leaning)
    model = learner(["resnet8"] * 2, "pcl")
    with torch.no_grad():
        for p in model.teacher.parameters():  # type: ignore[union-attr]
            p.mul_(1.1)
    path, off = export(model, "ens", tmp_path / "x.safetensors")
    again, _ = load(path)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert off == 0 and torch.equal(again(x), model.eval().votes(x)["ens"])
    assert any(k.startswith("teacher.cohort.p1.") for k in _state(model, "ens"))
    monkeypatch.undo()
    assert not any(k.startswith("teacher.") for k in _state(learner(["resnet8"] * 2, "pcl"), "ens")), "and no other does"
