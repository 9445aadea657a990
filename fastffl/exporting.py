"""Export: one plain peer, or the fused classifier, checked against the trained logits before anything is written."""

import io
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import FastFFLError, UsageError
from .nets import ZOO, plain
from .train import Learner
from .train.checkpoint import write_file

Format = Literal["safetensors", "torch", "onnx"]
SUFFIX = {"safetensors": ".safetensors", "torch": ".pt", "onnx": ".onnx"}
ONNX_LIMIT = 1e-3  # largest logit difference of an ONNX file, relative to the largest logit


class OneVote(nn.Module):
    """A learner that answers with one vote: (B, channels, S, S) -> (B, classes)."""

    def __init__(self, learner: Learner, vote: str):
        super().__init__()
        self.learner, self.vote = learner, vote

    def forward(self, x: Tensor) -> Tensor:
        return self.learner.votes(x)[self.vote]


def _onnx(module: nn.Module, x: Tensor, classes: list[str], facts: dict[str, str]) -> bytes:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f'--format onnx needs {error.name}: pip install "fastffl[onnx]"') from None
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        module, (x,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["images"], output_names=["logits"]
    )
    assert program is not None
    proto = program.model_proto
    for key, value in facts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    data = proto.SerializeToString()
    onnx.checker.check_model(data)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for n in (1, len(x)):
        got = torch.from_numpy(session.run(None, {"images": x[:n].numpy()})[0])
        want = module(x[:n])
        off = float((got - want).abs().max()) / max(float(want.abs().max()), 1.0)
        if off > ONNX_LIMIT:
            raise FastFFLError(
                f"ONNX logits differ by {off:.1e} of the largest logit at batch {n} (limit {ONNX_LIMIT:g}): not written"
            )
    return data


@torch.no_grad()
def export(
    learner: Learner,
    vote: str,
    out: str | Path | None = None,
    format: Format = "safetensors",
    *,
    classes: list[str] | None = None,
    facts: dict[str, str] | None = None,
) -> tuple[Path, float]:
    """Write one vote of a trained learner and return the file and the largest logit difference that was measured.

    A peer becomes the plain net's state: it loads with strict=True into the model its name builds, here or in timm, and
    that is done and compared before the file is written. Other votes (fused, mean, gate) are written whole: their peers,
    fusion module and all, less what they do not use.

    format    safetensors or torch: weights; onnx: the whole computation with a free batch size
    classes   class names, facts: further text; both are stored in the file's metadata
    """
    learner.vote(vote)
    if format not in SUFFIX:
        raise UsageError(f"no format is called {format!r}; expected {', '.join(SUFFIX)}")
    net = learner.net_of(vote)
    path = Path(out) if out else Path(f"{net}-{vote}{SUFFIX[format]}" if net != vote else f"{vote}{SUFFIX[format]}")
    was, dtype = learner.training, learner.amp_dtype
    learner.eval()
    learner.amp_dtype = None  # a plain model runs in fp32, so that is what is compared
    try:
        weight = next(learner.parameters())
        x = torch.randn(5, learner.channels, learner.size, learner.size, generator=torch.Generator().manual_seed(0))
        want = learner.votes(x.to(weight.device))[vote].cpu()
        count = len(learner.graph.peers)
        about = {
            "format": "fastffl",
            "net": net,
            "vote": vote,
            "nets": ",".join(learner.cohort.names),
            "shape": f"{learner.channels},{learner.size},{learner.size}",
            "classes": json.dumps(classes or [str(c) for c in range(want.shape[1])]),
            **(facts or {}),
        }
        if vote in learner.graph.peers:
            trained = learner.cohort.nets[int(vote[1:])].plain
            state = {k: v.detach().cpu().clone().contiguous() for k, v in trained.state_dict().items()}
            off = _plain_difference(learner, net, state, x, want, trained)
            module: nn.Module = trained
        else:
            state = {k: v.detach().cpu().clone().contiguous() for k, v in _needed(learner, vote, count).items()}
            off, module = 0.0, OneVote(learner, vote)
        if format == "onnx":
            data = _onnx(_on_cpu(module, learner), x, classes or [], about)
        elif format == "safetensors":
            from safetensors.torch import save

            data = save(state, metadata=about)
        else:
            buffer = io.BytesIO()
            torch.save({"state": state, "about": about}, buffer)
            data = buffer.getvalue()
    finally:
        learner.train(was)
        learner.amp_dtype = dtype
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UsageError(
                f"can't write {path}: it is a folder; name a file in it, for example --out {path / 'net'}{SUFFIX[format]}"
            )
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}; choose another --out FILE") from None
    write_file(path, data)
    return path, off


def _on_cpu(module: nn.Module, learner: Learner) -> nn.Module:
    import copy

    return copy.deepcopy(module).cpu().eval().to(memory_format=torch.contiguous_format)


def _plain_difference(learner: Learner, net: str, state: dict[str, Tensor], x: Tensor, want: Tensor, trained: Any) -> float:
    """Load the state into the plain model of that name with strict=True and compare logits. FastFFLError if they differ."""
    import copy

    import timm

    if net in ZOO or timm.is_model(net):
        fresh = plain(net, want.shape[1], learner.channels, learner.size)
    else:
        fresh = copy.deepcopy(trained).cpu()  # a module of the user's own: the class is theirs to build
    fresh.load_state_dict(state, strict=True)
    weight = next(learner.parameters())
    layout = torch.channels_last if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) else None
    if layout is not None:
        fresh.to(memory_format=layout)  # the same kernels, so that equal means equal bits
    got = fresh.to(weight.device).eval()(x.to(weight.device)).cpu()
    off = float((got - want).abs().max())
    if off > 1e-4 * max(float(want.abs().max()), 1.0):
        raise FastFFLError(
            f"the exported {net} gives other logits than the trained peer (largest difference {off:.1e}): not written"
        )
    return off


def _needed(learner: Learner, vote: str, count: int) -> dict[str, Tensor]:
    """The learner's state without the peers' classifiers where the vote does not look at the peers' logits."""
    state = {k: v for k, v in learner.state_dict().items() if not k.startswith("loss.")}
    if vote != "fused":
        return state
    heads = []
    for k, net in enumerate(learner.cohort.nets):
        head = getattr(net.plain, "get_classifier", None)
        name = next((n for n, m in net.plain.named_modules() if m is (head() if head else getattr(net.plain, "fc", None))), None)
        if name:
            heads.append(f"cohort.p{k}.plain.{name}.")
    return {k: v for k, v in state.items() if not any(k.startswith(h) for h in heads)}
