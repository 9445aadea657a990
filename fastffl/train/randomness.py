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
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "python_gauss": random.getstate()[2],
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [int(at), int(has), float(cached)],
    }


def seed_all(seed: int) -> None:
    """Start every generator of a new run from one seed."""
    torch.manual_seed(mix(seed, 1))
    random.seed(mix(seed, 2))
    np.random.seed(mix(seed, 3) & 0xFFFFFFFF)


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    random.setstate((3, tuple(state["python"].tolist()), state["python_gauss"]))
    at, has, cached = state["numpy_rest"]
    np.random.set_state(("MT19937", state["numpy"].cpu().numpy().astype(np.uint32), at, has, cached))
