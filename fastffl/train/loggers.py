"""Rows sent on to TensorBoard or Weights & Biases, for those who ask; rows.jsonl is the record."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..recipe import Recipe

PACKAGES = {"tb": "tensorboard", "wandb": "wandb"}


def scalars(row: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by path: loss, terms/kl/fused>p0, val/fused/top1, ..."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{above}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{above}{key}", float(value)


class Loggers:
    """The recipe's loggers, opened. UsageError, with the command that helps, where a package is missing."""

    def __init__(self, recipe: Recipe, run: Path):
        self._rows: list[Callable[[dict[str, Any]], None]] = []
        self._ends: list[Callable[[], None]] = []
        for name in recipe.run.loggers:
            if importlib.util.find_spec(PACKAGES[name]) is None:
                raise UsageError(f'--set run.loggers={name} needs {PACKAGES[name]}: pip install "fastffl[{name}]"')
        for name in recipe.run.loggers:
            self._tensorboard(run) if name == "tb" else self._wandb(recipe, run)

    def _tensorboard(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(run / "tb")

        def send(row: dict[str, Any]) -> None:
            for key, value in scalars(row):
                writer.add_scalar(key, value, row["step"])
            writer.flush()

        self._rows.append(send)
        self._ends.append(writer.close)

    def _wandb(self, recipe: Recipe, run: Path) -> None:
        import wandb

        values = recipe.model_dump(mode="json")
        values["data"].pop("root")  # where the data lies on this machine is nobody else's business
        session = wandb.init(project="fastffl", name=run.name, dir=str(run), config=values)
        self._rows.append(lambda row: session.log(dict(scalars(row)), step=row["step"]))
        self._ends.append(session.finish)

    def row(self, row: dict[str, Any]) -> None:
        for send in self._rows:
            send(row)

    def close(self) -> None:
        for end in self._ends:
            end()
