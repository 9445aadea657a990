"""prepare: a data set made smaller and packed for training: images resized, in tar shards or in folders.

The classes, the splits and the images that are held out stay the same. Killed at any moment, the next call goes on, and the bytes
that come out are those of one that was never stopped, whatever the number of processes.
"""

import hashlib
import json
import os
import signal
import tarfile
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..errors import DataError, Interrupted, UsageError
from .check import appending, claimed, rows
from .manifest import CHECKED, Manifest, splits
from .processes import Bar, Lost, cores, each
from .rng import order
from .shards import BLOCK, CLASSES, Member, Shards, index_text, write

SETTINGS, PROGRESS, TEMP = "prepare.json", "prepare.jsonl", "temp"
JPEG = (".jpg", ".jpeg")


class Made(NamedTuple):
    """An image for the new data set; `why` it can't be, where it can't."""

    data: bytes
    resized: bool
    why: str = ""


@dataclass
class Prepared:
    """What was made. skipped: (path, why) of the images that can't be read."""

    out: str
    classes: int
    splits: dict[str, int] = field(default_factory=dict)
    resized: int = 0
    shards: int = 0
    bytes: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    excluded: int = 0

    @property
    def images(self) -> int:
        return sum(self.splits.values())

    @property
    def code(self) -> int:
        """1 where an image could not be read, else 0."""
        return int(bool(self.skipped))

    @property
    def document(self) -> dict[str, Any]:
        skipped = [{"path": path, "why": why} for path, why in self.skipped]
        return {"images": self.images, **self.__dict__, "skipped": skipped}

    def count(self, part: str, made: Made, path: str) -> None:
        if made.why:
            self.skipped.append((path, made.why))
            return
        self.splits[part] = self.splits.get(part, 0) + 1
        self.resized += made.resized
        self.bytes += len(made.data)


def shrink(data: bytes, size: int | None, quality: int) -> Made:
    """The image with a shorter side of at most `size` pixels: as it is where it is small enough, else a JPEG."""
    from PIL import Image

    from .portable import decode, why

    try:
        image = decode(data)
        short = min(image.size)
        if size is None or short <= size:
            return Made(data, False)
        to = (
            (size, max(size, int(size * image.height / short)))
            if image.width == short
            else (int(size * image.width / short), size)
        )
        out = BytesIO()
        # bilinear, as evaluation resizes: prepared at the side it asks for, only the JPEG's loss is between it and the original
        image.resize((to[0], to[1]), Image.Resampling.BILINEAR).save(out, "JPEG", quality=quality)
        return Made(out.getvalue(), True)
    except MemoryError:
        return Made(b"", False, "decoding it takes more memory than there is")
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on damaged files
        return Made(b"", False, why(error))


def escaped(name: str) -> str:
    """A path in letters that every tool reads in a tar and in its index: no spaces, no dots."""
    return quote(os.fsencode(name), safe="/-_").replace(".", "%2E").replace("~", "%7E")


def inner(manifest: Manifest, k: int) -> str:
    """The name of file k in the folder of its class."""
    key, cls = manifest.key(k), manifest.classes[manifest.labels[k]]
    folders = key.split("/")
    return "/".join(folders[folders.index(cls) + 1 :]) if cls in folders[:-1] else key


def new_name(root: Path, name: str, resized: bool) -> str:
    """Where an image of `root` goes: a resized one is a JPEG and says so."""
    if not resized or name.lower().endswith(JPEG):
        return name
    while (root / f"{name}.jpg").exists():  # it keeps its name
        name += "_"
    return f"{name}.jpg"


def prepare(
    root: str,
    out: str,
    size: int | None = None,
    quality: int = 90,
    shards: int | None = None,
    workers: int | None = None,
    checked: str | None = None,
) -> Prepared:
    """Make a data set in `out` of the one in `root`.

    size      the shorter side of larger images becomes this many pixels; None: images are copied as they are
    quality   of the JPEGs that are written
    shards    MiB of a tar shard; None: class folders

    UsageError where there is nothing to do or `out` can't take it, DataError where `root` is no data set.
    """
    if size is None and shards is None:
        raise UsageError("say what to make: --size 256 (pixels of the shorter side), --shards 256 (MiB of a tar), or both")
    for name, value, most in (
        ("size", size, 65500),
        ("quality", quality, 95),
        ("shards", shards, 2**20),
        ("workers", workers, 1024),
    ):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"--{name} {value}: expected 1 to {most}")
    found = splits(root, checked)
    top, target = Path(root).expanduser(), Path(out).expanduser()
    if target.resolve().is_relative_to(top.resolve()) or top.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"--out {out} lies in {root} or around it; choose another folder")
    parts = {"train": found.train, **({"val": found.val, "test": found.test} if found.val else {"val": found.test})}
    _possible(found.train.classes, bool(shards), root)
    digest = hashlib.sha256()
    for part, manifest in parts.items():
        digest.update(b"\0".join(os.fsencode(f"{part}/{name}") for name in manifest.files))
    settings = {"size": size, "quality": quality, "shards": shards, "classes": found.train.classes, "files": digest.hexdigest()}
    if target.is_dir() and not (target / CHECKED / SETTINGS).exists() and any(target.iterdir()):
        raise UsageError(f"--out {out} is not empty; choose another folder")
    with claimed(target / CHECKED, "choose another --out FOLDER"):
        if _settings(target / CHECKED / SETTINGS, settings) != json.loads(json.dumps(settings)):
            raise UsageError(f"{out} was begun with other settings, or {root} has other files now; choose another --out FOLDER")
        report = Prepared(out, len(found.train.classes), excluded=found.excluded)
        temp = target / CHECKED / TEMP
        try:
            temp.mkdir(exist_ok=True)
            for left in temp.iterdir():
                left.unlink(missing_ok=True)  # the processes of a killed call may still be at work
            make = _Shards(target, size, quality, shards << 20) if shards else _Folders(target, size, quality)
            with Bar("prepared", sum(len(m.files) for m in parts.values())) as bar:
                make.all(parts, workers or cores(), report, bar)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; what was made is kept, the same command goes on", signal.SIGINT) from None
        except OSError as error:
            raise UsageError(f"can't write {error.filename or out}: {error.strerror or error}; choose another --out") from None
    report.skipped.sort()
    return report


def _possible(classes: tuple[str, ...], packed: bool, root: str) -> None:
    """DataError where the new data set could not have the same classes in the same order."""
    what = "line" if packed else "folder"
    for c in classes:
        if c.splitlines() != [c] or not c.strip() or (not packed and (c.startswith(".") or {*c} & {"/", "\0"})):
            raise DataError(f"{root}: class {c!r} can't be the name of a {what}; rename it")
    if not packed and [*classes] != sorted(classes):
        raise DataError(f"{root}: its classes are in another order than their names, which folders can't keep; use --shards 256")


def _settings(path: Path, new: dict[str, Any]) -> Any:
    """The settings that `out` was begun with: `new` where it was not."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        write(path, [json.dumps(new).encode()])
        return json.loads(json.dumps(new))
    except ValueError:
        return None


@dataclass
class _Folders:
    """OUT/PART/CLASS/NAME, a line of progress for each image."""

    out: Path
    size: int | None
    quality: int

    def all(self, parts: dict[str, Manifest], workers: int, report: Prepared, bar: Bar) -> None:
        progress = self.out / CHECKED / PROGRESS
        done: dict[str, set[int]] = {part: set() for part in parts}
        for part, k, length, resized, why in rows(progress, "choose another --out FOLDER"):
            done[part].add(k)
            report.count(part, Made(bytes(0), resized, why), parts[part].path(k))
            report.bytes += length
            bar.step()
        with appending(progress) as append:
            for part, manifest in parts.items():
                self._part(part, manifest, done[part], workers, report, bar, append)

    def _part(self, part: str, manifest: Manifest, done: set[int], workers: int, report: Prepared, bar: Bar, append: Any) -> None:
        for cls in manifest.classes:
            (self.out / part / cls).mkdir(parents=True, exist_ok=True)
        temp = self.out / CHECKED / TEMP

        def work(k: int) -> tuple[int, Made]:
            made = _read(manifest, k, self.size, self.quality)
            if made.why:
                return 0, made
            name = inner(manifest, k)
            if isinstance(manifest, Shards):  # names in a tar are no paths, and several shards may have the same
                stem, _, suffix = name.rpartition(".")
                name = f"{k:07}-{escaped(stem).replace('/', '-')}.{suffix}"
            to = self.out / part / new_name(manifest.root, f"{manifest.classes[manifest.labels[k]]}/{name}", made.resized)
            mine = temp / str(os.getpid())
            try:
                mine.write_bytes(made.data)
                to.parent.mkdir(parents=True, exist_ok=True)
                os.replace(mine, to)
            except OSError as error:
                return -1, Made(b"", False, f"{to}: {error.strerror}")
            return len(made.data), Made(b"", made.resized)

        for k, answer in each(work, (k for k in range(len(manifest.files)) if k not in done), workers):
            length, made = (0, Made(b"", False, answer.why)) if isinstance(answer, Lost) else answer
            if length < 0:
                raise UsageError(f"can't write {made.why}; choose another --out FOLDER")
            report.count(part, made, manifest.path(k))
            report.bytes += length
            append([part, k, length, made.resized, made.why])
            bar.step()


@dataclass
class _Shards:
    """OUT/PART-000000.tar and .idx, of at most `limit` bytes; a line of progress for each shard. Training images are shuffled
    once, since other readers go through a shard from its beginning to its end."""

    out: Path
    size: int | None
    quality: int
    limit: int

    def all(self, parts: dict[str, Manifest], workers: int, report: Prepared, bar: Bar) -> None:
        write(self.out / CLASSES, [(c + "\n").encode() for c in parts["train"].classes])
        progress = self.out / CHECKED / PROGRESS
        begun: dict[str, tuple[int, int]] = dict.fromkeys(parts, (0, 0))  # the next shard, and the next image
        for part, shard, upto, images, resized, length, skipped in rows(progress, "choose another --out FOLDER"):
            begun[part] = shard + 1, upto
            report.splits[part] = report.splits.get(part, 0) + images
            report.resized += resized
            report.bytes += length
            report.shards += images > 0
            report.skipped += [(path, why) for path, why in skipped]
        with appending(progress) as append:
            for part, manifest in parts.items():
                bar.step(begun[part][1])
                self._part(part, manifest, *begun[part], workers, report, bar, append)

    def _part(
        self, part: str, manifest: Manifest, shard: int, start: int, workers: int, report: Prepared, bar: Bar, append: Any
    ) -> None:
        count = len(manifest.files)
        ids = order(0, 0, count).tolist() if part == "train" else [*range(count)]

        def work(k: int) -> Made:
            return _read(manifest, ids[k], self.size, self.quality)

        def finish(tar: "_Tar | None", upto: int, mine: Prepared) -> None:
            if tar:
                tar.close(self.out / f"{part}-{shard:06}.tar")
            append([part, shard, upto, mine.images, mine.resized, mine.bytes, mine.skipped])
            report.shards += tar is not None

        tar, mine = None, Prepared("", 0)
        at = start
        for at, answer in each(work, range(start, count), workers, ordered=True):
            made = Made(b"", False, answer.why) if isinstance(answer, Lost) else answer
            k = ids[at]
            label = manifest.labels[k]
            if tar and not made.why and tar.length + len(made.data) > self.limit:
                finish(tar, at, mine)
                tar, mine, shard = None, Prepared("", 0), shard + 1
            if not made.why:
                tar = tar or _Tar(self.out / CHECKED / TEMP / "shard")
                name = inner(manifest, k)
                stem, _, suffix = name.rpartition(".")
                suffix = "jpg" if made.resized or suffix.lower() in ("jpg", "jpeg") else suffix.lower()
                tar.add(f"{escaped(manifest.classes[label])}/{escaped(stem).strip('/')}", suffix, made.data, label)
            path = manifest.path(k)
            mine.count(part, made, path)
            report.count(part, made, path)
            bar.step()
        if start < count:
            finish(tar, count, mine)


def _read(manifest: Manifest, k: int, size: int | None, quality: int) -> Made:
    try:
        data = manifest.read(k)
    except OSError as error:
        return Made(b"", False, error.strerror or str(error))
    return shrink(data, size, quality)


class _Tar:
    """A tar whose bytes depend on what is added and on nothing else: no times, no owners."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("wb")
        self.members: list[Member] = []
        self.keys: set[str] = set()

    @property
    def length(self) -> int:
        return self._file.tell()

    def add(self, key: str, suffix: str, data: bytes, label: int) -> None:
        """A sample: its image, and its class as a number."""
        while key in self.keys:
            key += "_"
        self.keys.add(key)
        for name, part in ((f"{key}.{suffix}", data), (f"{key}.cls", str(label).encode())):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(part), 0o644
            self._file.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            self.members.append(Member(name, self._file.tell(), len(part)))
            self._file.write(part + bytes(-len(part) % BLOCK))

    def close(self, to: Path) -> None:
        """Finish the tar and its index under their own names."""
        with self._file as file:
            file.write(bytes(2 * BLOCK))
            file.flush()
            os.fsync(file.fileno())
        write(to.with_suffix(".idx"), [index_text(self.members).encode()])
        os.replace(self._path, to)
