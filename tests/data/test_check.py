"""fastffl data check: every kind of bad file found and named, nothing lost to a kill, changed bytes found by their hash."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.badimages import FILES, UNUSABLE, encoded, mutants, photograph, rotten

from fastffl.data import check as module
from fastffl.data import processes
from fastffl.data.check import check
from fastffl.data.manifest import splits
from fastffl.data.processes import Lost, each
from fastffl.errors import DataError, Interrupted, UsageError

from .test_manifest import ODD
from .test_shards import pack


def images(root: Path, counts: dict[str, int]) -> Path:
    """Small good PNGs, all different."""
    seed = 0
    for name, n in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            seed += 1
            (root / name / f"{k:03}.png").write_bytes(encoded("PNG", photograph(20, 20, seed)))
    return root


def kinds(report: module.Report) -> set[tuple[str, str]]:
    return {(p.path, p.kind) for p in report.problems}


def manifest(report: module.Report) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(report.manifest).read_text().splitlines()]


SMALL = {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2}


def test_twenty_bad_files_are_found_and_named(tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    for k, (name, (make, _)) in enumerate(FILES.items()):
        (root / ("train" if k % 2 else "val") / "ab"[k % 4 // 2] / name).write_bytes(make())
    report = check(str(root), workers=2)
    where = {Path(p).name: p for p in (r["path"] for r in manifest(report)) if isinstance(p, str)}
    wanted = {(where[name], kind) for name, (_, kind) in FILES.items() if kind}
    same = {p for p in report.problems if p.kind in ("duplicate", "leak")}
    assert kinds(report) - {(p.path, p.kind) for p in same} == wanted and len(FILES) == 20
    assert report.code == 1 and report.images == 30 and report.classes == 2 and report.unusable == len(UNUSABLE) == 10
    for p in report.problems:
        if p.kind == "bomb":
            assert "million" in p.why
    left_out = splits(str(root))
    assert left_out.excluded == 10 and not {Path(f).name for f in left_out.train.files} & UNUSABLE
    rows = {Path(str(r["path"])).name: r for r in manifest(report)}
    assert {name for name, r in rows.items() if r["width"] == 0} == UNUSABLE
    assert (rows["grey.JPEG"]["width"], rows["grey.JPEG"]["height"], rows["grey.JPEG"]["problem"]) == (400, 300, None)
    text = Path(report.exclude).read_text()
    assert re.search(r"# truncated: .*\n(train|val)/[ab]/half\.JPEG\n", text)


def test_a_good_data_set(tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    report = check(str(root), workers=1)
    assert report.code == 0 and not report.problems and report.splits == {"train": 6, "val": 4}
    assert report.document["images"] == 10 and splits(str(root)).excluded == 0
    assert sorted(p.name for p in (root / ".fastffl").iterdir()) == [".lock", "exclude.txt", "manifest.jsonl"]
    row = manifest(report)[0]
    assert [*row] == ["path", "split", "class", "bytes", "sha256", "width", "height", "problem"]
    assert row["path"] == "train/a/000.png" and row["class"] == "a" and row["width"] == 20
    assert row["bytes"] == (root / "train/a/000.png").stat().st_size


def test_what_lies_about(tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    (root / "train" / "a" / "link.jpg").symlink_to("nowhere")
    os.mkfifo(root / "train" / "b" / "pipe.jpg")
    (root / "train" / "b" / "notes.txt").write_bytes(b"x")
    (root / "train" / "loose.png").write_bytes(encoded("PNG"))
    (root / "train" / "a" / "copy.png").write_bytes((root / "train" / "a" / "000.png").read_bytes())
    (root / "train" / "b" / "copy.png").write_bytes((root / "train" / "a" / "001.png").read_bytes())
    (root / "val" / "b" / "seen.png").write_bytes((root / "train" / "b" / "001.png").read_bytes())
    report = check(str(root), workers=1)
    assert kinds(report) == {
        ("train/a/link.jpg", "dangling link"),
        ("train/b/pipe.jpg", "not a file"),
        ("train/b/notes.txt", "stray"),
        ("train/loose.png", "stray"),
        ("train/a/copy.png", "duplicate"),
        ("train/b/copy.png", "duplicate"),
        ("val/b/seen.png", "leak"),
    }
    why = {p.path: p.why for p in report.problems}
    assert why["train/b/copy.png"] == "the same bytes as train/a/001.png in train, of class a"
    assert why["val/b/seen.png"] == "the same bytes as train/b/001.png in train"
    assert report.code == 1 and splits(str(root)).excluded == 2, "a run can start: the link and the pipe are left out"


def test_classes_that_differ_and_empty_ones(tmp_path: Path) -> None:
    root = images(tmp_path / "x", {"train/a": 2, "train/b": 2, "val/a": 2, "val/c": 2})
    report = check(str(root), workers=1)
    assert report.code == 1 and kinds(report) == {("val", "classes differ")}
    assert report.problems[0].why == "only in train: b; only in val: c"
    root = images(tmp_path / "y", {"train/a": 2, "train/b": 0, "val/a": 2, "val/b": 1})
    (root / "val" / "b" / "000.png").write_bytes(b"")
    report = check(str(root), workers=1)
    assert kinds(report) == {("train/b", "empty class"), ("val/b", "empty class"), ("val/b/000.png", "empty")}
    root = images(tmp_path / "z", {"a": 2, "b": 1})
    report = check(str(root), workers=1)
    assert kinds(report) == {(".", "layout")} and "class b has one image" in report.problems[0].why and report.code == 1


def test_the_held_out_tenth_is_a_split(tmp_path: Path) -> None:
    for top in ("", "train/"):
        root = images(tmp_path / f"d{len(top)}", {f"{top}a": 12, f"{top}b": 12})
        held = splits(str(root)).test.files[0]
        (root / top / "a" / "copy.png").write_bytes((root / top / held).read_bytes())
        report = check(str(root), workers=1)
        assert report.splits == {"train": 23, "test": 2} and {p.kind for p in report.problems} == {"leak"}
        assert {r["path"] for r in manifest(report) if r["split"] == "test"} == {top + f for f in splits(str(root)).test.files}


def test_any_name_survives(tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    for k, name in enumerate(ODD):
        (root / "train" / "a" / f"{name}.jpg").write_bytes(b"" if k % 2 else encoded(image=photograph(32, 32, 100 + k)))
    report = check(str(root), workers=1)
    bad = {f"train/a/{name}.jpg" for name in ODD[1::2]}
    assert {p.path for p in report.problems} == bad and {r["path"] for r in manifest(report) if r["problem"]} == bad
    assert {*json.loads(json.dumps(report.document))["problems"][0]} == {"path", "kind", "why"}
    assert splits(str(root)).excluded == len(bad)
    assert check(str(root), workers=1).problems == report.problems


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    with (root / "train" / "a" / "huge.jpg").open("wb") as file:
        file.truncate(2**41)
    report = check(str(root), workers=1)
    assert kinds(report) == {("train/a/huge.jpg", "bomb")} and "2,199,023,255,552 bytes" in report.problems[0].why


# ---- a second look


def test_mutated_jpegs_end_no_check_and_every_changed_byte_is_found(tmp_path: Path) -> None:
    """1,000 mutants: no crash, no hang, each in the manifest; and with one of the originals all of them are found."""
    changed = mutants(1000)
    for k in range(1000):
        path = tmp_path / "train" / f"c{k % 2}" / f"{k:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image=photograph(24, 24, k), quality=60))
    images(tmp_path, {"val/c0": 1, "val/c1": 1})
    first = check(str(tmp_path), workers=2)
    assert first.code == 0 and not first.problems
    for k in range(1000):
        (tmp_path / "train" / f"c{k % 2}" / f"{k:04}.jpg").write_bytes(changed[k])
    second = check(str(tmp_path), workers=2)
    found = [p for p in second.problems if p.kind in module.UNUSABLE]
    assert len({p.path for p in found}) == 1000 == second.unusable
    count = Counter(p.kind for p in found)
    assert not count["kills"] + count["hangs"] + count["unreadable"]
    assert count["changed"] > 200, "many mutants decode; nothing but the hash shows them"
    assert count["truncated"] + count["damaged"] + count["not an image"] + count["bomb"] > 200
    third = check(str(tmp_path), workers=2)
    assert [p for p in third.problems if p.kind in module.UNUSABLE] == found, "looking again accepts nothing"


def test_rot_that_decodes_is_found_until_it_is_mended_or_meant(tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    victim = root / "train" / "a" / "photo.jpg"
    good = encoded()
    victim.write_bytes(good)
    assert check(str(root), workers=1).code == 0
    bad = rotten(good)
    assert bad != good and len(bad) == len(good)
    times = victim.stat()
    victim.write_bytes(bad)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rot does
    for _ in range(2):
        report = check(str(root), workers=1)
        assert kinds(report) == {("train/a/photo.jpg", "changed")} and report.code == 1 and splits(str(root)).excluded == 1
        assert "bytes changed since the last check" in report.problems[0].why and "--again" in report.problems[0].why
    victim.write_bytes(good)
    assert check(str(root), workers=1).code == 0 and splits(str(root)).excluded == 0
    victim.write_bytes(bad)
    assert check(str(root), workers=1, again=True).code == 0
    victim.unlink()
    report = check(str(root), workers=1)
    assert kinds(report) == {("train/a/photo.jpg", "gone")} and report.code == 0


def test_a_bad_file_that_was_replaced_is_good(tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    victim = root / "train" / "a" / "photo.jpg"
    victim.write_bytes(encoded()[:-500])
    assert check(str(root), workers=1).code == 1
    victim.write_bytes(encoded())
    assert check(str(root), workers=1).code == 0


def test_what_the_last_check_decoded_is_only_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images(tmp_path, SMALL)
    first = Path(check(str(root), workers=1).manifest).read_bytes()
    monkeypatch.setattr(module, "look", lambda *_: os._exit(1))
    assert Path(check(str(root), workers=1).manifest).read_bytes() == first


# ---- killed, and going on


def test_kill_9_in_the_middle_and_go_on(tmp_path: Path) -> None:
    root = images(tmp_path / "d", {"train/a": 150, "train/b": 150, "val/a": 2, "val/b": 2})
    (root / "train" / "a" / "bad.png").write_bytes(b"no")
    whole = check(str(root), str(tmp_path / "whole"), workers=2)
    out = tmp_path / "killed"
    code = (
        "import sys, time\nfrom fastffl.data import check as c\nlook = c.look\n"
        "c.look = lambda *a: (time.sleep(0.005), look(*a))[1]\n"
        f"c.check({str(root)!r}, {str(out)!r}, workers=2)"
    )
    done = 0
    for least in (40, 120):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        while not ((out / "progress.jsonl").exists() and (out / "progress.jsonl").read_bytes().count(b"\n") > least):
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.wait()
        assert not (out / "manifest.jsonl").exists()
        lines = (out / "progress.jsonl").read_bytes()
        assert lines.count(b"\n") > done
        done = lines.count(b"\n")
        with (out / "progress.jsonl").open("ab") as file:
            file.write(b'["train/a/0')  # a kill in the middle of a line
    looked = tmp_path / "looked"
    look = module.look

    def count(name: str, *more):  # type: ignore[no-untyped-def]
        with looked.open("a") as file:
            file.write("x\n")
        return look(name, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "look", count)
        report = check(str(root), str(out), workers=2)
    assert len(looked.read_text().splitlines()) == 305 - done, "what was found before is not looked at again"
    assert report.document | {"manifest": "", "exclude": ""} == whole.document | {"manifest": "", "exclude": ""}
    for name in ("manifest.jsonl", "exclude.txt"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "progress.jsonl").exists()


@pytest.mark.parametrize("answer", ["None", "bytes(2**22)"], ids=["wait for work", "send more than a pipe holds"])
def test_workers_of_a_killed_check_end(answer: str, tmp_path: Path) -> None:
    code = (
        "import os, time\nfrom fastffl.data.processes import each\n"
        f"def work(k):\n    open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close(); time.sleep(0.05)\n    return {answer}\n"
        "list(each(work, range(10**6), 2))"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    while len(list(tmp_path.iterdir())) < 2:
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    for path in tmp_path.iterdir():
        for _ in range(1000):
            if not Path(f"/proc/{path.name}").exists():
                break
            time.sleep(0.01)
        assert not Path(f"/proc/{path.name}").exists()


def test_a_file_changed_after_a_kill_is_looked_at_again(tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    name = "train/a/000.png"
    old, other = (root / name).stat(), (root / "train/a/001.png").stat()
    (root / ".fastffl").mkdir()
    rows = [
        [name, old.st_size, old.st_mtime_ns - 1, "00" * 32, 7, 7, []],
        ["train/a/001.png", other.st_size, other.st_mtime_ns, "11" * 32, 8, 8, []],
    ]
    (root / ".fastffl" / "progress.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = manifest(check(str(root), workers=1))
    assert [r["width"] for r in found[:2]] == [20, 8], "the first has another time, the second is believed"


def test_interrupted_by_a_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images(tmp_path, SMALL)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(processes.Bar, "step", interrupt)
        with pytest.raises(Interrupted, match="the same command goes on") as caught:
            check(str(root), workers=1)
    assert caught.value.exit_code == 130
    assert check(str(root), workers=1).code == 0


# ---- processes


def test_an_image_that_ends_its_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = images(tmp_path, {"train/a": 20, "train/b": 20, "val/a": 2, "val/b": 2})
    look = module.look

    def deadly(name: str, *more):  # type: ignore[no-untyped-def]
        if name.endswith("a/007.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        if name.endswith("train/b/003.png"):
            time.sleep(1000)
        return look(name, *more)

    monkeypatch.setattr(module, "look", deadly)
    monkeypatch.setattr(module, "each", lambda *args: each(*args, limit=1.0))
    report = check(str(root), workers=2)
    assert kinds(report) == {("train/a/007.png", "kills"), ("train/b/003.png", "hangs")}
    why = {p.path: p.why for p in report.problems}
    assert "SIGKILL" in why["train/a/007.png"] and "no answer in 1 s" in why["train/b/003.png"]
    assert splits(str(root)).excluded == 2 and len(manifest(report)) == 44


@pytest.mark.parametrize("ordered", [False, True])
def test_every_number_is_answered_once(ordered: bool, tmp_path: Path) -> None:
    def work(k: int) -> int:
        flag = tmp_path / str(k)
        if k % 97 == 0 and (k == 194 or not flag.exists()):  # these end their process once, 194 whenever it comes
            flag.touch()
            os._exit(k % 3)
        return k * k

    got = [*each(work, range(700), 3, ordered=ordered)]
    assert sorted(k for k, _ in got) == [*range(700)]
    assert [(k, r) for k, r in got if r != k * k] == [(194, Lost(False, "it ends the process that decodes it (exit code 2)"))]
    if ordered:
        assert [k for k, _ in got] == [*range(700)]
    assert not [*each(work, [], 2)]


def test_an_order_that_is_kept_holds_little_back() -> None:
    seen = []
    for k, _ in each(lambda k: time.sleep(0.3 if k == 0 else 0), iter(seen.append(k) or k for k in range(5000)), 2, ordered=True):
        if k == 0:
            assert len(seen) <= processes.AHEAD + processes.CHUNK
    assert len(seen) == 5000


def test_processes_that_all_die_are_one_error() -> None:
    with pytest.raises(DataError, match=r"processes died one after another \(exit code 1\); use fewer: --workers 1"):
        [*each(lambda k: os._exit(1), range(100), 2)]


# ---- shards, and folders that can't be written


def test_shards_are_checked_by_member(tmp_path: Path) -> None:
    good = {f"{c}/{k}.png": encoded("PNG", photograph(20, 20, ord(c) + 7 * k)) for c in "ab" for k in range(4)}
    pack(tmp_path / "train-0.tar", [*good.items(), ("a/bad.jpg", encoded()[:-300]), ("b/same.png", good["a/0.png"])])
    pack(tmp_path / "val-0.tar", [("a/x.png", encoded("PNG", photograph(20, 20, 900))), ("b/x.png", good["b/2.png"])])
    report = check(str(tmp_path), workers=2)
    assert kinds(report) == {
        ("train-0.tar/a/bad.jpg", "truncated"),
        ("train-0.tar/b/same.png", "duplicate"),
        ("val-0.tar/b/x.png", "leak"),
    }
    found = splits(str(tmp_path))
    assert found.excluded == 1 and len(found.train.files) == 9
    assert {r["class"] for r in manifest(report)} == {"a", "b"} and report.splits == {"train": 9, "val": 2}
    with (tmp_path / "train-0.tar").open("r+b") as file:
        file.seek(found.train.offset[2] + 30)  # type: ignore[attr-defined]
        file.write(b"\xff")
    report = check(str(tmp_path), workers=1)
    assert {p.kind for p in report.problems if p.path == found.train.files[2]} <= {*module.UNUSABLE} and report.unusable == 2


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    root = images(tmp_path / "d", SMALL)
    (root / ".fastffl").write_bytes(b"")  # in the way
    with pytest.raises(UsageError, match=r"can't write .*; name another: fastffl data check .* --out FOLDER"):
        check(str(root))
    report = check(str(root), str(tmp_path / "else"), workers=1)
    assert report.manifest == str(tmp_path / "else" / "manifest.jsonl") and report.code == 0
    (root / ".fastffl").unlink()
    with module.claimed(tmp_path / "else", ""):
        code = f"from fastffl.data.check import check\ncheck({str(root)!r}, {str(tmp_path / 'else')!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "UsageError: another process is writing to" in other.stderr


@pytest.mark.parametrize("text", ["{", "[]", '{"path": 1}', "null", "\x00"])
def test_a_damaged_manifest_is_named(text: str, tmp_path: Path) -> None:
    root = images(tmp_path, SMALL)
    for name in ("manifest.jsonl", "progress.jsonl"):
        (root / ".fastffl").mkdir(exist_ok=True)
        (root / ".fastffl" / name).write_text(text + "\n")
        with pytest.raises(DataError, match=rf"{name}.* is damaged; check anew: .* --again"):
            check(str(root), workers=1)
        assert check(str(root), workers=1, again=True).code == 0
        (root / ".fastffl" / "manifest.jsonl").unlink()


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        check(str(tmp_path / "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images in class folders"):
        check(str(tmp_path / "empty"))
    assert not [*(tmp_path / "empty").iterdir()]
    with pytest.raises(UsageError, match="--workers 0"):
        check(str(tmp_path / "empty"), workers=0)


def test_lines_for_people(tmp_path: Path) -> None:
    report = module.Report(0, 0, {}, [module.Problem(f"p{k}", "tiny", "x") for k in range(14)], "", "")
    report.problems.append(module.Problem("q", "empty", "it is empty"))
    lines = [*report.lines()]
    assert len(lines) == 12 and "q: it is empty" in lines[0] and "4 more" in lines[-1]


def test_real_photographs_have_no_problems(tmp_path: Path) -> None:
    import tarfile

    shared = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "imagenet120.tar"
    if not shared.is_file():
        pytest.skip("the real photographs are not here")
    with tarfile.open(shared) as tar:
        tar.extractall(tmp_path, [m for m in tar.getmembers() if m.name.startswith("train/")], filter="data")
    report = check(str(tmp_path), workers=2)
    assert report.images == 100 and not [p for p in report.problems if p.kind in module.UNUSABLE]
    rows = manifest(report)
    assert max(int(np.int64(r["width"])) for r in rows) > 500  # type: ignore[call-overload]
