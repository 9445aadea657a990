"""A recipe: one frozen, validated value that says everything about a run; typed changes to it, and JSON both ways."""

import json
import math
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from .errors import UsageError, nearest, printable


class Section(BaseModel):
    """One part of a recipe. Frozen; unknown fields are errors; a field's docstring is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Share = Annotated[float, Field(gt=0, le=1)]
Triple = tuple[float, ...]
Spread = tuple[Annotated[float, Field(gt=0)], ...]


class Data(Section):
    name: Literal["digits", "cifar10", "cifar100", "folder", "imagenet", "imagenette", "synthetic", "custom"]
    """the data set; folder: any tree of class folders or tar shards; custom: a Source given from Python"""
    root: str | None = None
    """folder that holds it (`--data DIR`); digits and synthetic need none"""
    loader: Literal["auto", "dali", "torchvision", "synthetic"] = "auto"
    """who decodes image files; auto: DALI where it and CUDA are, else torchvision. On a CPU both give the same pixels, DALI
    sooner. synthetic replaces the images by random ones of the same shape: separates the loader from the compute"""
    batch_size: int = Field(128, ge=1, le=2**24)
    """samples per optimizer step, over all ranks and accumulation steps"""
    eval_batch_size: int = Field(250, ge=1, le=2**24)
    """samples per evaluation batch"""
    train_fraction: Share = 1.0
    """share of the training images of every class that is used"""
    val_fraction: float = Field(0.0, ge=0, lt=1)
    """share of the training images of every class held out as `val`; 0: the test set also serves as `val`"""
    pad: int | None = Field(None, ge=0, le=1024)
    """pixels added on each side before the random crop; None: the data set's own (CIFAR 4, digits 1)"""
    pad_mode: Literal["reflect", "zero"] | None = None
    """what the padding shows; None: the data set's own (CIFAR reflect, digits zero)"""
    flip: bool | None = None
    """mirror half of the training images left to right; None: the data set's own (digits: no)"""
    mean: Triple | None = None
    """per-channel mean in [0, 1]; None: the data set's own"""
    std: Spread | None = None
    """per-channel standard deviation in [0, 1]; None: the data set's own"""
    size: int | None = Field(None, ge=4, le=8192)
    """side of the square images, pixels; None: the data set's own (folder: 224)"""
    classes: int | None = Field(None, ge=1, le=2**20)
    """synthetic only: number of classes"""
    samples: int = Field(1024, ge=1, le=2**24)
    """synthetic only: number of training images (a quarter as many test images)"""
    workers: int | None = Field(None, ge=0, le=1024)
    """processes (torchvision) or threads (DALI) that decode images, per rank; None: one per core but one"""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """share of an image's area that a random crop covers (image files)"""
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (3 / 4, 4 / 3)
    """width by height of a random crop (image files)"""
    crop: Share = 224 / 256
    """side of the central crop of evaluation by the image's shorter side (image files)"""
    start_size: int | None = Field(None, ge=4, le=8192)
    """progressive resizing: side of the training images in the first epoch; None: `size` throughout (image files)"""
    grow_epochs: int = Field(0, ge=0)
    """progressive resizing: epochs in which the side rises to `size`, in steps of 32"""
    rand_augment: int = Field(0, ge=0, le=8)
    """RandAugment: operations per image; 0: none (image files)"""
    rand_magnitude: int = Field(9, ge=0, le=30)
    """RandAugment: strength of them, of 30"""
    mixup: float = Field(0.0, ge=0, le=8)
    """alpha of mixup, one draw a batch, the same for all peers; 0: none"""
    cutmix: float = Field(0.0, ge=0, le=8)
    """alpha of cutmix; with mixup too, every other batch by chance; 0: none"""
    smoothing: float = Field(0.0, ge=0, lt=1)
    """label smoothing: share of a label that is spread over all classes"""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01
    """share of the training images that may be unreadable, each named and given no label, before training stops"""
    checked: str | None = None
    """folder that `fastffl data check --out` wrote; None: ROOT/.fastffl, where there is one"""


class Nets(Section):
    names: tuple[str, ...] = Field(min_length=1)
    """the peers, by name: this package's CIFAR nets or any timm model"""
    share_stem: bool | None = None
    """one stem for all peers; None: as the method has it, where the architectures are equal"""
    private: int | None = Field(None, ge=1, le=64)
    """last stages that each peer has of its own where the stem is shared; None: as the method has it, for most 1"""
    pretrained: bool = False
    """start timm models from their published weights"""


class MethodConfig(Section):
    """Settings of a method; each method's own class adds its fields, with the paper's defaults."""

    name: str
    """the method"""


class Optim(Section):
    name: Literal["sgd", "adamw", "lamb"] = "sgd"
    """the optimizer; lamb needs impl=apex"""
    impl: Literal["auto", "torch", "apex"] = "auto"
    """whose: auto is ours (flat, one launch) on a GPU and torch's on a CPU; apex is NVIDIA's FusedSGD, FusedAdam or FusedLAMB"""
    lr: float = Field(0.1, gt=0)
    """learning rate after warm-up"""
    lr_batch: int | None = Field(None, ge=1)
    """batch size that `lr` is meant for: the rate grows linearly with data.batch_size (Goyal et al. 2017); None: lr as it is"""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum"""
    nesterov: bool = True
    """SGD's Nesterov form"""
    weight_decay: float = Field(1e-4, ge=0)
    """decay of the peers' weights; a method may set its own for its own modules"""
    decay_norm_bias: bool = True
    """whether norm weights and biases decay too (as the papers' code does)"""
    clip: float | None = Field(None, gt=0)
    """largest norm of the whole gradient; None: not clipped"""
    accum: int = Field(1, ge=1)
    """forward-backward passes per optimizer step"""


class Sched(Section):
    name: Literal["step", "cosine", "constant"] = "step"
    """shape of the learning rate over the epochs"""
    epochs: int = Field(300, ge=1)
    """passes over the training set"""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """where `step` multiplies the rate by gamma: below 1 a share of the epochs, else an epoch (0-based)"""
    gamma: float = Field(0.1, gt=0, le=1)
    """factor of `step`"""
    warmup_epochs: float = Field(0.0, ge=0)
    """epochs in which the rate rises linearly from 0"""
    min_lr: float = Field(0.0, ge=0)
    """where `cosine` ends"""
    ramp_epochs: int | None = Field(None, ge=0)
    """R of the distillation ramp w(e) = exp(-5 (1 - e/R)^2); 0: none; None: 80/300 of the epochs"""

    @property
    def ramp(self) -> int:
        """R, epochs."""
        return round(self.epochs * 80 / 300) if self.ramp_epochs is None else self.ramp_epochs


class Amp(Section):
    enabled: bool = False
    """mixed precision (`--amp`)"""
    dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device has it, else fp16 with a gradient scaler"""


class Ema(Section):
    decay: float = Field(0.0, ge=0, lt=1)
    """decay of a moving average of all weights, which is then what is evaluated and exported; 0: none"""


class Run(Section):
    seed: int = Field(0, ge=0, lt=2**63)
    """initialisation, order and augmentation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads; None: torch's own choice. Other thread counts round differently"""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """layout of the images and weights; auto: channels_last on CUDA and on CPUs with AMX"""
    max_steps: int | None = Field(None, ge=1)
    """stop after so many optimizer steps; None: after the last epoch"""
    log_every: int = Field(50, ge=1)
    """steps between two reads of the device's meters"""
    graph: Literal["auto", "off"] = "auto"
    """auto: on CUDA the whole step is captured as one graph, where that is possible; off: operation by operation"""
    streams: Literal["auto", "on", "off"] = "auto"
    """peers side by side inside the graph; auto: measured against one after the other, the faster is kept"""
    sync_bn: bool = False
    """batch norm over the samples of all ranks; off: over a rank's own, running statistics averaged once per epoch"""
    watch: float = Field(20.0, ge=1, le=3600)
    """seconds after which a rank that is not heard of, or that keeps the others waiting, is named and the run ended"""
    loggers: tuple[Literal["tb", "wandb"], ...] = ()
    """also send every row to TensorBoard (RUN/tb) or Weights & Biases"""
    save_every: int = Field(1, ge=1)
    """epochs between two checkpoints"""
    eval_every: int = Field(1, ge=1)
    """epochs between two evaluations; the last epoch is always evaluated"""


class Recipe(Section):
    """Everything that decides what a run computes. Build one with `fastffl.recipes.load(name)`."""

    name: str = Field(min_length=1, max_length=100)
    """also the run folder's name, so without a slash, a leading dot or control characters"""
    summary: str = ""
    source: str = ""
    """where its values come from"""
    expect: str = ""
    """published result and its source, or "not reproduced" """
    data: Data
    nets: Nets
    method: SerializeAsAny[MethodConfig]
    optim: Optim = Optim()
    sched: Sched = Sched()
    amp: Amp = Amp()
    ema: Ema = Ema()
    run: Run = Run()

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        if self.name.startswith(".") or printable(self.name) != self.name or "/" in self.name or "\\" in self.name:
            raise ValueError(f"name {self.name!r} can't name a folder")
        if self.optim.accum > self.data.batch_size:
            raise ValueError(f"optim.accum {self.optim.accum} is more than data.batch_size {self.data.batch_size}")
        for key, pair in (("scale", self.data.scale), ("ratio", self.data.ratio)):
            if pair[0] > pair[1]:
                raise ValueError(f"data.{key} {pair[0]:g},{pair[1]:g}: the first must not be above the second")
        if self.optim.name == "lamb" and self.optim.impl != "apex":
            raise ValueError("optim.name lamb needs --set optim.impl=apex, given before it")
        return self

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, scaled to the batch."""
        return self.optim.lr * (self.data.batch_size / self.optim.lr_batch if self.optim.lr_batch else 1)

    def json_text(self) -> str:
        """The recipe as JSON; `fastffl.recipes.read` brings it back."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


SECTIONS = ("data", "nets", "method", "optim", "sched", "amp", "ema", "run")

# What may differ between a checkpoint and the recipe that resumes it. Another device or thread count rounds differently, so
# such a run goes on but does not end in the same bits; the rest changes nothing that is computed.
FREE = {
    "run.device",
    "run.max_steps",
    "run.log_every",
    "run.loggers",
    "run.save_every",
    "run.threads",
    "run.graph",
    "run.streams",
    "run.watch",
    "data.root",
    "data.workers",
    "data.checked",
    "data.max_bad",
    "method.teachers",
}


def fields(stored: dict[str, Any]) -> dict[str, Any]:
    """Every settable value of a recipe (as `model_dump(mode="json")` gives it) by its dotted path."""
    return {f"{s}.{k}": v for s in SECTIONS for k, v in stored.get(s, {}).items()}


def differences(old: dict[str, Any], new: Recipe) -> list[str]:
    """`optim.lr 0.1 -> 0.2` for every value that decides what is computed and is not the same in both.

    `old` is a stored recipe; a field that one of the two versions does not know is not compared.
    """
    a, b = fields(old), fields(new.model_dump(mode="json"))
    if a.get("method.name") != b["method.name"]:
        return [f"method {a.get('method.name')} -> {b['method.name']}"]
    return [f"{k} {a[k]} -> {b[k]}" for k in sorted(a.keys() & b.keys()) if k not in FREE and a[k] != b[k]]


def _kind(annotation: Any) -> str:
    """A field's type in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _kind(args[0])
    if origin is Literal:
        return " or ".join(str(a) for a in args)
    if origin is tuple:
        return f"{_kind(args[0])}, {_kind(args[0])}, ..."
    if args:  # X | None
        return " or ".join(_kind(a) for a in args)
    return {"NoneType": "none", "str": "text", "bool": "true or false"}.get(annotation.__name__, annotation.__name__)


def _help(section: Section, key: str) -> str:
    """`float > 0, now 0.1` for a field of a section."""
    info = type(section).model_fields[key]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    metadata = list(info.metadata)
    for part in (info.annotation, *typing.get_args(info.annotation)):
        if typing.get_origin(part) is Annotated:
            metadata += [m for f in typing.get_args(part)[1:] for m in getattr(f, "metadata", [f])]
    bounds = [f"{s} {getattr(m, a)}" for m in metadata for a, s in signs.items() if hasattr(m, a)]
    now = getattr(section, key)
    shown = ",".join(map(str, now)) if isinstance(now, tuple) else str(now).lower() if now in (None, True, False) else now
    return f"{_kind(info.annotation)}{' ' + ' and '.join(bounds) if bounds else ''}, now {shown}"


def _parse(text: str, annotation: Any) -> Any:
    """The value a user typed, before pydantic checks it."""
    if text.lower() in ("none", "null"):
        return None
    args = (annotation, *typing.get_args(annotation))
    if any(typing.get_origin(a) is tuple for a in args) and not text.startswith("["):
        return [t.strip() for t in text.split(",") if t.strip()]
    if str in args:
        return text  # a folder may be called 2024
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return text if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)) else value


def change(recipe: Recipe, path: str, value: Any) -> Recipe:
    """The recipe with one value changed: `change(r, "optim.lr", "0.2")`. Text is read as the field's type.

    UsageError names the nearest known path, or the type and bounds the value misses.
    """
    section, _, key = path.partition(".")
    if section not in SECTIONS or key not in type(getattr(recipe, section)).model_fields:
        known = list(fields(recipe.model_dump(mode="json")))
        leaf = [k for k in known if k.split(".", 1)[1] == path]  # the section left out
        hint = f"; did you mean {leaf[0]}?" if leaf else nearest(path, known)
        if "did you mean" in hint:
            found = hint.removeprefix("; did you mean ").rstrip("?")
            s, k = found.split(".", 1)
            hint = f"; did you mean {found} ({_help(getattr(recipe, s), k)})?"
        raise UsageError(f"unknown option --set {path}{hint}")
    part = getattr(recipe, section)
    if section == "method" and key == "name":
        raise UsageError(f"--set method.name={value}: choose the method with --method {value}")
    annotation = type(part).model_fields[key].annotation
    parsed = _parse(value, annotation) if isinstance(value, str) else value
    try:
        new = type(part).model_validate({**part.model_dump(), key: parsed})
        return Recipe.model_validate({**dict(recipe), section: new})
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"--set {path}={value}: {why[0].lower()}{why[1:]}; expected {_help(part, key)}") from None
