"""report: tables and a page from run folders. `table(folders)` reads and checks them, `write` makes the files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UsageError, nearest
from ..train.checkpoint import write_file
from .page import page
from .table import Table as Table
from .table import table as table
from .text import comma_separated, latex
from .text import markdown as markdown

FORMATS: dict[str, tuple[str, Callable[[Table], str]]] = {
    "md": ("report.md", markdown),
    "latex": ("report.tex", latex),
    "html": ("report.html", page),
    "csv": ("report.csv", comma_separated),
}


def formats(text: str) -> list[str]:
    """`md,html` -> ["md", "html"]. UsageError with the nearest where there is no such format."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"--format {name}: there is no such format{nearest(name, FORMATS)}")
    return list(dict.fromkeys(names))


def write(made: Table, names: Sequence[str], folder: Path) -> list[Path]:
    """The files of these formats in `folder`, each whole or not at all. UsageError or DiskError where that can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't write into {folder}: {error.strerror}; choose another with --out DIR") from None
    paths = []
    for name in names:
        file, text = FORMATS[name]
        write_file(folder / file, text(made).encode())
        paths.append(folder / file)
    return paths
