"""manifest: which image files a folder holds, of which class; the one class map of a run.

Two layouts: ROOT/train/CLASS/IMAGE.jpg, and tar shards (`shards.py`). What `fastffl data check` found unusable is left out.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, overload

from ..errors import DataError, printable
from .rng import mix

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
HELD = ("val", "validation", "valid", "test")  # what the folder of a split next to `train` may be called
CHECKED, EXCLUDE = ".fastffl", "exclude.txt"  # where a check leaves what it found


class Names(Sequence[str]):
    """Strings in one block of bytes. ImageNet's 1.28 million names take 48 MB and not 115, and forked loader processes share
    them: reading a str writes its reference count, and so copies its page into every process."""

    __slots__ = ("_blob", "_ends")

    def __init__(self, names: Iterable[str]):
        blob, ends = bytearray(), array("q", [0])
        for name in names:
            blob += os.fsencode(name)
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, k: int) -> str: ...

    @overload
    def __getitem__(self, k: slice) -> tuple[str, ...]: ...

    def __getitem__(self, k: int | slice) -> str | tuple[str, ...]:
        if isinstance(k, slice):
            return tuple(self[i] for i in range(*k.indices(len(self))))
        if not -len(self) <= k < len(self):
            raise IndexError(f"name {k} of {len(self)}")
        k %= len(self)
        return os.fsdecode(self._blob[self._ends[k] : self._ends[k + 1]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names) and (self._blob, self._ends) == (other._blob, other._ends)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Manifest:
    """Files of one split, paths relative to `root`, and the class of each.

    left_out: (CLASS/NAME, label) of the files that are there too, but that a check found unusable.
    """

    root: Path
    classes: tuple[str, ...]
    files: Sequence[str]
    labels: tuple[int, ...]
    left_out: tuple[tuple[str, int], ...] = ()

    @property
    def excluded(self) -> int:
        """How many files are left out."""
        return len(self.left_out)

    def read(self, k: int) -> bytes:
        """The bytes of file k. OSError where it can't be read. Any thread and any forked process may read."""
        return (self.root / self.files[k]).read_bytes()

    def path(self, k: int) -> str:
        """The name of file k, for people."""
        return f"{self.root}/{self.files[k]}"

    def key(self, k: int) -> str:
        """CLASS/NAME of file k."""
        return self.files[k]

    def part(self, keep: Sequence[int], left_out: tuple[tuple[str, int], ...] = ()) -> Self:
        """The manifest of files `keep`, in that order."""
        files, labels = Names(self.files[k] for k in keep), tuple(self.labels[k] for k in keep)
        return type(self)(self.root, self.classes, files, labels, left_out)


@dataclass(frozen=True)
class Splits:
    """The files of a folder's splits; `val` is None where the folder has one held-out set, which is `test` then."""

    train: Manifest
    val: Manifest | None
    test: Manifest

    @property
    def excluded(self) -> int:
        """Files left out of all splits because a check found them unusable."""
        return sum(m.excluded for m in (self.train, self.val, self.test) if m)


class Layout(NamedTuple):
    """Where the parts of a data set lie: a folder of class folders each, or tar shards, named relative to `top`.

    `train` without another part, or one part called "", has a tenth held out.
    """

    top: Path
    folders: dict[str, Path]
    shards: dict[str, tuple[str, ...]]


def shown(names: Sequence[str]) -> str:
    """The first five names, for a message."""
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, those that start with a dot left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[os.DirEntry[str]]:
    """What lies anywhere below `folder` and is no folder, names with a dot in front left out; links are followed, but not back
    into a folder they are in. No file is asked for its size: on a network file system that takes longer than all the rest."""
    here = os.stat(folder)  # noqa: PTH116
    key = (here.st_dev, here.st_ino)
    if key in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(entry.path, (*above, key))
            else:
                yield entry


def not_a_file(entry: os.DirEntry[str]) -> str | None:
    """Why an entry can't be read as a file, if so."""
    if entry.is_file():
        return None
    return "a link to nothing" if entry.is_symlink() and not Path(entry.path).exists() else "not a file"


def scan(folder: Path, excluded: frozenset[str] = frozenset()) -> Manifest:
    """Class folders with images anywhere below them; `excluded` are paths as `folder`/CLASS/NAME.

    DataError names empty classes and what can't be an image.
    """
    names: list[str] = []
    labels: list[int] = []
    gone: list[tuple[str, int]] = []
    empty = []
    start = len(str(folder)) + 1
    try:
        classes = tuple(subfolders(folder))
        for label, name in enumerate(classes):
            found = []
            for entry in walk(f"{folder}/{name}"):
                if not is_image(entry.name):
                    continue
                if entry.path in excluded:
                    gone.append((entry.path[start:], label))
                    continue
                why = not_a_file(entry)
                if why:
                    raise DataError(f"{entry.path} is {why}; expected an image: replace or remove it")
                found.append(entry.path[start:])
            if not found:
                empty.append(name)
            names += sorted(found)
            labels += [label] * len(found)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from None
    if not classes:
        raise DataError(f"{folder} holds no class folders; expected {folder}/CLASS/IMAGE.jpg")
    if empty:
        kinds = ", ".join(EXTENSIONS)
        besides = " that are not excluded" if gone else ""
        raise DataError(f"{folder}: no images{besides} in class {shown(empty)}; add images ({kinds}) or remove the folder")
    check_text(classes, folder)
    return Manifest(folder, classes, Names(names), tuple(labels), tuple(gone))


def check_text(classes: Sequence[str], where: Path) -> None:
    odd = [c for c in classes if c.encode(errors="replace").decode() != c]
    if odd:
        raise DataError(f"{where}: the name of class folder {odd[0]} is not UTF-8 text; rename it")


def layout(root: str | None) -> Layout:
    """What kind of data set lies in `root`. DataError where there is no such folder, or no train in it."""
    from .shards import shard_sets

    if root is None:
        raise DataError("name the folder of images: fastffl train DIR, or --data DIR, with DIR/train/CLASS/IMAGE.jpg")
    top = Path(root).expanduser()
    if not top.is_dir():
        raise DataError(f"{root}: there is no such folder; expected {root}/train/CLASS/IMAGE.jpg, or {root}/CLASS/IMAGE.jpg")
    try:
        names = subfolders(top)
        split = "train" in names and bool(subfolders(top / "train"))
        if not split:
            shards = shard_sets(top, names)
            if shards:
                return Layout(top, {}, shards)
        # `train` is a split, unless it holds no folders and stands among other classes: then it is railway pictures
        if not (split or ("train" in names and set(names) <= {"train", *HELD})):
            if names and set(names) <= set(HELD):
                raise DataError(f"{root} holds {shown(names)} but no train; expected {root}/train/CLASS/IMAGE.jpg")
            return Layout(top, {"": top}, {})
    except OSError as error:
        raise DataError(f"{root}: {error.strerror or error}") from None
    return Layout(top, {name: top / name for name in parts_of(names)}, {})


def parts_of(names: Iterable[str]) -> list[str]:
    """`train`, the first name of a validation set, `test`: those of them that are there."""
    known = set(names)
    val = next((n for n in HELD[:3] if n in known), None)
    return ["train", *([val] if val else []), *(["test"] if "test" in known else [])]


def splits(root: str | None, checked: str | None = None) -> Splits:
    """The splits of a folder: ROOT/train with ROOT/val or ROOT/test or both, else ROOT/CLASS with a tenth held out. Tar shards
    likewise. Files that CHECKED/exclude.txt names are left out (CHECKED: ROOT/.fastffl, where there is one).

    DataError where there is no such folder, no images, or where the splits do not have the same classes.
    """
    found = layout(root)
    return read_splits(found, exclusions(found.top, checked))


def read_splits(found: Layout, excluded: frozenset[str] = frozenset()) -> Splits:
    """The splits of a layout without the files that are excluded, named relative to its top."""
    from .shards import read_shards

    parts: dict[str, Manifest] = {}
    if found.shards:
        parts.update(read_shards(found, excluded))
    else:
        away = frozenset(f"{found.top}/{name}" for name in excluded)
        for name, folder in found.folders.items():
            parts[name] = scan(folder, away)
            if name not in ("", "train"):
                same_classes(parts["train"].classes, parts[name].classes, name, found.top)
    first, *rest = parts.values()
    if not rest:
        return _tenth(first, found.top)
    return Splits(first, rest[0] if len(rest) == 2 else None, rest[-1])


def different(train: Sequence[str], other: Sequence[str], name: str) -> str | None:
    """How the classes of part `name` differ from train's, if they do."""
    only_a, only_b = sorted({*train} - {*other}), sorted({*other} - {*train})
    parts = [f"only in train: {shown(only_a)}"] * bool(only_a) + [f"only in {name}: {shown(only_b)}"] * bool(only_b)
    return "; ".join(parts) or None


def same_classes(train: Sequence[str], other: Sequence[str], name: str, root: Path) -> None:
    how = different(train, other, name)
    if how:
        raise DataError(f"{root}: train and {name} have different classes ({how}); make them the same")


def held_out(keys: Sequence[str], usable: int) -> set[int]:
    """Places of the tenth of a class that is held out, by a hash of the name. The first `usable` keys are there, the others
    are excluded: they have their place in the order too, so that excluding a file moves no other one between the splits."""
    ranked = sorted(range(len(keys)), key=lambda k: mix(*os.fsencode(keys[k])))
    chosen = [k for k in ranked[: max(1, len(ranked) // 10)] if k < usable]
    return set(chosen) or {next(k for k in ranked if k < usable)}


def _tenth(whole: Manifest, root: Path) -> Splits:
    """A tenth of every class held out, at least one image."""
    by_class: list[list[int]] = [[] for _ in whole.classes]
    for k, y in enumerate(whole.labels):
        by_class[y].append(k)
    gone: list[list[str]] = [[] for _ in whole.classes]
    for key, y in whole.left_out:
        gone[y].append(key)
    held: set[int] = set()
    for label, ids in enumerate(by_class):
        if len(ids) < 2:
            name = whole.classes[label]
            raise DataError(f"{root}: class {name} has one image; two are needed to hold one out (or give {root}/val)")
        held.update(ids[k] for k in held_out([*map(whole.key, ids), *gone[label]], len(ids)))
    everything = range(len(whole.labels))
    train = whole.part([k for k in everything if k not in held], whole.left_out)
    return Splits(train, None, whole.part([k for k in everything if k in held]))


# ---- what a check found unusable


def exclusions(top: Path, checked: str | None = None) -> frozenset[str]:
    """Names, relative to `top`, that exclude.txt in `checked` or in top/.fastffl lists. DataError where it can't be read."""
    path = Path(checked).expanduser() / EXCLUDE if checked else top / CHECKED / EXCLUDE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if not checked:
            return frozenset()
        raise DataError(f"{checked} holds no {EXCLUDE}; write it: fastffl data check {top} --out {checked}") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}; expected what fastffl data check wrote") from None
    names = set()
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line or line.startswith(b"#"):
            continue
        try:
            names.add(unquoted(os.fsdecode(line)))
        except ValueError:
            raise DataError(f"{path}, line {number}: {printable(os.fsdecode(line))} is no name; check the data again") from None
    return frozenset(names)


def quoted(name: str) -> str:
    """A file name as one line of text: as it is, or as a JSON string where a line can't hold it."""
    plain = printable(name) == name == name.strip() and name[:1] not in ('"', "#")
    return name if plain else json.dumps(name)


def unquoted(line: str) -> str:
    """The name that `quoted` wrote. ValueError where a JSON string is damaged."""
    if not line.startswith('"'):
        return line.rstrip("\r")
    name = json.loads(line)
    os.fsencode(name)  # escapes that stand for no file name
    return str(name)
