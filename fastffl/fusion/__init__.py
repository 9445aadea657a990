"""Modules that make one prediction out of K peers, or bring one net's maps into another's space."""

from .attend import Attend as Attend
from .attend import Decoder as Decoder
from .attend import DualAttention as DualAttention
from .attend import MultiScale as MultiScale
from .attend import pooled as pooled
from .conv import ALIGNMENTS as ALIGNMENTS
from .conv import ConvFusion as ConvFusion
from .conv import MeanFusion as MeanFusion
from .conv import drawn as drawn
from .gate import Gate as Gate
from .transfer import Discriminator as Discriminator
from .transfer import adapter as adapter
from .transfer import apart as apart
from .transfer import attention as attention
from .transfer import flipped as flipped
from .transfer import sized as sized
from .transfer import transfer as transfer
from .transfer import translator as translator
from .transfer import unit as unit
