"""fastffl's kernels: each op is one file with its formula, its plain-torch reference and its public function."""

from ._dispatch import choice as choice
from ._dispatch import explain as explain
from ._dispatch import use as use
from ._launch import Norm as Norm
from .distill_graph import GraphEdge as GraphEdge
from .distill_graph import GraphOut as GraphOut
from .distill_graph import check_labels as check_labels
from .distill_graph import distill_graph as distill_graph
from .distill_graph import distill_graph_reference as distill_graph_reference
from .distill_graph import rank as rank
