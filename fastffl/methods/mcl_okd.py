"""mcl-okd: branches are views of an image; each one's embedding must find the image in the others' memory among other classes'.

    L = g sum_k CE(z_k) + a T^2 KL(p_T(mean z) || p_T(z_0)) + b sum_{j != k} NCE(V_j, v_k)      g = a = 1, b = 0.025, T = 3
    v_k = unit(W_k GAP(F_k))      V_k: what v_k was for every training image, moved by half after each step
The main branch, p0, is taught by the mean of all and shipped. NCE, its negatives and the memories: fastffl_kernels.nce.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fastffl_kernels.nce import IGNORE, Classes, class_order, nce, remember

from ..errors import UsageError
from ..fusion import pooled
from ..recipe import MethodConfig
from ..values import CohortSpec, Edge, Graph, Needs, Peers
from ._base import Method, Terms


class MCLOKD(Method):
    name = "mcl-okd"
    min_peers = 2
    stem = "shared"
    share = True
    banks: Tensor
    counter: Tensor

    class Config(MethodConfig):
        name: Literal["mcl-okd"] = "mcl-okd"
        T: float = Field(3.0, gt=0)
        """temperature of the main branch's distillation"""
        soft: float = Field(1.0, ge=0)
        """a, weight of it"""
        contrast: float = Field(0.025, ge=0)
        """b, weight of the contrastive term"""
        negatives: int = Field(256, ge=1, le=2**20)
        """images of other classes that each is told from (16384 for wide nets and ImageNet)"""
        tau: float = Field(0.1, ge=0.02)
        """temperature of the contrastive term (ImageNet: 0.07)"""
        width: int = Field(128, ge=1, le=2048)
        """numbers of an embedding"""
        keep: float = Field(0.5, ge=0, le=1)
        """share of a memory that a step keeps"""

    def __init__(self, config: Config, spec: CohortSpec):
        super().__init__(config, spec)
        if not spec.samples:
            raise UsageError(
                "method mcl-okd remembers every training image and has to know how many ids there are: give "
                "Learner(..., samples=len(data.labels)), of a data set that has its labels"
            )
        self.config, p = config, spec.peers
        self.embed = nn.ModuleList([nn.Linear(m.channels, config.width) for m in spec.maps])
        bound = (3 / config.width) ** 0.5
        self.register_buffer("banks", torch.empty(len(p), spec.samples, config.width).uniform_(-bound, bound))
        self.register_buffer("counter", torch.randint(2**40, ()))  # other seeds draw other negatives
        for part in ("order", "start", "count"):  # of the data, not of the run
            self.register_buffer(part, torch.zeros(0, dtype=torch.int64), persistent=False)
        self.graph = Graph(
            peers=p,
            means={"mean": p},
            hard=dict.fromkeys(p, 1.0),
            edges=(Edge("mean", p[0], config.T, weight=config.soft, ramp=False),),
            extra={"nce": config.contrast},
            votes=(*p, "mean"),
        )
        self.classes = spec.classes

    @classmethod
    def needs(cls, config: Config, nets: tuple[str, ...]) -> Needs:
        return Needs(private=2, ids=True, unmixed=True)

    def prepare(self, labels: Tensor | None) -> None:
        if labels is None or len(labels) != self.banks.shape[1]:
            have = "none" if labels is None else f"{len(labels):,}"
            raise UsageError(f"method mcl-okd draws negatives by label: {have} are known of {self.banks.shape[1]:,} images")
        known = labels.to(self.banks.device)
        found = class_order(torch.where(known < 0, IGNORE, known), self.classes)
        self.order, self.start, self.count = found

    def extra(self, peers: Peers, y: Tensor, ids: Tensor | None) -> Terms:
        assert ids is not None
        v = torch.stack([F.normalize(w(pooled(f)).float(), dim=1) for w, f in zip(self.embed, peers.maps, strict=True)])
        classes, c = Classes(self.order, self.start, self.count), self.config
        found = nce(self.banks, v, ids, y, classes, self.counter, count=c.negatives, tau=c.tau)
        return Terms({"nce": found.loss}, kept=(v.detach().transpose(0, 1),))

    def after_step(self, kept: Sequence[Tensor], y: Tensor, ids: Tensor, ok: Tensor) -> None:
        remember(self.banks, kept[0].transpose(0, 1), ids, y, keep=self.config.keep, ok=ok)
        self.counter += ok
