"""manifest: which image files a folder holds, of which class; the one class map of a run."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .rng import mix

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Manifest:
    """Files of one split, paths relative to `root`, and the class of each."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def scan(folder: Path) -> Manifest:
    """Class folders with images anywhere below them. DataError names empty classes."""
    try:
        classes = tuple(sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")))
        files: list[str] = []
        labels: list[int] = []
        empty = []
        for label, name in enumerate(classes):
            found = sorted(
                os.path.relpath(Path(at) / f, folder)
                for at, _, names in os.walk(folder / name, followlinks=True)
                for f in names
                if f.lower().endswith(EXTENSIONS) and not f.startswith(".")
            )
            if not found:
                empty.append(name)
            files += found
            labels += [label] * len(found)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from None
    if not classes:
        raise DataError(f"{folder} holds no class folders; expected {folder}/CLASS/IMAGE.jpg")
    if empty:
        raise DataError(f"{folder}: no images in class {_shown(empty)}; add images or remove the folder")
    return Manifest(folder, classes, tuple(files), tuple(labels))


def splits(root: str | None) -> tuple[Manifest, Manifest]:
    """Training and validation files of a folder: ROOT/train and ROOT/val (or test), else every tenth image held out.

    DataError where there is no such folder, no images, or where train and val do not have the same classes.
    """
    if root is None:
        raise DataError("name the folder of images: fastffl train DIR, or --data DIR, with DIR/train/CLASS/IMAGE.jpg")
    top = Path(root).expanduser()
    if not top.is_dir():
        raise DataError(f"{root}: there is no such folder; expected {root}/train/CLASS/IMAGE.jpg, or {root}/CLASS/IMAGE.jpg")
    val = next((top / n for n in ("val", "validation", "valid", "test") if (top / n).is_dir()), None)
    if (top / "train").is_dir() and val:
        a, b = scan(top / "train"), scan(val)
        if a.classes != b.classes:
            only_a, only_b = sorted({*a.classes} - {*b.classes}), sorted({*b.classes} - {*a.classes})
            parts = [f"only in train: {_shown(only_a)}"] * bool(only_a) + [f"only in {val.name}: {_shown(only_b)}"] * bool(only_b)
            raise DataError(f"{root}: train and {val.name} have different classes ({'; '.join(parts)}); make them the same")
        return a, b
    if (top / "train").is_dir():
        whole = scan(top / "train")
    else:
        whole = scan(top)
    held: set[int] = set()
    for label in range(len(whole.classes)):  # a tenth of every class, at least one, by a hash of the name
        ids = [k for k, y in enumerate(whole.labels) if y == label]
        if len(ids) < 2:
            name = whole.classes[label]
            raise DataError(f"{root}: class {name} has one image; two are needed to hold one out (or give {root}/val)")
        ids.sort(key=lambda k: mix(*whole.files[k].encode()))
        held.update(ids[: max(1, len(ids) // 10)])

    def part(keep: list[int]) -> Manifest:
        return Manifest(whole.root, whole.classes, tuple(whole.files[k] for k in keep), tuple(whole.labels[k] for k in keep))

    everything = range(len(whole.files))
    return part([k for k in everything if k not in held]), part([k for k in everything if k in held])
