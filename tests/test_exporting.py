"""Exports other than one plain peer: the fused classifier, the gate and the mean from a file again, and ONNX in its runtime."""

import warnings
from pathlib import Path

import pytest
import torch

from fastffl import Learner, export
from fastffl.errors import UsageError
from fastffl.exporting import load


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
        from fastffl.exporting import _state

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
