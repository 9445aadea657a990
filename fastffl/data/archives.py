"""CIFAR-10 and CIFAR-100 from their python archives (a folder, or the .tar.gz itself) or from .npy arrays.

The archives are pickles. They are opened by an unpickler that knows numpy arrays and nothing else, so a pickle that
would call anything is refused before it runs.
"""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .resident import Arrays

# The unpickler may resolve these names and no others: what a pickled numpy array is made of.
ALLOWED = {
    **{(m, "_reconstruct"): "array" for m in ("numpy.core.multiarray", "numpy._core.multiarray")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
LIMIT = 2**30  # bytes of one archive member; CIFAR's largest is 154 MB

SETS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "folder": "cifar-10-batches-py",
        "tar": "cifar-10-python.tar.gz",
        "train": [f"data_batch_{k}" for k in range(1, 6)],
        "test": ["test_batch"],
        "labels": b"labels",
        "meta": ("batches.meta", b"label_names"),
        "classes": 10,
        "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255),
        "std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
    },
    "cifar100": {
        "folder": "cifar-100-python",
        "tar": "cifar-100-python.tar.gz",
        "train": ["train"],
        "test": ["test"],
        "labels": b"fine_labels",
        "meta": ("meta", b"fine_label_names"),
        "classes": 100,
        "mean": (129.3 / 255, 124.1 / 255, 112.4 / 255),  # the official FFL code's constants
        "std": (68.2 / 255, 65.4 / 255, 70.4 / 255),
    },
}


class ArrayUnpickler(pickle.Unpickler):
    """Python and numpy data only. UnpicklingError names whatever else a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which image data does not need")
        if name == "_reconstruct":
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        return super().find_class(module, name)


def _unpickle(data: bytes, what: str) -> dict[bytes, Any]:
    try:
        value = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DataError(f"{what} can't be read: {error}; fetch the archive again") from None
    if not isinstance(value, dict):
        raise DataError(f"{what} holds a {type(value).__name__}; expected the dictionary of a CIFAR archive")
    return {k.encode() if isinstance(k, str) else k: v for k, v in value.items()}


def _reader(name: str, root: Path) -> Callable[[str], bytes] | None:
    """A function that gives the bytes of an archive member, or None where `root` holds no archive."""
    facts = SETS[name]
    for folder in (root / facts["folder"], root):
        if (folder / facts["test"][0]).is_file() and (folder / facts["train"][0]).is_file():
            return lambda member: (folder / member).read_bytes()
    tar = root if root.is_file() else root / facts["tar"]
    if not tar.is_file():
        return None

    def read(member: str) -> bytes:
        try:
            with tarfile.open(tar) as archive:
                info = archive.getmember(f"{facts['folder']}/{member}")
                stream = archive.extractfile(info)
                if stream is None or info.size > LIMIT:
                    raise DataError(f"{tar}: {info.name} is not a file of less than 1 GiB")
                return stream.read()
        except (tarfile.TarError, KeyError, EOFError, OSError) as error:
            raise DataError(f"{tar} can't be read as {facts['tar']}: {error}; fetch it again") from None

    return read


def _from_archive(name: str, read: Callable[[str], bytes]) -> tuple[Any, Any, tuple[str, ...]]:
    facts = SETS[name]

    def split(members: list[str]) -> tuple[Tensor, Tensor]:
        xs, ys = [], []
        for member in members:
            try:
                batch = _unpickle(read(member), f"{name} archive member {member!r}")
            except FileNotFoundError:
                raise DataError(f"{name}: archive member {member!r} is missing; unpack the archive again") from None
            data, labels = batch.get(b"data"), batch.get(facts["labels"])
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
                raise DataError(f"{name} archive member {member!r} has no (N, 3072) uint8 images; fetch the archive again")
            if not isinstance(labels, list) or not all(type(v) is int for v in labels):
                raise DataError(f"{name} archive member {member!r} has no list of {facts['labels'].decode()}")
            xs.append(torch.from_numpy(data.copy()).view(-1, 3, 32, 32))
            ys.append(torch.tensor(labels, dtype=torch.int64))
        return torch.cat(xs), torch.cat(ys)

    train, test = split(facts["train"]), split(facts["test"])
    classes = tuple(str(c) for c in range(facts["classes"]))
    member, key = facts["meta"]
    try:
        names = _unpickle(read(member), f"{name} archive member {member!r}").get(key)
    except FileNotFoundError:
        names = None  # the names are only for reading; some copies leave the meta file out
    if isinstance(names, list) and len(names) == len(classes):
        classes = tuple(n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in names)
    return train, test, classes


def _from_npy(name: str, folder: Path) -> tuple[Any, Any, tuple[str, ...]]:
    def read(stem: str) -> np.ndarray:
        path = folder / f"{stem}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path} can't be read as a plain .npy array: {error}") from None

    def split(which: str) -> tuple[Tensor, Tensor]:
        x, y = read(f"{which}_x"), read(f"{which}_y")
        if x.dtype != np.uint8 or x.ndim != 4 or not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
            raise DataError(
                f"{folder}: {which}_x is {x.dtype} {x.shape}, {which}_y {y.dtype} {y.shape}; "
                "expected uint8 (N, S, S, 3) or (N, 3, S, S), and integers (N,)"
            )
        images = torch.from_numpy(x)
        return images if x.shape[1] == 3 else images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64))

    return split("train"), split("test"), tuple(str(c) for c in range(SETS[name]["classes"]))


def cifar(name: str, root: str | None) -> Arrays:
    """The data set below `root`: its python archive, unpacked or not, or train_x/train_y/test_x/test_y.npy.

    DataError says what was looked for and where, or what is wrong with what was found.
    """
    facts = SETS[name]
    arrays = "train_x.npy, train_y.npy, test_x.npy, test_y.npy"
    wanted = f"{facts['folder']}/ (or {facts['tar']}), or {arrays}"
    if root is None:
        raise DataError(f"{name} needs its images: give the folder that holds {wanted}: --data DIR")
    place = Path(root).expanduser()
    if not place.exists():
        raise DataError(f"--data {root}: there is no such folder; expected one that holds {wanted}")
    try:
        read = _reader(name, place)
        folders = [place, place / name, *sorted(place.glob(f"{name}*/"))] if place.is_dir() else []
        npy = next((d for d in folders if (d / "train_x.npy").is_file()), None)
        if read is None and npy is None:
            raise DataError(
                f"--data {root}: found no {wanted}; unpack {facts['tar']} there (tar xf) or name the folder that holds it"
            )
        train, test, classes = _from_archive(name, read) if read else _from_npy(name, npy)  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"--data {root}: {error.strerror or error}") from None
    return Arrays(name, classes, train, test, facts["mean"], facts["std"])
