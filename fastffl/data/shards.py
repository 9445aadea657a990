"""shards: a data set in tar files, WebDataset's layout, read in place.

DIR/train-000000.tar, ..., DIR/val-000000.tar, ... or DIR/train/*.tar, DIR/val/*.tar; `test` likewise. An image's class is the
folder it is in, CLASS/NAME.jpg, or the number in NAME.cls beside it. DIR/classes.txt, one name a line, says which class has
which number. Offsets come from X.idx beside X.tar (the text that DALI's wds2idx writes, v1.2), or from the headers, read once.
"""

import contextlib
import os
import re
import tarfile
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..errors import DataError
from .manifest import CHECKED, HELD, Layout, Manifest, Names, check_text, is_image, parts_of, same_classes, shown

BLOCK = 512
VERSION = "v1.2"
CLASSES = "classes.txt"
OPEN = 256  # shards that a process keeps open; many systems allow 1024 files
_PART = re.compile(rf"(train|{'|'.join(HELD)})(?![A-Za-z]).*\.tar")


class Member(NamedTuple):
    """A file in a tar: its bytes lie at `offset`."""

    name: str
    offset: int
    size: int


class _File:
    """A file that is read at offsets, which threads and forked processes can do at the same time."""

    def __init__(self, path: str):
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        while len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"the shard ends at byte {offset + len(data)}, before the image does")
            data += more
        return data

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


@dataclass(frozen=True)
class Shards(Manifest):
    """A manifest whose files lie in shards: file k is `size[k]` bytes at `offset[k]` of shards[shard[k]].

    files: SHARD/MEMBER, relative to `root`.
    """

    shards: tuple[str, ...] = ()
    shard: Sequence[int] = ()
    offset: Sequence[int] = ()
    size: Sequence[int] = ()
    _open: dict[int, _File] = field(default_factory=dict, compare=False, repr=False)

    def read(self, k: int) -> bytes:
        s = self.shard[k]
        file = self._open.get(s)
        if file is None:
            file = _File(f"{self.root}/{self.shards[s]}")
            if len(self._open) < OPEN:
                self._open[s] = file
        return file.read(self.size[k], self.offset[k])

    def key(self, k: int) -> str:
        return self.files[k][len(self.shards[self.shard[k]]) + 1 :]

    def part(self, keep: Sequence[int], left_out: tuple[tuple[str, int], ...] = ()) -> Self:
        shard, offset, size = (array("q", (column[k] for k in keep)) for column in (self.shard, self.offset, self.size))
        files, labels = Names(self.files[k] for k in keep), tuple(self.labels[k] for k in keep)
        return type(self)(self.root, self.classes, files, labels, left_out, self.shards, shard, offset, size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process opens its own


def shard_sets(top: Path, folders: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of the shards of each part, relative to `top`; none where it holds images in folders, or no shards.

    `folders` are those in `top`. DataError names a tar among shards that belongs to no part.
    """

    def tars(folder: Path) -> list[str]:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.name.endswith(".tar") and not e.name.startswith("."))

    inside = {name: tuple(f"{name}/{t}" for t in tars(top / name)) for name in parts_of(folders) if name in folders}
    if inside.get("train"):
        return {name: shards for name, shards in inside.items() if shards}
    here = tars(top)
    if not here or any(_holds_images(top / name) for name in folders):  # an archive beside what was unpacked from it
        return {}
    parts: dict[str, list[str]] = {}
    for name in here:
        match = _PART.fullmatch(name)
        parts.setdefault(match[1] if match else "", []).append(name)
    if len(parts) > 1 and "" in parts:
        odd = shown(parts[""])
        raise DataError(f"{top}: shard {odd} belongs to no split; expected train-*.tar, val-*.tar, test-*.tar: rename or move it")
    if "train" not in parts and "" not in parts:
        raise DataError(f"{top} holds shards of {shown(list(parts))} but not of train; expected train-*.tar")
    return {name: tuple(parts[name]) for name in parts_of(parts)} if "train" in parts else {"": tuple(parts[""])}


def _holds_images(folder: Path) -> bool:
    """Whether there are images in a folder or in the folders in it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image(entry.name) and not entry.name.startswith("."):
                return True
            if entry.is_dir():
                with os.scandir(entry.path) as deeper:
                    if any(is_image(e.name) for e in deeper):
                        return True
    return False


# ---- where the members of a shard lie


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: the name is cut at the first dot after the last slash."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def index_text(members: Iterable[Member]) -> str:
    """wds2idx's text: the number of samples, then a line for each, `ext offset size name` per member."""
    lines = []
    for _, sample in groupby(members, lambda m: split_name(m.name)[0]):
        lines.append(" ".join(f"{split_name(m.name)[1]} {m.offset} {m.size} {m.name}" for m in sample))
    return f"{VERSION} {len(lines)}\n" + "".join(line + "\n" for line in lines)


def read_index(path: Path) -> list[Member]:
    """The members that wds2idx's text names. ValueError where it is damaged or of another version, OSError if unreadable."""
    head, *lines = path.read_text(errors="surrogateescape").split("\n")
    version, count = head.split(" ")
    if version != VERSION or lines.pop() or len(lines) != int(count):
        raise ValueError(f"{path} is not a whole index of version {VERSION}")
    members = []
    for line in lines:
        words = line.split(" ")
        for ext, offset, size, name in zip(*[iter(words)] * 4, strict=True):
            if not name.endswith(ext):
                raise ValueError(f"{path} has a name with a space")
            members.append(Member(name, int(offset), int(size)))
    return members


def members_of(shard: Path, cache: Path | None = None) -> list[Member]:
    """The files in a shard: from its .idx where that fits, else from `cache`, else from its headers (`cache` is then written).

    DataError where it can't be read as a tar.
    """
    try:
        file = _File(str(shard))
        for path in (shard.with_suffix(".idx"), cache):
            if path is not None:
                with contextlib.suppress(OSError, ValueError):  # missing or damaged: the headers say the same
                    found = read_index(path)
                    if _fits(found, file):
                        return found
        found = list(_headers(shard, file))
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{shard} can't be read as a tar: {why}; expected a plain tar, not compressed, whole") from None
    if cache is not None and all(re.fullmatch(r"[!-~]+", m.name) for m in found):  # the text has no quotes
        with contextlib.suppress(OSError):  # a data set that may not be written to is read again next time
            cache.parent.mkdir(parents=True, exist_ok=True)
            write(cache, [index_text(found).encode()])
    return found


def _headers(shard: Path, file: _File) -> Iterator[Member]:
    with tarfile.open(shard, "r:", errorlevel=0, errors="surrogateescape") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it keeps all it saw
            if info.isreg() and not info.issparse():
                yield Member(info.name, info.offset_data, info.size)
        if not _ends(file, tar.offset):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"its header at byte {tar.offset} is damaged")


def _ends(file: _File, at: int) -> bool:
    """Whether no member begins at byte `at`."""
    return not os.pread(file.fd, BLOCK, at).strip(b"\0")


def _fits(members: list[Member], file: _File) -> bool:
    """Whether an index is this shard's: everything lies in it, ten headers say the same, and nothing comes after the last."""
    length = os.fstat(file.fd).st_size
    if not members:
        return _ends(file, 0)
    if any(m.offset < BLOCK or m.size < 0 or m.offset + m.size > length for m in members):
        return False
    for k in {*range(0, len(members), max(1, len(members) // 9)), len(members) - 1}:
        member = members[k]
        try:
            info = tarfile.TarInfo.frombuf(file.read(BLOCK, member.offset - BLOCK), "utf-8", "surrogateescape")
        except tarfile.TarError:
            return False
        same = member.name == info.name or member.name.startswith(info.name)  # a long one is cut short there
        if info.size != member.size or not same:
            return False
    last = max(members, key=lambda m: m.offset)
    return _ends(file, -(-(last.offset + last.size) // BLOCK) * BLOCK)


def write(path: Path, parts: Iterable[bytes]) -> None:
    """Replace a file at once: whoever reads sees the old bytes or the new ones, even after a power cut."""
    fd, temp = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        Path(temp).chmod(0o644)
        os.replace(temp, path)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---- what class each image has


class _Images(NamedTuple):
    """The images of one part, as columns; `cls`: place of the member with its label, or -1."""

    shards: tuple[str, ...]
    names: list[str]
    shard: "array[int]"
    offset: "array[int]"
    size: "array[int]"
    cls: "array[int]"


def _images(top: Path, shards: tuple[str, ...]) -> _Images:
    found = _Images(shards, [], *(array("q") for _ in range(4)))
    for s, shard in enumerate(shards):
        members = members_of(top / shard, top / CHECKED / f"{shard[:-4]}.idx")
        labels = {split_name(m.name)[0]: m for m in members if m.name.endswith(".cls")}
        for name, offset, size in members:
            if is_image(name) and not name[name.rfind("/") + 1 :].startswith("."):
                label = labels.get(split_name(name)[0]) if labels else None
                found.names.append(name)
                found.shard.append(s)
                found.offset.append(offset)
                found.size.append(size)
                found.cls.append(label.offset if label else -1)
    return found


def class_of(name: str) -> str:
    """The class folder a member is in, or ""."""
    first, slash, rest = name.partition("/")
    if slash and (first == "." or (first in ("train", *HELD) and "/" in rest)):
        return class_of(rest)
    return first if slash else ""


def _numbers(top: Path, images: _Images, chosen: Iterable[int]) -> list[int]:
    """The labels in the .cls members of the chosen images, -1 where one has none. DataError where one is no number."""
    numbers = []
    file, at = None, -1
    for k in chosen:
        if images.cls[k] < 0:
            numbers.append(-1)
            continue
        if images.shard[k] != at:
            at = images.shard[k]
            file = _File(f"{top}/{images.shards[at]}")
        assert file is not None
        text = os.pread(file.fd, 32, images.cls[k]).split(b"\0")[0].strip()  # blocks are filled up with zeros
        if not re.fullmatch(rb"[0-9]{1,6}", text):
            where = f"{top}/{images.shards[at]}: {split_name(images.names[k])[0]}.cls"
            raise DataError(f"{where} holds {text[:20]!r}; expected the number of the class, from 0")
        numbers.append(int(text))
    return numbers


def _known(top: Path) -> tuple[str, ...] | None:
    """The classes that classes.txt names."""
    path = top / CLASSES
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}; expected one class name a line") from None
    again = {n for n in names if names.count(n) > 1 or not n.strip()} if len(set(names)) < len(names) or "" in names else ()
    if again or not names:
        raise DataError(f"{path}: {shown(sorted(map(repr, again))) or 'no name'}; expected each class once, one name a line")
    return tuple(names)


def _labels(top: Path, images: _Images, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[int]]:
    """The classes of a part and the label of each of its images. With `classes` given, by name or by number in it."""
    folders = [class_of(name) for name in images.names]
    place = {c: k for k, c in enumerate(classes or ())}
    by_name = bool(classes) and all(f in place for f in folders)
    # a million small reads are saved where names say it; one image of each shard is compared
    every = range(len(folders))
    chosen = [k for k in every if k == 0 or images.shard[k] != images.shard[k - 1]] if by_name else every
    numbers = _numbers(top, images, chosen)
    if by_name:
        assert classes is not None
        for k, number in zip(chosen, numbers, strict=True):
            if number not in (-1, place[folders[k]]):
                of = f"{top}/{images.shards[images.shard[k]]}: {images.names[k]}"
                raise DataError(
                    f"{of} has class {number} in its .cls, but {folders[k]} is number {place[folders[k]]} of the classes; "
                    f"write {CLASSES} in the order of the numbers"
                )
        return classes, [place[f] for f in folders]
    if classes is None:
        if min(numbers, default=-1) >= 0:  # all have one
            width = len(str(max(numbers)))
            return tuple(f"{c:0{width}}" for c in range(max(numbers) + 1)), numbers
        classes = tuple(sorted({*folders}))
        if "" not in classes:
            check_text(classes, top)
            place = {c: k for k, c in enumerate(classes)}
            return classes, [place[f] for f in folders]
    else:
        labels = [n if n >= 0 else place.get(f, -1) for n, f in zip(numbers, folders, strict=True)]
        high = next((k for k, y in enumerate(labels) if y >= len(classes)), None)
        if high is not None:
            of = f"{top}/{images.shards[images.shard[high]]}: {images.names[high]}"
            raise DataError(f"{of} has class {labels[high]}, but there are {len(classes)} classes in {CLASSES} or train, from 0")
        if min(labels, default=0) >= 0:
            return classes, labels
        numbers = labels
    k = next(k for k, y in enumerate(numbers) if y < 0 and (place or not folders[k]))
    of = f"{top}/{images.shards[images.shard[k]]}: {images.names[k]}"
    raise DataError(f"{of} has no known class; expected CLASS/NAME.jpg, or NAME.cls with its number beside it, or a {CLASSES}")


def read_shards(layout: Layout, excluded: frozenset[str]) -> dict[str, Shards]:
    """The parts of a data set in shards. DataError names a class without images, or what differs between the parts."""
    known = _known(layout.top)
    parts: dict[str, Shards] = {}
    train: tuple[str, ...] = ()
    for part, shards in layout.shards.items():
        images = _images(layout.top, shards)
        if not images.names:
            raise DataError(f"{layout.top}: the shards of {part or 'the data set'} hold no images")
        numbered = train if train and train[0].isdigit() and min(images.cls) >= 0 else None  # train has no other names
        classes, labels = _labels(layout.top, images, known or numbered)
        train = train or classes
        same_classes(train, classes, part, layout.top)
        files = Names(f"{shards[s]}/{name}" for s, name in zip(images.shard, images.names, strict=True))
        where = (images.shard, images.offset, images.size)
        whole = Shards(layout.top, classes, files, tuple(labels), (), shards, *where)
        if excluded:
            away = [name in excluded for name in files]
            gone = tuple((whole.key(k), labels[k]) for k, bad in enumerate(away) if bad)
            whole = whole.part([k for k, bad in enumerate(away) if not bad], gone)
        used = {*whole.labels}
        empty = [c for y, c in enumerate(classes) if y not in used]
        if empty and part in ("", "train"):
            besides = " that are not excluded" if whole.left_out else ""
            raise DataError(f"{layout.top}: the shards of train hold no images{besides} of class {shown(empty)}; pack some")
        parts[part] = whole
    return parts
