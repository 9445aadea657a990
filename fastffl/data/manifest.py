"""manifest: which image files a folder holds, of which class; the one class map of a run."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .rng import mix

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
HELD = ("val", "validation", "valid", "test")  # what the folder of a split next to `train` may be called


@dataclass(frozen=True)
class Manifest:
    """Files of one split, paths relative to `root`, and the class of each."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def read(self, k: int) -> bytes:
        """The bytes of file k. OSError where it can't be read."""
        return (self.root / self.files[k]).read_bytes()

    def path(self, k: int) -> str:
        """The name of file k, for people."""
        return str(self.root / self.files[k])


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def _folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, those that start with a dot left out."""
    return sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))


def _images(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Paths of the image files anywhere below `folder`; links are followed, but not back into a folder they are in."""
    here = Path(folder).stat()
    key = (here.st_dev, here.st_ino)
    if key in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _images(entry.path, (*above, key))
            elif entry.name.lower().endswith(EXTENSIONS):
                if not entry.is_file():
                    what = "a link to nothing" if entry.is_symlink() and not Path(entry.path).exists() else "not a file"
                    raise DataError(f"{entry.path} is {what}; expected an image: replace or remove it")
                yield entry.path


def scan(folder: Path) -> Manifest:
    """Class folders with images anywhere below them. DataError names empty classes and what can't be an image."""
    try:
        classes = tuple(_folders(folder))
        files: list[str] = []
        labels: list[int] = []
        empty = []
        for label, name in enumerate(classes):
            found = sorted(os.path.relpath(path, folder) for path in _images(str(folder / name)))
            if not found:
                empty.append(name)
            files += found
            labels += [label] * len(found)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from None
    if not classes:
        raise DataError(f"{folder} holds no class folders; expected {folder}/CLASS/IMAGE.jpg")
    if empty:
        kinds = ", ".join(EXTENSIONS)
        raise DataError(f"{folder}: no images in class {_shown(empty)}; add images ({kinds}) or remove the folder")
    odd = [c for c in classes if c.encode(errors="replace").decode() != c]
    if odd:
        raise DataError(f"{folder}: the name of class folder {odd[0]} is not UTF-8 text; rename it")
    return Manifest(folder, classes, tuple(files), tuple(labels))


@dataclass(frozen=True)
class Splits:
    """The files of a folder's splits; `val` is None where the folder has one held-out set, which is `test` then."""

    train: Manifest
    val: Manifest | None
    test: Manifest


def splits(root: str | None) -> Splits:
    """The splits of a folder: ROOT/train with ROOT/val or ROOT/test or both, else ROOT/CLASS with a tenth held out.

    DataError where there is no such folder, no images, or where the splits do not have the same classes.
    """
    if root is None:
        raise DataError("name the folder of images: fastffl train DIR, or --data DIR, with DIR/train/CLASS/IMAGE.jpg")
    top = Path(root).expanduser()
    if not top.is_dir():
        raise DataError(f"{root}: there is no such folder; expected {root}/train/CLASS/IMAGE.jpg, or {root}/CLASS/IMAGE.jpg")
    try:
        names = _folders(top)
        # `train` is a split, unless it holds no folders and stands among other classes: then it is railway pictures
        split = "train" in names and (bool(_folders(top / "train")) or set(names) <= {"train", *HELD})
    except OSError as error:
        raise DataError(f"{root}: {error.strerror or error}") from None
    if not split:
        if names and set(names) <= set(HELD):
            raise DataError(f"{root} holds {_shown(names)} but no train; expected {root}/train/CLASS/IMAGE.jpg")
        return _tenth(scan(top), root)
    train = scan(top / "train")
    rest = []
    for name in (next((n for n in HELD[:3] if n in names), None), "test" if "test" in names else None):
        if name is None:
            continue
        part = scan(top / name)
        if part.classes != train.classes:
            only_a, only_b = sorted({*train.classes} - {*part.classes}), sorted({*part.classes} - {*train.classes})
            parts = [f"only in train: {_shown(only_a)}"] * bool(only_a) + [f"only in {name}: {_shown(only_b)}"] * bool(only_b)
            raise DataError(f"{root}: train and {name} have different classes ({'; '.join(parts)}); make them the same")
        rest.append(part)
    if not rest:
        return _tenth(train, root)
    return Splits(train, rest[0] if len(rest) == 2 else None, rest[-1])


def _tenth(whole: Manifest, root: str) -> Splits:
    """A tenth of every class held out, at least one image, by a hash of the name."""
    held: set[int] = set()
    by_class: list[list[int]] = [[] for _ in whole.classes]
    for k, y in enumerate(whole.labels):
        by_class[y].append(k)
    for label in range(len(whole.classes)):
        ids = by_class[label]
        if len(ids) < 2:
            name = whole.classes[label]
            raise DataError(f"{root}: class {name} has one image; two are needed to hold one out (or give {root}/val)")
        ids.sort(key=lambda k: mix(*os.fsencode(whole.files[k])))
        held.update(ids[: max(1, len(ids) // 10)])

    def part(keep: list[int]) -> Manifest:
        return Manifest(whole.root, whole.classes, tuple(whole.files[k] for k in keep), tuple(whole.labels[k] for k in keep))

    everything = range(len(whole.files))
    return Splits(part([k for k in everything if k not in held]), None, part([k for k in everything if k in held]))
