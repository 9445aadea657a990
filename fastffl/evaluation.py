"""Score every vote of a learner on a split: top-1, top-5 and NLL, each sample counted once."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastffl_kernels import rank

from .data import Source
from .errors import DataError

if TYPE_CHECKING:
    from .train.learner import Learner


@torch.no_grad()
def evaluate(
    learner: "Learner", data: Source, split: str = "val", batch_size: int = 250, check: Callable[[], None] | None = None
) -> dict[str, dict[str, Any]]:
    """`{vote: {"top1": %, "top5": %, "nll": nats, "samples": n}}`; sums stay on the device, one host read at the end.

    check   called before every batch; may raise to stop
    """
    device = next(learner.parameters()).device
    votes = learner.graph.scored
    counts = torch.zeros(2, len(votes), dtype=torch.int64, device=device)
    nll = torch.zeros(len(votes), dtype=torch.float64, device=device)
    seen = 0
    was = learner.training
    learner.eval()
    try:
        for batch in data.evaluate(split, batch_size):
            if check:
                check()
            x, y = batch.x.to(device), batch.y.to(device)
            seen += len(y)
            for k, z in enumerate(learner.votes(x).values()):
                place = rank(z, y)
                counts[0, k] += (place < 1).sum()
                counts[1, k] += (place < 5).sum()
                nll[k] -= z.log_softmax(1).gather(1, y[:, None]).sum()
    finally:
        learner.train(was)
    if seen != data.samples(split):
        raise DataError(f"{data.name} {split} gave {seen} of {data.samples(split)} samples; refusing to report accuracy")
    share = (100 * counts / seen).tolist()
    loss = (nll / seen).tolist()
    return {v: {"top1": share[0][k], "top5": share[1][k], "nll": loss[k], "samples": seen} for k, v in enumerate(votes)}
