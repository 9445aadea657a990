"""check: looks at every image of a data set before a run does, and writes what it found.

manifest.jsonl   a line for each image: path, split, class, bytes, sha256, width, height, problem. A later check compares the
                 hashes: damage that still decodes shows in nothing else (of 600 mutated JPEGs 382 gave another picture silently)
exclude.txt      the files that can't be used, each under a line that says why; every Source leaves them out
progress.jsonl   while it runs: what was found so far, so that the same command goes on after it was killed
"""

import fcntl
import hashlib
import json
import os
import signal
import stat
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, Interrupted, UsageError, printable
from .manifest import (
    CHECKED,
    EXCLUDE,
    Layout,
    Manifest,
    different,
    is_image,
    layout,
    not_a_file,
    quoted,
    read_splits,
    subfolders,
    walk,
)
from .processes import Bar, Lost, cores, each
from .shards import Shards, read_shards, write

MANIFEST, PROGRESS = "manifest.jsonl", "progress.jsonl"
FLUSH = 0.5  # seconds
LARGEST = 2**30  # bytes of one image file
TINY = 16  # pixels of the shorter side
KINDS = {  # of format, by suffix; MPO is the JPEG of phones that hold two pictures
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".webp": ("WEBP",),
    ".bmp": ("BMP",),
    ".ppm": ("PPM",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".gif": ("GIF",),
}
# kinds of problems: what can't be used is excluded; what stops a run is for people to mend; the rest is worth knowing
DAMAGE = ("empty", "not an image", "truncated", "damaged", "bomb", "unreadable", "kills", "hangs")
UNUSABLE = (*DAMAGE, "dangling link", "not a file", "changed")
STOPS = ("classes differ", "empty class", "layout")
NOTED = ("format", "cmyk", "tiny", "duplicate", "leak", "stray", "gone")


class Problem(NamedTuple):
    """`path` relative to the data set's folder; kind: one of UNUSABLE, STOPS or NOTED."""

    path: str
    kind: str
    why: str


class Facts(NamedTuple):
    """What is known of a file: found again without reading it while size and time stay."""

    size: int
    time: int  # of its last change, ns; -1 where it could not be read
    sha256: str
    width: int
    height: int
    problems: tuple[tuple[str, str], ...]  # (kind, why)


@dataclass
class Report:
    """What a check found."""

    images: int
    classes: int
    splits: dict[str, int]
    problems: list[Problem]
    manifest: str
    exclude: str

    @property
    def unusable(self) -> int:
        return sum(p.kind in UNUSABLE for p in self.problems)

    @property
    def code(self) -> int:
        """1 where files can't be used or a run would be refused, else 0."""
        return int(any(p.kind in UNUSABLE + STOPS for p in self.problems))

    @property
    def document(self) -> dict[str, Any]:
        facts = {"images": self.images, "classes": self.classes, "splits": self.splits}
        problems = [p._asdict() for p in self.problems]
        return {**facts, "problems": problems, "manifest": self.manifest, "exclude": self.exclude}

    def lines(self, each_kind: int = 10) -> Iterator[str]:
        """The problems as text, the worst kinds first, at most `each_kind` of one kind."""
        count = Counter(p.kind for p in self.problems)
        for kind in (*STOPS, *UNUSABLE, *NOTED):
            for k, p in enumerate(p for p in self.problems if p.kind == kind):
                if k == each_kind:
                    yield f"  {kind:13} ... {count[kind] - k:,} more, all of them with --json"
                    break
                yield f"  {kind:13} {printable(p.path)}: {printable(p.why)}"


class Row(NamedTuple):
    """What manifest.jsonl says of a file."""

    bytes: int
    sha256: str
    width: int
    height: int
    problem: str | None


@dataclass
class Listing:
    """Every image file of a data set, usable or not, in order of the parts and classes."""

    found: Layout
    parts: list[str]
    names: list[str] = field(default_factory=list)  # relative to the top
    part: "array[int]" = field(default_factory=lambda: array("i"))
    classes: dict[str, int] = field(default_factory=dict)  # by name
    cls: "array[int]" = field(default_factory=lambda: array("i"))
    seen: set[tuple[int, int]] = field(default_factory=set)  # (part, class) that are there, with images or not
    problems: list[Problem] = field(default_factory=list)
    shards: list[Shards] = field(default_factory=list)

    def add(self, part: str, cls: str, names: list[str]) -> None:
        p, c = self.parts.index(part), self.classes.setdefault(cls, len(self.classes))
        self.seen.add((p, c))
        self.names += names
        self.part.extend([p] * len(names))
        self.cls.extend([c] * len(names))

    def read(self, k: int, known: Facts | None) -> tuple[int, int, bytes | None]:
        """Size, time of change and bytes of a file; no bytes where `known` has the same size and time. OSError."""
        if self.shards:
            p = self.part[k]
            shards, at = self.shards[p], k - sum(len(s.files) for s in self.shards[:p])
            size = shards.size[at]
            time = os.stat(f"{shards.root}/{shards.shards[shards.shard[at]]}").st_mtime_ns  # noqa: PTH116
            if known and (known.size, known.time) == (size, time):
                return size, time, None
            return size, time, shards.read(at) if size <= LARGEST else b""
        with open(f"{self.found.top}/{self.names[k]}", "rb", buffering=0) as file:  # noqa: PTH123
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise OSError("not a file")
            size, time = facts.st_size, facts.st_mtime_ns
            if known and (known.size, known.time) == (size, time):
                return size, time, None
            return size, time, file.read() if size <= LARGEST else b""


def listing(found: Layout) -> Listing:
    """The files of a data set. What a run would refuse at once is a problem here, and the rest is listed all the same."""
    made = Listing(found, list(found.shards or found.folders))
    if found.shards:
        for part, shards in read_shards(found, frozenset()).items():
            made.shards.append(shards)
            for k, name in enumerate(shards.files):
                made.add(part, shards.classes[shards.labels[k]], [name])
        return made
    start = len(str(found.top)) + 1
    train: list[str] = []
    for part, folder in found.folders.items():
        classes = subfolders(folder)
        train = train or classes
        with os.scandir(folder) as entries:
            odd = sorted(e.path[start:] for e in entries if not e.name.startswith(".") and not e.is_dir())
        made.problems += [Problem(path, "stray", "it is in no class folder") for path in odd]
        for cls in classes:
            names = []
            for entry in walk(f"{folder}/{cls}"):
                path = entry.path[start:]
                if not is_image(entry.name):
                    made.problems.append(Problem(path, "stray", "its suffix is not that of an image"))
                    continue
                why = not_a_file(entry)
                if why:
                    made.problems.append(Problem(path, "dangling link" if "link" in why else "not a file", f"it is {why}"))
                else:
                    names.append(path)
            made.add(part, cls, sorted(names))
        how = different(train, classes, part)
        if how:
            made.problems.append(Problem(part, "classes differ", how))
    return made


# ---- one image


def look(name: str, size: int, time: int, data: bytes) -> Facts:
    """What there is to say of an image file."""
    if size > LARGEST:
        return Facts(size, time, "", 0, 0, (("bomb", f"it has {size:,} bytes, more than {LARGEST:,}"),))
    digest = hashlib.sha256(data).hexdigest()
    from PIL import Image

    from .portable import FORMATS, decode, why

    try:
        with decode(data) as rgb:
            width, height = rgb.size
        with Image.open(BytesIO(data), formats=FORMATS) as image:  # as it is stored
            kind, mode = image.format or "", image.mode
    except MemoryError:
        return Facts(size, time, digest, 0, 0, (("damaged", "decoding it takes more memory than there is"),))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on damaged files
        text = why(error)
        return Facts(size, time, digest, 0, 0, ((_kind(text), text),))
    problems = []
    suffix = name[name.rfind(".") :].lower()
    if kind not in KINDS[suffix]:
        problems.append(("format", f"it is named {suffix} and holds {kind}"))
    if mode == "CMYK":
        problems.append(("cmyk", "its colours are for printing; they are converted"))
    if min(width, height) < TINY:
        problems.append(("tiny", f"it has {width} x {height} pixels"))
    return Facts(size, time, digest, width, height, tuple(problems))


def _kind(text: str) -> str:
    for words, kind in (
        ("is empty", "empty"),
        ("header claims", "bomb"),
        ("no image of", "not an image"),
        ("truncat", "truncated"),
    ):
        if words in text.lower():
            return kind
    return "damaged"


# ---- the folder of a check


@contextmanager
def claimed(folder: Path, advice: str) -> Iterator[None]:
    """A folder, made, for one process at a time. UsageError with `advice` where that can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"can't write {folder}: {error.strerror}; {advice}") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked processes do not hold it, so it ends with this one
        except OSError:
            raise UsageError(f"another process is writing to {folder}; wait for it, or {advice}") from None
        yield


def rows(path: Path, advice: str = "check anew: fastffl data check DIR --again") -> Iterator[Any]:
    """The whole lines of a JSON lines file; nothing where there is none. DataError with `advice` where one is no JSON."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):  # else its writer was killed
                    try:
                        yield json.loads(line)
                    except ValueError:
                        raise DataError(f"{path}, line {number} is damaged; {advice}") from None
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}; {advice}") from None


def _earlier(path: Path) -> dict[str, Facts]:
    """What a check that was killed had found, by name."""
    try:
        return {
            name: Facts(size, time, digest, width, height, tuple((kind, why) for kind, why in problems))
            for name, size, time, digest, width, height, problems in rows(path)
        }
    except (TypeError, ValueError):
        raise DataError(f"{path} is damaged; check anew: fastffl data check DIR --again") from None


def _before(path: Path) -> dict[str, Row]:
    """The rows of the last whole check, by name."""
    try:
        return {r["path"]: Row(r["bytes"], r["sha256"], r["width"], r["height"], r["problem"]) for r in rows(path)}
    except (TypeError, KeyError):
        raise DataError(f"{path} is damaged; check anew: fastffl data check DIR --again") from None


# ---- all images


def check(root: str, out: str | None = None, workers: int | None = None, again: bool = False) -> Report:
    """Look at every image below `root` and write manifest.jsonl and exclude.txt to `out` (ROOT/.fastffl).

    Killed at any moment, the next call goes on. `again` forgets earlier checks. DataError where there is no data set,
    UsageError where `out` can't be written, Interrupted by SIGINT.
    """
    if workers is not None and not 1 <= workers <= 1024:
        raise UsageError(f"--workers {workers}: expected 1 to 1024")
    found = layout(root)
    folder = Path(out).expanduser() if out else found.top / CHECKED
    try:
        made = listing(found)
    except OSError as error:
        raise DataError(f"{error.filename or root}: {error.strerror or error}") from None
    if not made.names and not any(p.kind in UNUSABLE for p in made.problems):
        raise DataError(
            f"{root} holds no images in class folders; expected {root}/train/CLASS/IMAGE.jpg, or {root}/CLASS/IMAGE.jpg"
        )
    with claimed(folder, f"name another: fastffl data check {root} --out FOLDER"):
        if again:
            for name in (PROGRESS, MANIFEST):
                (folder / name).unlink(missing_ok=True)
        before = _before(folder / MANIFEST)
        try:
            facts = _look_at_all(made, folder / PROGRESS, before, workers or cores())
        except KeyboardInterrupt:
            raise Interrupted("interrupted; what was checked is kept, the same command goes on", signal.SIGINT) from None
        except OSError as error:
            raise UsageError(f"can't write to {folder}: {error.strerror}; choose another --out FOLDER") from None
        return _conclude(made, facts, before, folder)


def _look_at_all(made: Listing, path: Path, before: dict[str, Row], workers: int) -> list[Facts]:
    """The facts of every file, appended to `path` as they come."""
    earlier = _earlier(path)

    def work(k: int) -> Facts | None:
        name = made.names[k]
        try:
            size, time, data = made.read(k, earlier.get(name))
        except OSError as error:
            return _lost("unreadable", error.strerror or str(error))
        if data is None:
            return None
        row = before.get(name)
        if row and row.problem is None and hashlib.sha256(data).hexdigest() == row.sha256:
            return Facts(size, time, row.sha256, row.width, row.height, ())  # the last check decoded it
        return look(name, size, time, data)

    facts: dict[int, Facts] = {}
    with appending(path) as append, Bar("checked", len(made.names)) as bar:
        for k, answer in each(work, range(len(made.names)), workers):
            name = made.names[k]
            if isinstance(answer, Lost):
                answer = _lost("hangs" if answer.hung else "kills", answer.why)
            if answer is not None and answer.time >= 0:  # what could not be read is tried again
                append([name, *answer])
            facts[k] = answer or earlier[name]
            bar.step()
    return [facts[k] for k in range(len(made.names))]


def _lost(kind: str, why: str) -> Facts:
    return Facts(0, -1, "", 0, 0, ((kind, why),))


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Any], None]]:
    """Append lines to a file; half a line that a killed writer left is cut off. A kill loses those of FLUSH seconds."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 2**17))  # no line is longer
        tail = file.read()
        file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)

        written = time.monotonic()

        def append(value: Any) -> None:
            nonlocal written
            file.write(json.dumps(value).encode() + b"\n")
            if time.monotonic() - written > FLUSH:
                file.flush()
                written = time.monotonic()

        yield append


def _conclude(made: Listing, facts: list[Facts], before: dict[str, Row], folder: Path) -> Report:
    """Compare with the last check and with each other, and write the two files."""
    problems = list(made.problems)
    own: dict[int, tuple[tuple[str, str], ...]] = {}
    for k, (name, fact) in enumerate(zip(made.names, facts, strict=True)):
        row, found = before.get(name), fact.problems
        if row and fact.sha256 != row.sha256 != "" and not (row.problem or "").startswith(DAMAGE):
            since = "its bytes changed since the last check; where that is meant: fastffl data check DIR --again"
            found = tuple(p for p in found if p[0] in DAMAGE) or (("changed", since),)
        if found:
            own[k] = found
        problems += [Problem(name, kind, why) for kind, why in found]
    now = {*made.names} if before else set()
    problems += [Problem(name, "gone", "it was there at the last check") for name in before if name not in now]
    unusable = {p.path: p for p in problems if p.kind in UNUSABLE}
    used = {(made.part[k], made.cls[k]) for k, name in enumerate(made.names) if name not in unusable}
    classes = list(made.classes)
    for p, c in sorted(made.seen - used):
        path = f"{made.parts[p]}/{classes[c]}".lstrip("/")
        problems.append(Problem(path, "empty class", "it holds no image that can be used"))
    split, held = list(made.parts), set[str]()
    try:
        splits = read_splits(made.found, frozenset(unusable))
    except DataError as error:
        if not any(p.kind in STOPS for p in problems):
            problems.append(Problem(".", "layout", str(error)))
    else:
        if len(split) == 1:
            split, held = ["train"], {*_from_top(splits.test, made.found.top)}

    def split_of(k: int) -> str:
        return "test" if made.names[k] in held else split[made.part[k]]

    problems += _twice(made, facts, split_of)
    problems.sort()
    counts = Counter(split_of(k) for k, name in enumerate(made.names) if name not in unusable)
    lines = ["# What training leaves out, as fastffl data check found it. Names are relative to the data set's folder.\n"]
    lines += [f"# {p.kind}: {printable(p.why)}\n{quoted(name)}\n" for name, p in sorted(unusable.items())]
    write(folder / EXCLUDE, map(os.fsencode, lines))

    def rows_now() -> Iterator[bytes]:
        for k, (name, fact) in enumerate(zip(made.names, facts, strict=True)):
            found = own.get(k, ())
            problem = "; ".join(f"{kind}: {why}" for kind, why in found) or None
            row = Row(fact.size, fact.sha256, fact.width, fact.height, problem)
            if name in before and fact.sha256 != before[name].sha256 != "" and found and found[0][0] in UNUSABLE:
                row = before[name]._replace(problem=problem)  # as it should be: found again next time, and found mended
            where = {"path": name, "split": split_of(k), "class": classes[made.cls[k]]}
            yield json.dumps({**where, **row._asdict()}).encode() + b"\n"

    write(folder / MANIFEST, rows_now())
    (folder / PROGRESS).unlink(missing_ok=True)
    return Report(len(made.names), len(classes), dict(counts), problems, str(folder / MANIFEST), str(folder / EXCLUDE))


def _from_top(manifest: Manifest, top: Path) -> Iterator[str]:
    """The names of a manifest's files, relative to the data set's folder."""
    before = f"{manifest.root}/"[len(str(top)) + 1 :]
    return (before + name for name in manifest.files)


def _twice(made: Listing, facts: list[Facts], split_of: Callable[[int], str]) -> Iterator[Problem]:
    """Files with the same bytes: a duplicate within a split, a leak between two."""
    classes = list(made.classes)
    first: dict[bytes, int] = {}
    for k, fact in enumerate(facts):
        j = first.setdefault(bytes.fromhex(fact.sha256), k) if fact.width else k
        if j != k:
            a, b = split_of(j), split_of(k)
            other = "" if made.cls[j] == made.cls[k] else f", of class {classes[made.cls[j]]}"
            yield Problem(made.names[k], "duplicate" if a == b else "leak", f"the same bytes as {made.names[j]} in {a}{other}")
