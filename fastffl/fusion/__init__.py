"""Modules that make one prediction out of K peers."""

from .conv import ALIGNMENTS as ALIGNMENTS
from .conv import ConvFusion as ConvFusion
from .conv import MeanFusion as MeanFusion
from .gate import Gate as Gate
