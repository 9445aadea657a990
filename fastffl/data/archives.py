"""CIFAR-10 and CIFAR-100 from their python archives (a folder, or the .tar.gz itself) or from .npy arrays.

The archives are pickles. They are opened by an unpickler that resolves five names, and those to stand-ins of our own: no
name in a pickle ever reaches Python's or numpy's code, so one that would call anything is refused before it runs.
"""

import io
import math
import pickle
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .resident import Arrays

LIMIT = 2**29  # bytes of one archive member; CIFAR's largest is 155 MB
MEMBERS = 100  # of one archive; CIFAR's have 8 and 5

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


class _Type:
    """What a pickle gets for numpy.dtype: plain numbers only, so no structure and no object can be described."""

    __slots__ = ("name",)

    def __init__(self, name: Any, *_: Any):
        text = name.decode("ascii") if isinstance(name, bytes) else name
        if not isinstance(text, str) or not re.fullmatch(r"b1|[uif][1248]", text):
            raise pickle.UnpicklingError("it holds an array that is not of plain numbers")
        self.name = text

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it holds an array that is not of plain numbers")
        self.name = order.replace("|", "") + self.name[-2:]


class _Array:
    """What a pickle gets for an array: nothing is allocated that the file does not hold."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.value = _array(data, kind, shape, fortran)


def _array(data: Any, kind: Any, shape: Any, fortran: Any) -> np.ndarray:
    if not (isinstance(data, (bytes, bytearray)) and isinstance(kind, _Type) and isinstance(shape, tuple)):
        raise pickle.UnpicklingError("it holds an array that is not of plain numbers")
    flat = np.frombuffer(bytes(data), np.dtype(kind.name))
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) != len(flat):
        raise pickle.UnpicklingError("it holds an array whose size is not that of its data")
    return flat.reshape(shape, order="F" if fortran else "C")


class _Name:
    """What a name in a pickle becomes. It has no attributes, so a pickle can't change it for those that come after."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "_call", call)

    def __setattr__(self, *_: Any) -> None:
        raise pickle.UnpicklingError("it tries to change what it may only call")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    """`_codecs.encode`, which is how Python 3 writes bytes in the older protocols."""
    if not isinstance(text, str) or codec not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("it asks for a codec, which image data does not need")
    return text.encode("latin1")


def _frombuffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    made = _Array()
    made.value = _array(data, kind, shape, order in ("F", b"F"))
    return made


def _refuse(*_: Any) -> Any:
    raise pickle.UnpicklingError("it makes an array in another way than numpy writes them")


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"numpy.{m}.multiarray", "_reconstruct"): lambda *_: _Array() for m in ("core", "_core")},
    **{(f"numpy.{m}.numeric", "_frombuffer"): _frombuffer for m in ("core", "_core")},
    ("numpy", "ndarray"): _refuse,  # only ever named, as the first argument of _reconstruct
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}


LEFT_OUT = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


class ArrayUnpickler(pickle._Unpickler):
    """Python's own data and arrays of plain numbers. UnpicklingError names whatever else a pickle asks for.

    The pure Python unpickler: the one in C takes gigabytes for a memo number that a damaged file made up. Opcodes that
    make objects in other ways than by calling a name are left out.
    """

    dispatch: ClassVar[dict[int, Any]] = {k: v for k, v in pickle._Unpickler.dispatch.items() if bytes([k]) not in LEFT_OUT}

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._bytes = len(data)

    read: Any  # both are set when loading begins
    append: Any

    def _bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        if size > self._bytes:
            raise pickle.UnpicklingError("it is cut short")
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = _bytearray8

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which image data does not need")
        return _Name(ALLOWED[module, name])


def _why(error: Exception) -> str:
    """What a damaged pickle did wrong, in words: a KeyError of the unpickler is an opcode it does not have."""
    if isinstance(error, KeyError):
        return "it holds what image data does not need, or is damaged"
    return str(error) or type(error).__name__


def _unpickle(data: bytes, what: str) -> dict[bytes, Any]:
    try:
        value = ArrayUnpickler(data).load()
        if not isinstance(value, dict):
            raise DataError(f"{what} holds a {type(value).__name__}; expected the dictionary of a CIFAR archive")
        return {
            k.encode() if isinstance(k, str) else k: v.value if isinstance(v, _Array) else v
            for k, v in value.items()
            if isinstance(k, (str, bytes))
        }
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DataError(f"{what} can't be read: {_why(error)}; fetch the archive again") from None


def _reader(name: str, root: Path) -> Callable[[str], bytes] | None:
    """A function that gives the bytes of an archive member, or None where `root` holds no archive."""
    facts = SETS[name]
    for folder in (root / facts["folder"], root):
        if (folder / facts["test"][0]).is_file() and (folder / facts["train"][0]).is_file():

            def read_file(member: str, folder: Path = folder) -> bytes:
                path = folder / member
                if path.exists() and not (path.is_file() and path.stat().st_size <= LIMIT):
                    raise DataError(f"{path} is not a file of less than {LIMIT >> 20} MiB, as {facts['tar']} has it")
                return path.read_bytes()

            return read_file
    tar = root if root.is_file() else root / facts["tar"]
    if not tar.is_file():
        return None

    def read_tar(member: str) -> bytes:
        wanted = f"{facts['folder']}/{member}"
        try:
            with tarfile.open(tar) as archive:
                for count, info in enumerate(archive):  # one by one: a tar of many or huge members ends here, not in memory
                    if count >= MEMBERS or info.size > LIMIT:
                        raise DataError(
                            f"{tar} holds more than {MEMBERS} files, or one of over {LIMIT >> 20} MiB; expected {facts['tar']}"
                        )
                    if info.name.removeprefix("./") != wanted:
                        continue
                    stream = archive.extractfile(info) if info.isreg() else None  # a link could lead to another member
                    if stream is None:
                        raise DataError(f"{tar}: {wanted} is a link or folder, not a file; fetch {facts['tar']} again")
                    return stream.read()
        except DataError:
            raise
        except Exception as error:  # damaged archives raise TarError, OSError, EOFError, zlib.error, ValueError, ...
            raise DataError(f"{tar} can't be read as {facts['tar']}: {error}; fetch it again") from None
        raise FileNotFoundError(wanted)

    return read_tar


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
                raise DataError(f"{name} archive member {member!r} has no list of {facts['labels'].decode()}; fetch it again")
            bad = next((v for v in labels if not 0 <= v < facts["classes"]), None)
            if bad is not None:
                raise DataError(f"{name} archive member {member!r} has a label outside 0..{facts['classes'] - 1}; fetch it again")
            if len(labels) != len(data):
                raise DataError(
                    f"{name} archive member {member!r} has {len(data)} images and {len(labels)} labels; fetch it again"
                )
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
    if isinstance(names, list) and len(names) == len(classes) and all(isinstance(n, (bytes, str)) for n in names):
        classes = tuple(n.decode(errors="replace") if isinstance(n, bytes) else n for n in names)
    return train, test, classes


def _from_npy(name: str, folder: Path) -> tuple[Any, Any, tuple[str, ...]]:
    def read(stem: str) -> np.ndarray:
        path = folder / f"{stem}.npy"
        try:  # mapped, since numpy then compares the header's size with the file's before it allocates
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            if isinstance(mapped, np.ndarray) and not mapped.dtype.hasobject:
                return np.array(mapped)
            why = "it is an archive of arrays" if not isinstance(mapped, np.ndarray) else "it holds objects"
        except Exception as error:  # numpy reads the header with Python's parser, which raises many kinds
            why = str(error) or type(error).__name__
        raise DataError(f"{path} can't be read as a plain .npy array: {why}; write it with numpy.save")

    def split(which: str) -> tuple[Tensor, Tensor]:
        x, y = read(f"{which}_x"), read(f"{which}_y")
        if (
            x.dtype != np.uint8
            or x.ndim != 4
            or 3 not in (x.shape[1], x.shape[3])
            or not np.issubdtype(y.dtype, np.integer)
            or y.ndim != 1
        ):
            raise DataError(
                f"{folder}: {which}_x is {x.dtype} {x.shape}, {which}_y {y.dtype} {y.shape}; "
                "expected uint8 (N, S, S, 3) or (N, 3, S, S), and integers (N,)"
            )
        classes = SETS[name]["classes"]
        if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):  # before uint64 could wrap into the range
            raise DataError(f"{folder}: {which}_y has labels {y.min()}..{y.max()}; expected 0..{classes - 1} for {name}")
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
