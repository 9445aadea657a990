"""The authors' code (github Jangho-Kim/FFL-pytorch), imported from a checkout: its step, its weights under our names, its loader.

None of it is copied: nets, fusion module and loss are theirs; the order of a step and the constants of the loader are facts.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import recipes
from ..errors import UsageError
from ..recipe import change
from ..train import Learner, optim
from ..train.step import Step
from ..values import Batch

PARITY_STEPS = 3
MEAN = [x / 255.0 for x in (129.3, 124.1, 112.4)]  # the constants of the official loader
STD = [x / 255.0 for x in (68.2, 65.4, 70.4)]
WORKERS = min(4, len(os.sched_getaffinity(0)))  # of the official loader: 4; more than there are cores only slow it down


def module(folder: Path, name: str) -> ModuleType:
    """Import one file of the authors' checkout. UsageError where it is not there."""
    spec = importlib.util.spec_from_file_location(f"official_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None or not (folder / f"{name}.py").is_file():
        raise UsageError(f"--official {folder} has no {name}.py; expected a checkout of Jangho-Kim/FFL-pytorch")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@contextlib.contextmanager
def cuda_is_here() -> Iterator[None]:
    """The authors' loss calls .cuda() without asking; without a GPU that is made a no-op while it runs."""
    if torch.cuda.is_available():
        yield
        return
    real = Tensor.cuda
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cuda = real  # type: ignore[method-assign]


class Official:
    """The authors' nets, loss and optimizers in the step their script takes, host reads included."""

    def __init__(self, folder: Path, depth: int, device: torch.device):
        nets, self.utils = module(folder, "our_network"), module(folder, "utils")
        self.net = nets.ffl_resnet(num_classes=100, depth=depth).to(device)
        self.fusion = nets.Fusion_module(64, 100, 8).to(device)
        sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
        self.optims = [
            torch.optim.SGD(self.net.parameters(), weight_decay=1e-4, **sgd),
            torch.optim.SGD(self.fusion.parameters(), weight_decay=1e-5, **sgd),
        ]
        self.ce, self.kl, self.w = torch.nn.CrossEntropyLoss(), self.utils.KLLoss(), 0.5
        self.correct = [0.0, 0.0, 0.0]

    def step(self, x: Tensor, y: Tensor) -> float:
        for o in self.optims:
            o.zero_grad()
        with cuda_is_here():
            z1, z2, maps = self.net(x)
            u = self.fusion(maps[0], maps[1])
            labels = self.ce(z1, y) + self.ce(z2, y) + self.ce(u, y)
            loss = labels + self.w * (self.kl(z1, u) + self.kl(z2, u) + self.kl(u, (z1 + z2) / 2))
        loss.backward()
        for o in self.optims:
            o.step()
        for k, z in enumerate((z1, z2, u)):
            self.correct[k] += z.data.max(1)[1].eq(y.data).cpu().sum().float().item()
        return loss.item()

    def take(self, weights: dict[str, Any]) -> None:
        """Load the weights of a learner of the same nets."""
        back = names(self.net.state_dict(), self.fusion.state_dict())
        for own, ours in back.items():
            part, _, key = own.partition(":")
            target = (self.net if part == "net" else self.fusion).state_dict()[key]
            target.copy_(weights[ours])

    def set(self, rate: float, ramp: float) -> None:
        self.w = ramp
        for o in self.optims:
            for group in o.param_groups:
                group["lr"] = rate


def names(net: dict[str, Any], fusion: dict[str, Any]) -> dict[str, str]:
    """`net:KEY` and `fusion:KEY` of the authors' weights -> this package's name (of one peer where the stem is shared)."""
    made: dict[str, str] = {}
    for key in net:
        made[f"net:{key}"] = f"cohort.p0.plain.{key}"
        for k in (1, 2):
            if key.startswith((f"layer3_{k}", f"classfier3_{k}")):
                tail = key.replace(f"layer3_{k}", "layer3").replace(f"classfier3_{k}", "fc")
                made[f"net:{key}"] = f"cohort.p{k - 1}.plain.{tail}"
    parts = {"conv1": "dw", "bn1": "bn1", "conv1_1": "pw", "bn1_1": "bn2", "fc2": "fc"}
    for key in fusion:
        head, _, rest = key.partition(".")
        made[f"fusion:{key}"] = f"method.fuse.{parts[head]}.{rest}"
    return made


def renamed(net: dict[str, Any], fusion: dict[str, Any]) -> dict[str, Any]:
    """The authors' weights under this package's names (methods-core section 5); a shared stem stands under both peers."""
    both = {f"net:{k}": v for k, v in net.items()} | {f"fusion:{k}": v for k, v in fusion.items()}
    made = {ours: both[own] for own, ours in names(net, fusion).items()}
    stem = {k: v for k, v in net.items() if not k.startswith(("layer3_", "classfier3_"))}
    return made | {f"cohort.p1.plain.{key}": value for key, value in stem.items()}


def parity(folder: Path, depth: int) -> float:
    """Largest relative difference of the two sides' losses over PARITY_STEPS updates in float64: rounding only, if equal."""
    recipe = change(recipes.load("ffl-cifar100-resnet32"), "nets.names", f"resnet{depth},resnet{depth}")
    recipe = change(change(recipe, "run.memory_format", "contiguous"), "run.device", "cpu")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 32, 32, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 100, (16,), generator=generator)
    official = Official(folder, depth, torch.device("cpu"))
    official.net.double()
    official.fusion.double()
    learner = Learner.build(recipe, 100, 3, 32).double()
    learner.load_state_dict(renamed(official.net.state_dict(), official.fusion.state_dict()))
    step, worst = Step(learner, optim.build(learner, recipe.optim), recipe, torch.device("cpu")), 0.0
    step.ramp(0.5)
    for _ in range(PARITY_STEPS):
        want = official.step(x, y)
        step(Batch(x, y, y))
        worst = max(worst, abs(float(step.meters.read()["loss"]) - want) / abs(want))
        step.meters.clear()
    return worst


class Pictures(Dataset[tuple[Tensor, int]]):
    """uint8 images (N, 3, 32, 32) as the PIL pictures the official loader starts from, and its transforms."""

    def __init__(self, images: Tensor, labels: Tensor):
        from torchvision import transforms

        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.Pad(4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32),
                transforms.ToTensor(),
                transforms.Normalize(mean=MEAN, std=STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[at])), self.labels[at]


def loader(images: Tensor, labels: Tensor, batch: int) -> DataLoader[tuple[Tensor, int]]:
    """The official loader over these images: shuffled, its workers start anew with every epoch."""
    return DataLoader(Pictures(images, labels), batch_size=batch, shuffle=True, num_workers=WORKERS)
