"""fastffl's kernels: each op is one file with its formula, its plain-torch reference and its public function.

The device code lies in `jit/`, which imports triton only; `_dispatch` decides between Triton and the reference.
"""

from ._dispatch import choice as choice
from ._dispatch import explain as explain
from ._dispatch import use as use
from ._launch import Norm as Norm
from .augment import Augmented as Augmented
from .augment import augment as augment
from .augment import augment_reference as augment_reference
from .bn_act import bn_act as bn_act
from .bn_act import bn_act_reference as bn_act_reference
from .distill_graph import GraphEdge as GraphEdge
from .distill_graph import GraphOut as GraphOut
from .distill_graph import check_labels as check_labels
from .distill_graph import distill_graph as distill_graph
from .distill_graph import distill_graph_reference as distill_graph_reference
from .distill_graph import rank as rank
from .fuse_conv import fuse_conv as fuse_conv
from .fuse_conv import fuse_conv_reference as fuse_conv_reference
from .fuse_conv import plan_table as plan_table
from .guard import GuardState as GuardState
from .guard import Verdict as Verdict
from .guard import guard as guard
from .guard import guard_reference as guard_reference
from .nce import Classes as Classes
from .nce import NceOut as NceOut
from .nce import class_order as class_order
from .nce import nce as nce
from .nce import nce_reference as nce_reference
from .nce import negatives as negatives
from .nce import remember as remember
from .sgd_flat import FlatParameters as FlatParameters
from .sgd_flat import FlatSGD as FlatSGD
from .sgd_flat import sgd_flat as sgd_flat
from .sgd_flat import sgd_flat_reference as sgd_flat_reference
