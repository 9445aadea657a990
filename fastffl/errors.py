"""What fastffl raises for its users: one sentence each (what came, what was expected, what to type) and an exit code."""

import difflib
import re
from collections.abc import Iterable


class FastFFLError(Exception):
    """Something the user can act on; the command line prints it as `error: ...` without a traceback."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What an error of someone else's code says, on one line of bearable length."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class UsageError(FastFFLError):
    """A flag, recipe, method, model or folder that can't be used."""

    exit_code = 2


class DataError(FastFFLError):
    """A data set that can't be used: missing, damaged, or not what the recipe expects."""

    exit_code = 2


class CheckpointError(FastFFLError):
    """A checkpoint that can't be used: damaged, foreign, or of another recipe."""

    exit_code = 2


class DiskError(FastFFLError):
    """A checkpoint or log that could not be written; what was written before is intact."""


class NumericsError(FastFFLError):
    """Training met non-finite numbers for too long; the weights are those of the last finite step."""


class RankError(FastFFLError):
    """Another process of the run died, stopped, failed or computed something else; the text names it."""


class ThresholdError(FastFFLError):
    """A result below what `--expect` asked for."""

    exit_code = 3


class Interrupted(FastFFLError):
    """SIGINT or SIGTERM: everything is saved, the same command goes on from there."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    """Text on one line: control, direction and invisible characters, and bytes that are not UTF-8, shown as escapes.

    A file name then can't forge a line of a log, and nothing fails to print.
    """
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known word, or the known words when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; known: {shown}" if names else ""
