"""The random-number generators of a run: torch, NumPy, Python."""

import random
from typing import Any

import numpy as np
import torch

from ..data.rng import mix


def rng_state() -> dict[str, Any]:
    """Every random-number state a resumed run needs, as tensors and scalars."""
    kind, keys, at, has, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of this process's device
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "python_gauss": random.getstate()[2],
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [int(at), int(has), float(cached)],
    }


def seed_all(seed: int, rank: int = 0) -> None:
    """Start every generator of a new run from one seed, different ones on every rank."""
    if rank:
        seed = mix(seed, rank, 0x7A6B)
    torch.manual_seed(mix(seed, 1))
    random.seed(mix(seed, 2))
    np.random.seed(mix(seed, 3) & 0xFFFFFFFF)


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())
    random.setstate((3, tuple(state["python"].tolist()), state["python_gauss"]))
    at, has, cached = state["numpy_rest"]
    np.random.set_state(("MT19937", state["numpy"].cpu().numpy().astype(np.uint32), at, has, cached))
