"""augment the slow way, a sample at a time in float64, by Python integers and torch's padding: what its tests compare with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastffl_kernels._draws import below, uniform_bits
from fastffl_kernels.augment import beta_quantiles


def drawn(seed: int, epoch: int, id: int, stream: int, n: int) -> int:
    return int(below(uniform_bits(seed, epoch, torch.tensor([id]), stream), n))


def one(image: Tensor, seed: int, epoch: int, id: int, view: int, o: dict[str, Any]) -> Tensor:
    """One view of one image (D, S, S) uint8 -> (D, size, size) float64."""
    size, pad, stream = o["size"], o["pad"], 16 * view
    mode = "reflect" if o["pad_mode"] == "reflect" else "constant"
    big = F.pad(image[None].double(), (pad,) * 4, mode)[0] if pad else image.double()
    span = big.shape[1] - size + 1
    top, left = drawn(seed, epoch, id, stream, span), drawn(seed, epoch, id, stream + 1, span)
    cut = big[:, top : top + size, left : left + size]
    if o["flip"] and drawn(seed, epoch, id, stream + 2, 2) == 0:
        cut = cut.flip(2)
    mean, std = (torch.tensor(o[k], dtype=torch.float64)[:, None, None] for k in ("mean", "std"))
    cut = (cut / 255 - mean) / std
    if o["cutout"]:
        i, j = (drawn(seed, epoch, id, stream + k, size) - o["cutout"] // 2 for k in (3, 4))
        cut[:, max(i, 0) : max(i + o["cutout"], 0), max(j, 0) : max(j + o["cutout"], 0)] = 0
    return cut


def batch(images: Tensor, ids: list[int], seed: int, epoch: int, o: dict[str, Any]) -> tuple[Tensor, float | None]:
    """(V, B, D, size, size) float64 and the share of the sample's own label, None where nothing is mixed."""
    size, B = o["size"], len(ids)
    x = torch.zeros(o["views"], B, images.shape[1], size, size, dtype=torch.float64)
    for v in range(o["views"]):
        for b, id in enumerate(ids):
            x[v, b] = one(images[id], seed, epoch, id, v, o) if 0 <= id < len(images) else float("nan")
    if not (o["mixup"] or o["cutmix"]):
        return x, None
    if not B:
        return x, 1.0
    k = drawn(seed, epoch, ids[0], 5, 4096)
    if o["cutmix"] and (not o["mixup"] or drawn(seed, epoch, ids[0], 8, 2) == 0):
        side = int(size * (1 - beta_quantiles(o["cutmix"])[k]).sqrt())
        y, z = drawn(seed, epoch, ids[0], 6, size), drawn(seed, epoch, ids[0], 7, size)
        box = (..., slice(max(y - side // 2, 0), y + side // 2), slice(max(z - side // 2, 0), z + side // 2))
        mixed = x.clone()
        mixed[box] = x.flip(1)[box]
        broken = x.isnan().flatten(2).any(2) | x.isnan().flatten(2).any(2).flip(1)
        mixed[broken] = float("nan")
        return mixed, 1 - x[0, 0, 0][box[1:]].numel() / size**2
    share = float(beta_quantiles(o["mixup"])[k])
    return share * x + (1 - share) * x.flip(1), share


def options(r: Any, S: int, D: int, pad: int, size: int) -> dict[str, Any]:
    """Random options of `augment`: a fifth of the batches are asked to be mixed, a third is cut out."""
    mixed = r.random() < 0.2
    return {
        **{"size": size, "pad": pad, "pad_mode": r.choice(["reflect", "zero"]), "flip": r.random() < 0.7},
        **{"mean": [r.uniform(0.3, 0.6) for _ in range(D)], "std": [r.uniform(0.2, 0.4) for _ in range(D)]},
        **{"views": r.choice([1, 1, 1, 2]), "cutout": r.choice([0, 0, r.randint(1, 2 * S)])},
        **{"mixup": r.choice([0, 0.2, 1.0]) if mixed else 0, "cutmix": r.choice([0, 1.0, 2.0]) if mixed else 0},
        **{"channels_last": r.random() < 0.5, "dtype": r.choice([torch.float32, torch.bfloat16, torch.float16])},
    }
