"""Checkpoints: no kill, crash, full disk, flipped bit or foreign file costs one that was acknowledged, or runs anything."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastffl.errors import CheckpointError, DiskError
from fastffl.train import checkpoint
from tests.train import tiny


def state(step: int, size: int = 500) -> dict[str, Any]:
    return {"learner": {"w": torch.full((size,), float(step))}, "position": {"step": step}, "recipe": "{}"}


def put(folder: Path, step: int, **more: Any) -> None:
    checkpoint.save(folder, state(step), step, {}, **more)


def step_in(folder: Path, warn: Callable[[str], None] | None = None) -> int | None:
    """Step of the newest whole checkpoint, after a look at its contents."""
    found = checkpoint.newest(folder, warn=warn)
    if found is None:
        return None
    step = int(found["position"]["step"])
    assert torch.equal(found["learner"]["w"], torch.full_like(found["learner"]["w"], float(step)))
    return step


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def files(*steps: str) -> list[str]:
    return sorted(f"step-{s}.{kind}" for s in steps for kind in ("json", "pt"))


# ---- what a folder holds


def test_the_newest_are_kept_and_the_rest_go(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    assert checkpoint.newest(folder) is None
    for step in (3, 9, 12):
        put(folder, step)
        assert step_in(folder) == step
    assert names(folder) == files("000000009", "000000012")
    put(folder, 12)  # the same step again: never over one that counts
    assert names(folder) == files("000000012", "000000012-1")
    put(folder, 12)
    assert names(folder) == files("000000012-1", "000000012-2")
    put(folder, 10)  # gone back behind 12: a later resume must not jump there
    assert names(folder) == files("000000010") and step_in(folder) == 10
    put(folder, 11, keep=1)
    assert names(folder) == files("000000011")


def test_what_crashes_left_is_swept(tmp_path: Path) -> None:
    put(tmp_path, 5)
    for left in (".step-000000006.pt.77.tmp", "step-000000006.pt", "step-000000007.json"):
        (tmp_path / left).write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("a user's own")
    assert step_in(tmp_path) == 5
    put(tmp_path, 6)
    assert names(tmp_path) == [*sorted(["notes.txt", *files("000000005", "000000006")])]


def test_the_sidecar_tells_what_the_file_is(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(4), 4, {"epoch": 2})
    note = json.loads((tmp_path / "step-000000004.json").read_text())
    data = (tmp_path / "step-000000004.pt").read_bytes()
    assert note == {"format": 1, "step": 4, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "epoch": 2}


def test_everything_a_run_saves_loads_as_plain_data(tmp_path: Path) -> None:
    tiny.train(tmp_path / "run", tiny.recipe(sched__epochs=1, ema__decay=0.9, amp__enabled=True, amp__dtype="fp16"))
    for folder in ("last", "best"):
        (path,) = (tmp_path / "run" / folder).glob("*.pt")
        torch.load(path, weights_only=True)


def test_digest_tells_every_kind_of_difference() -> None:
    a: dict[str, Any] = {"x": torch.arange(6.0).view(2, 3), "y": [1, None, True], "z": {"k": 0.5}}
    same = {"z": {"k": 0.5}, "y": [1, None, True], "x": torch.arange(6.0).view(2, 3).t().contiguous().t()}
    assert checkpoint.digest(a) == checkpoint.digest(same)
    others: list[Any] = [
        {**a, "x": a["x"].double()},
        {**a, "x": a["x"].view(3, 2)},
        {**a, "x": a["x"] * (1 + 2**-22)},
        {**a, "y": [1, None]},
        {**a, "y": [1, None, 1]},
        {**a, "z": {"k": 0.5000000001}},
        {**a, "z": {"l": 0.5}},
        {k: v for k, v in a.items() if k != "z"},
    ]
    zeros = {"x": torch.zeros(2)}, {"x": -torch.zeros(2)}
    assert checkpoint.digest(zeros[0]) != checkpoint.digest(zeros[1])
    assert len({checkpoint.digest(o) for o in [a, *others]}) == 1 + len(others)


# ---- kill -9


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work(pipe)` in a child of this process; (its id, the pipe's end to read)."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child only saves and leaves
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            work(write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return child, read


def told(pipe: int) -> list[int]:
    """Steps a child wrote to its pipe, until its end."""
    data = b""
    while part := os.read(pipe, 65536):
        data += part
    os.close(pipe)
    return [int(line) for line in data.split(b"\n")[: data.count(b"\n")]]


def killed(work: Callable[[int], None], after: float) -> list[int]:
    """What the child acknowledged before it was killed, `after` seconds from its first word on."""
    child, pipe = fork(work)
    first = os.read(pipe, 64)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    rest = told(pipe)
    os.waitpid(child, 0)
    return [*[int(line) for line in first.split()], *rest]


def test_a_hundred_kills_lose_no_acknowledged_checkpoint(tmp_path: Path) -> None:
    folder, rng = tmp_path / "last", random.Random(1)
    folder.mkdir()
    swept = 0

    def work(pipe: int) -> None:
        step = step_in(folder) or 0
        os.write(pipe, f"{step}\n".encode())
        while True:
            step += rng.random() < 0.7  # else the same step again
            checkpoint.save(folder, state(step, 30_000), step, {})
            os.write(pipe, f"{step}\n".encode())

    acknowledged = 0
    for _ in range(120):
        acknowledged = killed(work, rng.uniform(0, 0.02))[-1]
        left = set(names(folder))
        swept += any(n.endswith(".tmp") or (n.endswith(".pt") and n[:-2] + "json" not in left) for n in left)
        found = step_in(folder) if acknowledged else 0
        assert found is not None and found >= acknowledged
    assert acknowledged > 10  # the children did save
    assert swept > 5  # and were killed in the middle of it


def test_control_saving_straight_onto_the_file_loses(tmp_path: Path) -> None:
    path, rng = tmp_path / "last.pt", random.Random(1)

    def work(pipe: int) -> None:
        torch.save(state(0, 2_000_000), path)
        for step in range(10_000):
            os.write(pipe, f"{step}\n".encode())
            torch.save(state(step + 1, 2_000_000), path)

    lost = 0
    for _ in range(12):
        killed(work, rng.uniform(0, 0.03))
        try:
            torch.load(path, weights_only=True)
        except Exception:
            lost += 1
    assert lost > 0


# ---- a crash at every system call


class Crash(BaseException):
    """The machine stops here: nothing after it happens."""


CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir", "listdir")


@contextlib.contextmanager
def crash_at(n: int, after: bool) -> Iterator[list[str]]:
    """Stop before or after system call number `n` of the block (a write of it half done); yields the calls made."""
    made: list[str] = []
    dead = False

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal dead
            if dead:
                if name == "close":
                    real(*args)  # the kernel closes a dead process's files
                raise Crash
            made.append(name)
            if len(made) - 1 != n:
                return real(*args, **kwargs)
            dead = True
            if name == "close":
                real(*args)
            elif name == "write" and not after:
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            elif after:
                real(*args, **kwargs)
            raise Crash

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield made


SITUATIONS: dict[str, tuple[list[int], int, int]] = {
    "first": ([], 5, 2),
    "second": ([5], 9, 2),
    "third": ([5, 9], 12, 2),
    "only one kept": ([5], 9, 1),
    "same step again": ([5], 5, 1),
    "after going back": ([5, 9], 7, 2),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_system_call_loses_nothing(tmp_path: Path, situation: str, after: bool) -> None:
    before, step, keep = SITUATIONS[situation]
    seen = 0
    for n in range(1000):
        folder = tmp_path / str(n)
        for old in before:
            put(folder, old, keep=keep)
        (folder / ".step-000000001.pt.1.tmp").write_bytes(b"left") if before else None
        done = False
        with crash_at(n, after) as made, contextlib.suppress(Crash):
            put(folder, step, keep=keep)
            done = True
        if done:
            break
        seen = n + 1
        found = step_in(folder)
        assert found in (before[-1] if before else None, step), (n, made)
        put(folder, step + 1, keep=keep)  # the next run saves as if nothing had been
        assert step_in(folder) == step + 1
        assert not [x for x in names(folder) if x.endswith(".tmp")]
        assert len(names(folder)) <= 2 * keep
    assert seen > 14  # two files of seven calls each, at least


def test_control_a_saver_that_deletes_first_is_caught(tmp_path: Path) -> None:
    """The crash points above do find a saver that unlinks the old file before it renames the new one."""

    def careless(path: Path, data: bytes) -> None:
        temp = path.with_suffix(".tmp")
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT)
        os.write(fd, data)
        os.fsync(fd)
        os.close(fd)
        path.unlink(missing_ok=True)
        os.replace(temp, path)

    path = tmp_path / "last.pt"
    lost = 0
    for n in range(7):
        path.write_bytes(b"old")
        with crash_at(n, after=True), contextlib.suppress(Crash):
            careless(path, b"new")
        lost += not path.exists()
    assert lost == 1


def test_calls_come_in_the_order_that_survives_power_loss(tmp_path: Path) -> None:
    """For each file: write < fsync < rename < fsync of the folder; old ones go after all of it."""
    folder = tmp_path / "last"
    put(folder, 1)
    put(folder, 2)
    log: list[str] = []
    paths: dict[int, str] = {}
    with pytest.MonkeyPatch.context() as patch:

        def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                out = real(*args, **kwargs)
                if name == "open":
                    paths[out] = re.sub(r"\.\d+\.tmp$", ".tmp", Path(args[0]).name)
                on = paths.get(args[0]) if name in ("write", "fsync", "close") else Path(args[0]).name
                if name in ("write", "fsync", "replace", "unlink") and not str(on).endswith(f"{os.getpid()}.tmp"):
                    log.append(f"{name} {on}")
                elif name == "replace":
                    log.append(f"replace {Path(args[1]).name}")
                return out

            return call

        for name in CALLS[:6]:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        with contextlib.suppress(FileNotFoundError):
            put(folder, 3)
    pt, note = "step-000000003.pt", "step-000000003.json"
    want = []
    for name in (pt, note):
        want += [f"write .{name}.tmp", f"fsync .{name}.tmp", f"replace {name}", "fsync last"]
    assert log == [*want, "unlink step-000000001.json", "unlink step-000000001.pt"]


# ---- a disk that is full


@contextlib.contextmanager
def failing(name: str, n: int, code: int = errno.ENOSPC) -> Iterator[list[int]]:
    """Call number `n` (0-based) of os.NAME in the block and all later ones fail; yields the calls counted."""
    count: list[int] = []
    real = getattr(os, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        if len(count) > n:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, call)
        yield count


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path: Path, name: str) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    for n in range(4 if name in ("open", "fsync") else 2):
        with failing(name, n) as count, pytest.raises(DiskError) as raised:
            put(tmp_path, 3)
        assert len(count) > n
        assert re.search(r"cannot write .*step-000000003\.(pt|json): No space left on device \(need \d", str(raised.value))
        assert "what was saved before is intact" in str(raised.value)
        assert step_in(tmp_path) in ((2, 3) if name in ("open", "fsync") and n == 3 else (2,))
        assert not [x for x in names(tmp_path) if x.endswith(".tmp")]
    put(tmp_path, 3)
    assert step_in(tmp_path) == 3
    assert "step-000000003" in "".join(names(tmp_path)) and len(names(tmp_path)) == 4


def test_a_file_size_limit_is_told_and_survived(tmp_path: Path) -> None:
    put(tmp_path, 1)

    def work(pipe: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            checkpoint.save(tmp_path, state(2, 50_000), 2, {})
        except DiskError as error:
            os.write(pipe, str(error).encode())

    child, pipe = fork(work)
    text = os.read(pipe, 10_000).decode()
    os.close(pipe)
    assert os.waitpid(child, 0)[1] == 0
    assert "File too large (need 0.2 MiB, free " in text
    assert step_in(tmp_path) == 1 and names(tmp_path) == files("000000001")


def test_a_temp_of_the_same_process_id_is_no_obstacle(tmp_path: Path) -> None:
    """In a container every run has the same process id, so a killed one leaves the name that the next one wants."""
    path = tmp_path / "rows.jsonl"
    (tmp_path / f".{path.name}.{os.getpid()}.tmp").write_text("left")
    checkpoint.write_file(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["rows.jsonl"]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "last"
    folder.mkdir()
    (folder / f".step-000000001.pt.{os.getpid()}.tmp").symlink_to(victim)
    put(folder, 1)
    assert victim.read_text() == "precious" and step_in(folder) == 1


def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "last").write_text("a file where the folder should be")
    with pytest.raises(DiskError, match=r"cannot write .*last"):
        put(tmp_path / "last", 1)


# ---- damage


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    put(tmp_path, 1)
    path = tmp_path / "step-000000001.pt"
    whole, rng = path.read_bytes(), random.Random(2)
    for _ in range(200):
        at = rng.randrange(8 * len(whole))
        bad = bytearray(whole)
        bad[at // 8] ^= 1 << at % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is not the one noted"):
            checkpoint.read(path)
    path.write_bytes(whole)
    assert step_in(tmp_path) == 1


def test_a_flipped_bit_in_the_sidecar_is_noticed_or_harmless(tmp_path: Path) -> None:
    put(tmp_path, 1)
    path = tmp_path / "step-000000001.json"
    whole, rng = path.read_bytes(), random.Random(3)
    noticed = 0
    for _ in range(200):
        at = rng.randrange(8 * len(whole))
        bad = bytearray(whole)
        bad[at // 8] ^= 1 << at % 8
        path.write_bytes(bad)
        try:
            assert step_in(tmp_path) == 1
        except CheckpointError:
            noticed += 1
    assert noticed > 100


def swap(folder: Path) -> None:
    a, b = (folder / f"step-00000000{s}.json" for s in (2, 3))
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda f: os.truncate(f / "step-000000003.pt", 700),
    "empty": lambda f: os.truncate(f / "step-000000003.pt", 0),
    "empty sidecar": lambda f: os.truncate(f / "step-000000003.json", 0),
    "sidecar of another kind": lambda f: (f / "step-000000003.json").write_text("[1, 2]"),
    "sidecar not text": lambda f: (f / "step-000000003.json").write_bytes(b"\xff\xfe"),
    "folder for a file": lambda f: ((f / "step-000000003.pt").unlink(), (f / "step-000000003.pt").mkdir()),
    "swapped sidecars": swap,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_one_before_is_used_with_a_warning(tmp_path: Path, kind: str) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step, keep=3)
    DAMAGE[kind](tmp_path)
    said: list[str] = []
    assert step_in(tmp_path, said.append) == (1 if kind == "swapped sidecars" else 2)
    assert len(said) == 1 and "step-000000003" in said[0] and said[0].endswith(f"step {step_in(tmp_path)} instead")


def test_all_damaged_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    for path in tmp_path.glob("*.pt"):
        os.truncate(path, 10)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint .*\(2 found, 2 damaged\).*--resume never and another --out"):
        checkpoint.newest(tmp_path)


def test_another_format_is_told(tmp_path: Path) -> None:
    put(tmp_path, 1)
    note = tmp_path / "step-000000001.json"
    note.write_text(note.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="has checkpoint format 2; this version reads 1"):
        checkpoint.read(tmp_path / "step-000000001.pt")


# ---- foreign files


class Payload:
    """Unpickles by calling what it was given."""

    def __init__(self, call: Callable[..., Any], *args: Any):
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


class Custom:
    """A class of the file's own making whose state setter runs code."""

    def __init__(self, path: str):
        self.path = path

    def __setstate__(self, value: dict[str, str]) -> None:
        Path(value["path"]).touch()


def saved(value: Any, **more: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def in_tar(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def in_zip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/version", "3\n")
    return buffer.getvalue()


def payloads(canary: Path) -> dict[str, bytes]:
    """Files that leave `canary` behind, or would like to, when they are loaded."""
    touch = f"touch {canary}"
    system = Payload(os.system, touch)
    looks_real = {"learner": system, "position": {"step": 1}, "recipe": "{}"}
    return {
        "os.system": saved({**looks_real}),
        "eval": saved({"learner": Payload(eval, f"open({str(canary)!r}, 'w').close()"), "position": 1, "recipe": ""}),
        "partial": saved({"learner": functools.partial(os.system, touch), "position": 1, "recipe": ""}),
        "custom class": saved({"learner": Custom(str(canary)), "position": 1, "recipe": ""}),
        "legacy format": saved(looks_real, _use_new_zipfile_serialization=False),
        "raw pickle": pickle.dumps(looks_real),
        "tar": in_tar(pickle.dumps(looks_real)),
        "hand-made zip": in_zip(pickle.dumps(looks_real, protocol=2)),
        "no pickle at all": b"\x89PNG\r\n" + bytes(100),
        "empty": b"",
        "tensors of something else": saved({"conv1.weight": torch.zeros(3)}),
        "a list": saved([torch.zeros(3)]),
    }


RUNS = ("os.system", "eval", "custom class", "legacy format", "hand-made zip")


@pytest.mark.parametrize("forced", [False, True])
def test_no_foreign_file_runs_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool) -> None:
    """With a sidecar whose digest is right, so that the loader is really reached."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    for name, data in payloads(canary).items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        (folder / "step-000000001.pt").write_bytes(data)
        note = {"format": checkpoint.FORMAT, "step": 1, "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "step-000000001.json").write_text(json.dumps(note))
        with pytest.raises(CheckpointError, match="is not a fastffl checkpoint") as raised:
            checkpoint.read(folder / "step-000000001.pt")
        assert "weights_only" not in str(raised.value)  # torch's own text suggests an unsafe load
        assert not canary.exists(), name


@pytest.mark.parametrize("name", RUNS)
def test_control_an_unsafe_load_does_run_it(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    data = payloads(canary)[name]
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(data), weights_only=False)
    assert canary.exists()


# ---- keep-last against a model


@pytest.mark.parametrize("seed", range(4))
def test_no_sequence_of_saves_and_failures_loses_the_good_one(tmp_path: Path, seed: int) -> None:
    """Random saves, full disks, crashes, damage and turning back: the newest acknowledged and undamaged one is found."""
    rng, folder = random.Random(seed), tmp_path / "last"
    step, value = 1, 0  # `value` is what is stored: it tells two saves of one step apart
    expected: tuple[int, int] | None = None  # (step, value) of the newest that was acknowledged and is undamaged
    ops = dict.fromkeys(("save", "full", "crash", "damage", "back"), 0)
    put_value = functools.partial(checkpoint.save, folder, facts={})

    def stored() -> tuple[int, int] | None:
        found = checkpoint.newest(folder)
        return None if found is None else (found["position"]["step"], found["position"]["value"])

    def snapshot() -> dict[str, Any]:
        return {**state(step, 10), "position": {"step": step, "value": value}}

    for _ in range(130):
        op = rng.choices(list(ops), (4, 3, 3, 2, 1))[0]
        if op == "damage":
            paths = [folder / f"{checkpoint._stem(at)}.pt" for at in checkpoint.whole(folder)]
            try:
                newest, (_, older) = paths[0], [checkpoint.read(path)["position"] for path in paths]
            except (CheckpointError, ValueError, IndexError):
                continue  # fewer than two good ones: no saver could help
            newest.write_bytes(newest.read_bytes()[:-1] + b"?")
            expected = older["step"], older["value"]
        ops[op] += 1
        value += 1
        if op == "back":
            step = expected[0] if expected else 1
        elif op == "save":
            step += rng.randrange(2)
            put_value(snapshot(), step)
            expected = step, value
        elif op == "full":
            with failing(rng.choice(["open", "write", "fsync", "replace"]), rng.randrange(4)), contextlib.suppress(DiskError):
                put_value(snapshot(), step)
        elif op == "crash":
            with crash_at(rng.randrange(30), rng.random() < 0.5), contextlib.suppress(Crash):
                put_value(snapshot(), step)
        if op in ("full", "crash") and (now := stored()) is not None and now[1] == value:
            expected = now  # not acknowledged, yet whole
        assert stored() == expected, op
    assert all(n > 5 for n in ops.values()), ops
