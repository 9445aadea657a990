"""Data sets as Sources of batches."""

from .resident import Arrays as Arrays
from .resident import Resident as Resident
from .source import Place as Place
from .source import Source as Source
from .source import ids as ids
from .source import source as source
