"""Export: one plain peer, or the fused classifier, checked against the trained logits before anything is written."""

import copy
import io
import json
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from . import methods
from .errors import FastFFLError, UsageError
from .nets import ZOO, plain
from .train import Learner
from .train.checkpoint import write_file
from .values import Peers

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


def file_name(learner: Learner, vote: str, format: Format = "safetensors") -> str:
    """resnet8-p0.safetensors, fused.safetensors, ..."""
    net = learner.net_of(vote)
    return (f"{net}-{vote}" if net != vote else vote) + SUFFIX[format]


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

    A peer becomes the plain net's state: it loads with strict=True into the model its name builds, here or in timm. Other
    votes (fused, mean, gate) are written with their peers and modules, less the parameters they do not depend on;
    `load(file)` builds them again. Either is loaded into fresh modules and compared before the file is written.

    format    safetensors or torch: weights; onnx: the whole computation with a free batch size
    classes   class names, facts: further text; both are stored in the file's metadata
    """
    learner.vote(vote)
    if format not in SUFFIX:
        raise UsageError(f"no format is called {format!r}; expected {', '.join(SUFFIX)}")
    path = Path(out) if out else Path(file_name(learner, vote, format))
    was, dtype = learner.training, learner.amp_dtype
    learner.eval()
    learner.amp_dtype = None  # a plain model runs in fp32, so that is what is compared
    try:
        device = next(learner.parameters()).device
        x = torch.randn(5, learner.channels, learner.size, learner.size, generator=torch.Generator().manual_seed(0))
        want = learner.votes(x.to(device))[vote].cpu()
        about = {
            "format": "fastffl",
            "net": learner.net_of(vote),
            "vote": vote,
            "nets": ",".join(learner.cohort.names),
            "method": learner.config.model_dump_json(),
            "shared": json.dumps(learner.cohort.shared),
            "private": str(len(learner.cohort.nets[0].stages) - learner.cohort.cut if learner.cohort.shared else 1),
            "samples": str(learner.spec.samples),
            "shape": f"{learner.channels},{learner.size},{learner.size}",
            "classes": json.dumps(classes or [str(c) for c in range(want.shape[1])]),
            **(facts or {}),
        }
        state = {k: v.detach().cpu().clone().contiguous() for k, v in _state(learner, vote).items()}
        own = [n for n in learner.cohort.names if not (n.partition("@")[0] in ZOO or timm.is_model(n))]
        if own:  # classes of the user's own, which no name builds
            fresh: nn.Module = copy.deepcopy(_module(learner, vote)).cpu()
        else:
            fresh = _built(state, about)
        fresh.to(device).to(memory_format=learner.layout).eval()  # the same kernels, so that equal means equal bits
        off = float((fresh(x.to(device)).cpu() - want).abs().max())
        if off > 1e-4 * max(float(want.abs().max()), 1.0):
            raise FastFFLError(f"the exported {vote} gives other logits than the trained one (by {off:.1e}): not written")
        if format == "onnx":
            data, off = _onnx(fresh.cpu().to(memory_format=torch.contiguous_format), x, about)
        elif format == "safetensors":
            data = safetensors.torch.save(state, metadata=about)
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
            example = f"--out {path / 'net'}{SUFFIX[format]}"
            raise UsageError(f"can't write {path}: it is a folder; name a file in it, for example {example}")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}; choose another --out FILE") from None
    write_file(path, data)
    return path, off


def load(file: str | Path) -> tuple[nn.Module, dict[str, str]]:
    """An exported .safetensors or .pt file as a module in eval mode, (B, channels, S, S) -> (B, classes), and its metadata.

    UsageError where the file is not such an export, or is of a net that no name builds.
    """
    state, about = read_file(file)
    try:
        return _built(state, about).eval(), about
    except UsageError:
        raise
    except Exception as error:  # of metadata that somebody else wrote
        raise _foreign(file, error) from None


def read_file(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights and the metadata of an exported file. UsageError where it is none."""
    path = Path(file)
    try:
        if path.suffix == SUFFIX["torch"]:
            stored = torch.load(path, weights_only=True)
            state, about = stored["state"], stored["about"]
        else:
            with safetensors.safe_open(path, "pt") as reader:
                about = reader.metadata() or {}
                state = {k: reader.get_tensor(k) for k in reader.keys()}  # noqa: SIM118  not a dict
        for key in ("net", "vote", "classes", "shape"):
            about[key]
        return state, about
    except Exception as error:  # torch and safetensors raise many kinds on foreign files
        raise _foreign(path, error) from None


def _foreign(path: str | Path, error: Exception) -> UsageError:
    missing = isinstance(error, KeyError)
    why = f"it says nothing of its {error.args[0]}" if missing else (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"{path} can't be read as an export of fastffl: {why}")


def _module(learner: Learner, vote: str) -> nn.Module:
    """The vote as a module: a peer's plain net, else the learner answering with that vote."""
    net = learner.plain(vote)
    return net.plain if net else OneVote(learner, vote)


def _unused(learner: Learner, vote: str) -> set[str]:
    """Names in the state that a vote does not depend on: the peers' classifiers, for FFL's fused; teachers and memories."""
    x = torch.zeros(2, learner.channels, learner.size, learner.size, device=next(learner.parameters()).device)
    parts = {"method"} if vote not in learner.graph.made else set()
    if learner.teacher is not None and (parts or not _taught(learner, vote, x)):
        parts.add("teacher")
    with torch.enable_grad():
        named = [(n, p) for n, p in learner.named_parameters(remove_duplicate=False) if p.requires_grad]
        grads = torch.autograd.grad(learner.votes(x)[vote].sum(), [p for _, p in named], allow_unused=True)
    unused = {n for (n, _), g in zip(named, grads, strict=True) if g is None}
    return unused | {n for n in learner.state_dict() if n.partition(".")[0] in parts}


@torch.no_grad()
def _taught(learner: Learner, vote: str, x: Tensor) -> bool:
    """Whether a vote changes with what the teacher says."""
    assert learner.teacher is not None
    want = learner.votes(x)[vote]

    def otherwise(module: nn.Module, args: Any, said: Peers) -> Peers:
        return said._replace(z=tuple(z + 1 + z.abs() for z in said.z), maps=tuple(f + 1 for f in said.maps))

    handle = learner.teacher.register_forward_hook(otherwise)
    try:
        return not torch.equal(learner.votes(x)[vote], want)
    finally:
        handle.remove()


def _state(learner: Learner, vote: str) -> dict[str, Tensor]:
    if learner.plain(vote):
        return _module(learner, vote).state_dict()
    unused = _unused(learner, vote)
    return {k: v for k, v in learner.state_dict().items() if k not in unused}


def _built(state: dict[str, Tensor], about: dict[str, str]) -> nn.Module:
    """A fresh module of an export's metadata with its state, which must fit exactly."""
    channels, size, _ = (int(n) for n in about["shape"].split(","))
    classes, vote = len(json.loads(about["classes"])), about["vote"]
    if about["net"] != vote:
        net = plain(about["net"], classes, channels, size)
        net.load_state_dict(state, strict=True)
        return net
    stored = json.loads(about["method"])
    config = methods.load(stored["name"]).Config.model_validate(stored)
    learner = Learner(
        about["nets"].split(","),
        config,
        classes=classes,
        channels=channels,
        size=size,
        share_stem=json.loads(about["shared"]),
        private=int(about.get("private", 1)),
        samples=int(about.get("samples", 0)),
    )
    keys = learner.eval().load_state_dict(state, strict=False)
    if keys.unexpected_keys or not set(keys.missing_keys) <= _unused(learner, vote):
        raise UsageError(f"the exported {vote} does not fit its nets: {[*keys.unexpected_keys, *keys.missing_keys][:3]}")
    return OneVote(learner, vote)


def _onnx(module: nn.Module, x: Tensor, about: dict[str, str]) -> tuple[bytes, float]:
    """ONNX bytes of a module and the largest logit difference of onnxruntime over two batch sizes."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f'--format onnx needs {error.name}: pip install "fastffl[onnx]"') from None
    program = torch.onnx.export(
        module,
        (x,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    data = proto.SerializeToString()
    onnx.checker.check_model(data)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    worst = 0.0
    for n in (1, len(x)):
        got = torch.from_numpy(session.run(None, {"images": x[:n].numpy()})[0])
        want = module(x[:n])
        off = float((got - want).abs().max())
        if off > ONNX_LIMIT * max(float(want.abs().max()), 1.0):
            raise FastFFLError(f"ONNX logits differ by {off:.1e} at batch {n} (limit {ONNX_LIMIT:g} of the largest): not written")
        worst = max(worst, off)
    return data, worst
