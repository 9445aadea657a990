"""CIFAR archives and arrays: every form loads equal, hostile pickles never run, damage ends in one DataError."""

import contextlib
import functools
import gzip
import io
import os
import pickle
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastffl.data import Resident, archives
from fastffl.data.resident import check
from fastffl.errors import DataError
from fastffl.recipe import Data

MEMBERS = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


def batch(member: str, rows: int = 2) -> dict[bytes, Any]:
    rng = np.random.default_rng(MEMBERS.index(member))
    labels = [int(v) for v in rng.integers(0, 10, rows)]
    return {b"batch_label": b"x", b"labels": labels, b"data": rng.integers(0, 256, (rows, 3072), dtype=np.uint8)}


def meta() -> dict[bytes, Any]:
    return {b"label_names": [f"name{k}".encode() for k in range(10)], b"num_vis": 3072}


def files(protocol: int = 2, rows: int = 2) -> dict[str, bytes]:
    made = {m: pickle.dumps(batch(m, rows), protocol) for m in MEMBERS}
    return {**made, "batches.meta": pickle.dumps(meta(), protocol)}


def unpacked(root: Path, content: dict[str, bytes]) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return root


def packed(root: Path, content: dict[str, bytes], prefix: str = "cifar-10-batches-py/") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root


def arrays(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, members in (("train", MEMBERS[:5]), ("test", MEMBERS[5:])):
        parts = [batch(m) for m in members]
        x = np.concatenate([p[b"data"] for p in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        np.save(root / f"{split}_x.npy", x)
        np.save(root / f"{split}_y.npy", np.concatenate([p[b"labels"] for p in parts]))
    return root


FORMS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda d: unpacked(d, files()),
    "the folder itself": lambda d: unpacked(d, files()) / "cifar-10-batches-py",
    "without names": lambda d: unpacked(d, {k: v for k, v in files().items() if k != "batches.meta"}),
    "protocol 0": lambda d: unpacked(d, files(0)),
    "protocol 5": lambda d: unpacked(d, files(5)),
    "tar": lambda d: packed(d, files()),
    "the tar itself": lambda d: packed(d, files()) / "cifar-10-python.tar.gz",
    "tar with ./": lambda d: packed(d, files(), "./cifar-10-batches-py/"),
    "npy": arrays,
    "npy in a folder": lambda d: arrays(d / "cifar10").parent,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str, tmp_path: Path) -> None:
    got = archives.cifar("cifar10", str(FORMS[form](tmp_path)))
    want = np.concatenate([batch(m)[b"data"] for m in MEMBERS[:5]]).reshape(-1, 3, 32, 32)
    assert got.train[0].dtype == torch.uint8 and np.array_equal(got.train[0].numpy(), want)
    assert got.train[1].tolist() == [v for m in MEMBERS[:5] for v in batch(m)[b"labels"]]
    assert np.array_equal(got.test[0].numpy().reshape(-1, 3072), batch("test_batch")[b"data"])
    assert got.test[1].tolist() == batch("test_batch")[b"labels"]
    named = "npy" not in form and form != "without names"
    assert got.classes == tuple(f"name{k}" if named else str(k) for k in range(10))
    check(got)


def test_cifar100_of_python_2(tmp_path: Path) -> None:
    """The original's pickles name numpy.core, hold str keys as bytes, and have coarse labels beside the fine ones."""
    x = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    for name in ("train", "test"):
        data = pickle.dumps({"fine_labels": [3, 99], "coarse_labels": [1, 2], "data": x}, 2)
        (tmp_path / name).write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    got = archives.cifar("cifar100", str(tmp_path))
    assert got.train[1].tolist() == [3, 99] and np.array_equal(got.train[0].view(2, -1).numpy(), x)


# ---- hostile pickles. The canary is a file; `live` ones are first shown to make it when Python's own unpickler opens them.


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def live(canary: Path) -> dict[str, bytes]:
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    system = pickle.dumps(Call(os.system, touch))
    nested = {**batch("test_batch"), b"labels": Call(os.system, touch)}
    objects = np.empty(2, dtype=object)
    objects[:] = [Call(os.system, touch), None]
    t = touch.encode()
    return {
        "os.system": system,
        "eval": pickle.dumps(Call(eval, f"__import__('os').system({touch!r})")),
        "exec": pickle.dumps(Call(exec, code)),
        "exec, protocol 0": pickle.dumps(Call(exec, code), 0),
        "subprocess": pickle.dumps(Call(subprocess.check_call, ["touch", str(canary)])),
        "partial": pickle.dumps(Call(functools.partial(os.system, touch))),
        "map called by list": pickle.dumps(Call(list, Call(map, os.system, [touch]))),
        "in the labels": pickle.dumps(nested),
        "in the labels, protocol 0": pickle.dumps(nested, 0),
        "as a key": pickle.dumps({Call(os.system, touch): 1}),
        "after the data": pickle.dumps([batch("test_batch"), Call(os.system, touch)]),
        "numpy objects": pickle.dumps({**batch("test_batch"), b"data": objects}, 2),
        "numpy objects, protocol 5": pickle.dumps({**batch("test_batch"), b"data": objects}, 5),
        "a method of a path": pickle.dumps(Call(Path.touch, canary)),
        "pickle in a pickle": pickle.dumps(Call(pickle.loads, system)),
        "exec by opcodes": b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.",
        "global opcode": b"cposix\nsystem\n(V" + t + b"\ntR.",
        "inst opcode": b"(V" + t + b"\niposix\nsystem\n.",
        "obj opcode": b"(cposix\nsystem\nV" + t + b"\no.",
        "newobj opcode": b"\x80\x02cbuiltins\nlist\ncbuiltins\nmap\ncposix\nsystem\n(lV" + t + b"\na\x86\x81\x85R.",
        "dotted name": b"\x80\x04\x8c\x07pathlib\x8c\x09os.system\x93(V" + t + b"\ntR.",
        "array filled by reduce": b"cfunctools\nreduce\n(cbuiltins\nexec\n(lV" + code.encode() + b"\na}atR.",
        "an error follows": b"cposix\nsystem\n(V" + t + b"\ntR0garbage",
    }


LIVE = list(live(Path("x")))


@pytest.mark.parametrize("name", LIVE)
def test_a_hostile_pickle_does_not_run(name: str, tmp_path: Path) -> None:
    canary, control = tmp_path / "canary", tmp_path / "control"
    with contextlib.suppress(Exception):  # the payload works: Python's own unpickler is caught by it
        pickle.loads(live(control)[name], encoding="bytes")
    assert control.exists(), "the payload is not live, so this test would prove nothing"
    bad = live(canary)[name]
    for place, root in (
        ("test_batch", unpacked(tmp_path / "a", {**files(), "test_batch": bad})),
        ("data_batch_3", packed(tmp_path / "b", {**files(), "data_batch_3": bad})),
        ("batches.meta", unpacked(tmp_path / "c", {**files(), "batches.meta": bad})),
    ):
        with pytest.raises(DataError, match=place):
            archives.cifar("cifar10", str(root))
    assert not canary.exists()


def reconstruct(shape: bytes, kind: bytes, raw: bytes) -> bytes:
    """An array as numpy writes it, with any shape, type and data."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
    dtype = b"cnumpy\ndtype\n(V" + kind + b"\nI0\nI1\ntR(I3\nV|\nNNNI-1\nI-1\nI0\ntb"
    return array + b"(I1\n" + shape + dtype + b"I00\n" + raw + b"tb"


INERT: dict[str, bytes] = {
    "empty": b"",
    "only a stop": b".",
    "text": b"hello",
    "not a dictionary": pickle.dumps([1, 2]),
    "endless array": reconstruct(b"(L1099511627776L\nI3072\nt", b"u1", b"C\x01x"),
    "negative array": reconstruct(b"(I-1\nI-1\nt", b"u1", b"C\x01x"),
    "pointers as bytes": reconstruct(b"(I1\nt", b"O8", b"C\x08AAAAAAAA"),
    "record type": reconstruct(b"(I1\nt", b"V8", b"C\x08AAAAAAAA"),
    "ndarray called": b"cnumpy\nndarray\n((L4611686018427387904L\ntVu1\ntR.",
    "name changed": b"cnumpy\nndarray\n(N}V_call\nI1\nstb.",
    "type changed": b"cnumpy\ndtype\n}V__class__\nI1\nsb.",
    "memo of gigabytes": b"Nr\xff\xff\xff\xff.",
    "bytes of gigabytes": b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00x.",
    "persistent id": b"Pevil\n.",
    "extension": b"\x80\x02\x82\x01.",
    "codec": b"c_codecs\nencode\n(Vx\nVzlib\ntR.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.dump\x93.",
    "numpy.load": b"cnumpy\nload\n(Vx\ntR.",
    "torch.load": b"ctorch\nload\n(Vx\ntR.",
    "copyreg": b"ccopyreg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.",
    "number of many digits": b"I" + b"9" * 10000 + b"\n.",
    "a deep list": b"]" * 1000 + b"a" * 999 + b".",
}


@pytest.mark.parametrize("name", INERT)
def test_a_damaged_or_odd_pickle_is_one_error(name: str, tmp_path: Path) -> None:
    root = unpacked(tmp_path, {**files(), "data_batch_1": INERT[name]})
    with pytest.raises(DataError, match="data_batch_1"):
        archives.cifar("cifar10", str(root))
    archives.cifar("cifar10", str(unpacked(tmp_path, files())))  # and nothing of it stays behind


@pytest.mark.parametrize("kind", ["link", "hard link", "folder", "outside", "missing", "many", "not a tar", "cut"])
def test_an_odd_tar_is_one_error(kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(files()["test_batch"])
    path = packed(tmp_path / "d", files()) / "cifar-10-python.tar.gz"
    if kind in ("link", "hard link", "folder", "outside", "missing"):
        with tarfile.open(path, "w:gz") as tar:
            for name, data in files().items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(data)
                if name == "data_batch_1":
                    if kind == "missing":
                        continue
                    if kind == "outside":
                        info.name = "../../cifar-10-batches-py/data_batch_1"
                    else:
                        info.size = 0
                        info.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "folder": tarfile.DIRTYPE}[kind]
                        info.linkname = str(outside) if kind == "link" else "cifar-10-batches-py/data_batch_2"
                tar.addfile(info, io.BytesIO(data) if info.size else None)
    elif kind == "many":
        with tarfile.open(path, "w:gz") as tar:
            for k in range(200):
                tar.addfile(tarfile.TarInfo(f"f{k}"))
    elif kind == "not a tar":
        path.write_bytes(gzip.compress(b"hello" * 1000))
    else:
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError):
        archives.cifar("cifar10", str(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "secret"], "nothing is written outside"


def test_labels_and_images_that_do_not_fit(tmp_path: Path) -> None:
    good = batch("data_batch_1")
    for change in (
        {b"labels": [0, 10]},
        {b"labels": [-1, 0]},
        {b"labels": [2**70, 0]},
        {b"labels": [0]},
        {b"labels": [True, False]},
        {b"labels": "01"},
        {b"labels": None},
        {b"data": good[b"data"].astype(np.float32)},
        {b"data": good[b"data"][:, :3071]},
        {b"data": None},
    ):
        root = unpacked(tmp_path, {**files(), "data_batch_1": pickle.dumps({**good, **change})})
        with pytest.raises(DataError, match="data_batch_1"):
            archives.cifar("cifar10", str(root))


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    objects = np.array([Touch()], dtype=object)
    x, y = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    for name, value in {
        "train_x": x.astype(np.float32),
        "test_x": x[:, :, :16],
        "train_y": y + 10,
        "test_y": y - 1,
        "train_y ": np.full(4, 2**64 - 1, np.uint64),
        "test_y ": y.astype(float),
        "train_x ": objects,
        "train_y  ": y[:3],
        "test_x  ": np.zeros((4, 32, 32, 4), np.uint8),
        "test_x   ": x[:0],
    }.items():
        root = arrays(tmp_path / "d")
        np.save(root / f"{name.strip()}.npy", value, allow_pickle=True)
        with pytest.raises(DataError):
            Resident(archives.cifar("cifar10", str(root)), Data(name="cifar10"), place())
    root = arrays(tmp_path / "d")
    np.savez(root / "z.npz", x=x)
    (root / "z.npz").rename(root / "train_x.npy")
    with pytest.raises(DataError, match=r"train_x.npy"):
        archives.cifar("cifar10", str(root))
    (root / "train_x.npy").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(DataError, match=r"train_x.npy"):
        archives.cifar("cifar10", str(root))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 32, 32, 3), }".ljust(117) + b"\n"
    (root / "train_x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"x" * 100)
    with pytest.raises(DataError, match=r"train_x.npy"):
        archives.cifar("cifar10", str(root))
    assert not (tmp_path / "canary").exists()


def place() -> Any:
    from fastffl.data import Place

    return Place()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, removed or added; mostly where structure is, at the ends."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        far = rng.random() < 0.2
        at = (
            rng.randrange(len(out))
            if far
            else rng.choice((rng.randrange(min(300, len(out))), -1 - rng.randrange(min(200, len(out)))))
        )
        kind = rng.random()
        if kind < 0.7:
            out[at] = rng.randrange(256)
        elif kind < 0.8:
            del out[at]
        elif kind < 0.9:
            out.insert(at, rng.randrange(256))
        else:
            out = out[: rng.randrange(1, len(out))] if rng.random() < 0.5 else out + out[:50]
        if len(out) < 5:
            break
    return bytes(out)


def survives(root: Path) -> bool:
    """Whether a mutated data set loads; anything but a valid one or a DataError is a failure of the test."""
    try:
        got = archives.cifar("cifar10", str(root))
        check(got)
    except DataError as error:
        assert str(error)
        return False
    assert got.train[0].shape[1:] == (3, 32, 32) and got.train[0].dtype == torch.uint8
    assert len(got.classes) == 10 and all(isinstance(c, str) for c in got.classes)
    return True


def test_mutated_archives(tmp_path: Path) -> None:
    rng = random.Random(11)
    loaded = 0
    for protocol in (0, 2, 5):
        content = files(protocol)
        root = unpacked(tmp_path / str(protocol), content)
        for _ in range(150):
            member = rng.choice(("data_batch_1", "data_batch_1", "batches.meta"))
            path = root / "cifar-10-batches-py" / member
            path.write_bytes(mutate(content[member], rng))
            loaded += survives(root)
            path.write_bytes(content[member])
    assert 20 < loaded < 430, "some mutants hit pixels, most hit structure"


def test_mutated_tars(tmp_path: Path) -> None:
    rng = random.Random(12)
    path = packed(tmp_path, files(2, 1)) / "cifar-10-python.tar.gz"
    whole = path.read_bytes()
    plain = gzip.decompress(whole)
    refused = 0
    for k in range(150):
        path.write_bytes(mutate(whole, rng) if k % 2 else gzip.compress(mutate(plain, rng), 1))
        refused += not survives(path)
    assert refused > 50


def test_mutated_arrays(tmp_path: Path) -> None:
    rng = random.Random(13)
    root = arrays(tmp_path)
    refused = 0
    for stem in ("train_x", "test_y"):
        path = root / f"{stem}.npy"
        whole = path.read_bytes()
        for _ in range(100):
            path.write_bytes(mutate(whole[:128], rng) + whole[128:])
            refused += not survives(root)
        path.write_bytes(whole)
    assert refused > 50
