"""The portable decoder: every kind of file, the pixels a view asks for, and worker processes that die, hang or are signalled."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torchvision.transforms.v2 import functional as F

from fastffl.data import Place, portable
from fastffl.data.decoder import Decoded, Job, close_streams
from fastffl.data.folder import has_dali
from fastffl.data.manifest import Manifest, scan
from fastffl.data.portable import Portable, decode, one, show, whole
from fastffl.data.views import Change, Evaluation, Training, View
from fastffl.errors import DataError
from fastffl.recipe import Data
from tests.pictures import BAD, GOOD, deep_grey, encoded, folder, open_folder, photographs, picture, process_that_holds

CFG = Data(name="folder")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core


def jobs(n: int, each: int, size: int = 16, epoch: int = 0) -> list[Job]:
    view = Training(CFG, size, 3, epoch)
    return [Job(tuple(range(k, min(k + each, n))), view) for k in range(0, n, each)]


def children() -> set[int | None]:
    return {p.pid for p in multiprocessing.active_children()}


# ---- one file


@pytest.mark.parametrize("name", GOOD)
def test_kinds_of_images(name: str, tmp_path: Path) -> None:
    make, off = GOOD[name]
    rgb = decode(make())
    assert rgb.mode == "RGB"
    if off is not None:
        assert rgb.size == (40, 30), "EXIF turns nothing, in training or in evaluation"
        assert np.abs(np.asarray(rgb).astype(int) - np.asarray(picture()).astype(int)).max() <= off
    for split in ("train", "test"):  # and every kind goes through both views
        for c in "ab":
            (tmp_path / "d" / "train" / c).mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / "test" / c).mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / split / c / name).write_bytes(make())
    data = open_folder(tmp_path / "d", max_bad=0.0)
    for batch in (next(data.train(2, 0, 0)), next(data.evaluate("test", 2))):
        assert batch.x.shape == (2, 3, 16, 16) and batch.x.isfinite().all()


@pytest.mark.parametrize("name", BAD)
def test_kinds_of_damage(name: str) -> None:
    with pytest.raises(Exception) as caught:  # Pillow raises many kinds
        decode(BAD[name]())
    assert portable.why(caught.value) and "\n" not in portable.why(caught.value)


def test_deep_grey_is_scaled_not_clipped() -> None:
    got = np.asarray(decode(deep_grey()))
    assert np.array_equal(got[..., 0], (np.arange(1200) * 50 // 257).reshape(30, 40)) and (got[..., 0] == got[..., 2]).all()


def test_decoded_pixels_are_all_there_once_the_file_is_closed(tmp_path: Path) -> None:
    """Images that are RGB already are not copied; what is returned must not read the file later."""
    for path in photographs(tmp_path, 30):
        data = path.read_bytes()
        a = decode(data)
        b = np.asarray(a.convert("RGB"))
        assert a.size == b.shape[1::-1] and np.array_equal(np.asarray(a), b) and b.std() > 1


# ---- what a view shows


def slow(rgb: np.ndarray, view: View) -> Tensor:
    x = torch.from_numpy(rgb.copy()).permute(2, 0, 1).contiguous()
    x = F.crop(x, view.top, view.left, view.height, view.width)
    x = F.resize(x, [view.rows, view.columns], interpolation=F.InterpolationMode.BILINEAR, antialias=True)
    x = F.crop(x, view.down, view.right, view.size, view.size)
    return F.horizontal_flip(x) if view.flip else x


@pytest.mark.parametrize("size", [(64, 48), (33, 91), (7, 5), (300, 40)])
def test_show_is_torchvisions_crop_resize_crop_and_flip(size: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = decode(encoded(Image.fromarray(rgb), "PNG"))
    flips = set()
    for id in range(12):
        for view in (Training(CFG, 20, 1, 2)(id, *size), Evaluation(CFG, 20)(id, *size)):
            got = show(image, view, 9)
            assert got.shape == (3, 20, 20) and got.dtype == torch.uint8 and torch.equal(got, slow(rgb, view))
            flips.add(view.flip)
    assert flips == {False, True}


def test_show_applies_the_changes_last() -> None:
    from fastffl.data.rand_augment import OPS, apply

    image, plain = picture(64, 48), Training(CFG, 24, 0, 0)(3, 48, 64)
    changes = (Change(OPS.index("rotate"), True), Change(OPS.index("solarize"), False))
    got = show(image, plain._replace(changes=changes), 20)
    assert torch.equal(got, apply(show(image, plain, 20), changes, 20)) and not torch.equal(got, show(image, plain, 20))
    weak = show(image, plain._replace(changes=changes), 2)
    assert not torch.equal(weak, got), "the magnitude counts"


# ---- jobs


def test_a_job_is_its_images_one_by_one(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 5, "b": 4})
    (root / "b" / "002.png").write_bytes(BAD["half.png"]())
    manifest = scan(root)
    job = Job((7, 0, 3, 3), Training(CFG, 16, 0, 0))
    (made,) = Portable(manifest, Place(), 0).decode([job])
    assert made.x.shape == (4, 3, 16, 16) and made.x.dtype == torch.uint8
    assert made.x.is_contiguous(memory_format=torch.channels_last) and list(made.bad) == [0] and (made.x[0] == 0).all()
    for k in range(4):
        x, why = one(manifest, job, k)
        assert (x is None and why == made.bad[0] and why) if k == 0 else (why == "" and torch.equal(x, made.x[k]))
    assert torch.equal(made.x[2], made.x[3]) and not torch.equal(made.x[1], made.x[2])


def test_batches_of_any_size_and_side_in_order(tmp_path: Path) -> None:
    manifest = scan(folder(tmp_path, {"a": 9, "b": 8}))
    asked = jobs(17, 4, 16) + jobs(17, 7, 24) + [Job((16,), Evaluation(CFG, 32))]
    want = [whole(manifest, job)[0].permute(0, 3, 1, 2) for job in asked]
    for workers in (0, 1, 2):
        decoder = Portable(manifest, Place(), workers)
        for _ in range(2):
            got = list(decoder.decode(asked))  # kept: what came before is not written over
            assert len(got) == len(want) and all(torch.equal(g.x, w) and not g.bad for g, w in zip(got, want, strict=True))
        assert not list(decoder.decode([]))
        decoder.close()


# ---- worker processes


@pytest.mark.parametrize("workers", [1, 2])
def test_shared_memory_is_not_written_while_it_is_read(tmp_path: Path, workers: int) -> None:
    """However slow the reader is: workers go as far ahead as they may, and leave alone what it looks at."""
    manifest = scan(folder(tmp_path, {"a": 12, "b": 12}))
    asked = jobs(24, 2)
    for k, (x, _) in enumerate(Portable(manifest, Place(), workers)._by_workers(asked)):
        time.sleep(0.05)
        assert torch.equal(x, whole(manifest, asked[k])[0])


def started(manifest: Manifest, asked: list[Job], workers: int = 2) -> tuple[object, list[int]]:
    before = children()
    stream = Portable(manifest, Place(), workers).decode(asked)
    next(stream)
    return stream, [pid for pid in children() - before if pid]


def test_an_iterator_closed_early_leaves_nothing(tmp_path: Path) -> None:
    manifest = scan(folder(tmp_path, {"a": 20, "b": 20}))
    before = children()
    mine = lambda number, frame: None  # noqa: E731
    others = signal.signal(signal.SIGCHLD, mine)
    for take in (0, 1, 3):
        stream = Portable(manifest, Place(), 2).decode(jobs(40, 4))
        for _ in range(take):
            next(stream)
        assert len(children() - before) == (2 if take else 0)
        stream.close()  # type: ignore[attr-defined]
        assert children() == before
    state = torch.get_rng_state()
    assert len(list(Portable(manifest, Place(), 2).decode(jobs(40, 4)))) == 10 and children() == before
    assert torch.equal(state, torch.get_rng_state()), "loading draws nothing from the run's generator"
    assert signal.signal(signal.SIGCHLD, others) is mine


def test_a_process_that_holds_iterators_ends(tmp_path: Path) -> None:
    """As one does whose error's traceback is kept. Workers leave SIGTERM to the trainer, and Python would wait for them for ever;
    DALI would have ended its pipelines before their last batches are waited for."""
    loaders = ["torchvision", *(["dali"] if has_dali() else [])]
    said = f"{[2] * len(loaders)}\n"
    assert process_that_holds(folder(tmp_path, {"a": 20, "b": 20}), loaders) == (0, said + said, "")


def test_a_forked_child_that_ends_closes_nothing_of_its_parents(tmp_path: Path) -> None:
    stream, _ = started(scan(folder(tmp_path, {"a": 20, "b": 20})), jobs(40, 4))
    if (child := os.fork()) == 0:
        try:
            close_streams()  # as at its exit
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(stream)) == 9  # type: ignore[call-overload]


@pytest.fixture(params=["nobody's", "torch's"])
def handler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The handler of SIGCHLD that stands before: torch's, where this process has iterated another loader with workers."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request.param == "torch's":
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        assert len(list(DataLoader(range(2), num_workers=1))) == 2  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGCHLD).__module__ == portable.TORCH_SIGNALS  # type: ignore[union-attr]
    yield request.param
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.timeout(60)
def test_a_killed_worker_is_one_error_where_batches_are_taken(tmp_path: Path, handler: str) -> None:
    """And not a RuntimeError wherever the trainer happens to be, which torch's own handler of SIGCHLD would raise."""
    manifest = scan(folder(tmp_path, {"a": 40, "b": 40}))
    before = children()
    stream, pids = started(manifest, jobs(80, 4))
    os.kill(pids[0], signal.SIGKILL)
    for _ in range(20):
        time.sleep(0.01)  # the trainer computes; the signal arrives
    with pytest.raises(DataError, match=r"process that decodes images died \(.*data\.workers=0") as caught:
        for _ in stream:  # type: ignore[attr-defined]
            pass
    assert "\n" not in str(caught.value)
    assert children() == before


@pytest.mark.timeout(60)
def test_an_image_that_kills_its_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = scan(folder(tmp_path, {"a": 8, "b": 8}))
    real = portable.decode
    target = (tmp_path / "b" / "003.png").read_bytes()
    monkeypatch.setattr(portable, "decode", lambda data: os._exit(9) if data == target else real(data))
    monkeypatch.setattr(portable, "POLL", 0.5)
    with pytest.raises(DataError, match=r"process that decodes images died.*being read: .*b/003\.png"):
        list(Portable(manifest, Place(), 1).decode(jobs(16, 4)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["stopped", "hangs"])
def test_workers_that_hang_end_in_one_error_that_names_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    manifest = scan(folder(tmp_path, {"a": 8, "b": 8}))
    before = children()
    monkeypatch.setattr(portable, "POLL", 0.2)
    monkeypatch.setattr(portable, "STALL", 1.0)
    real = portable.decode
    target = (tmp_path / "b" / "001.png").read_bytes()

    def stuck(data: bytes) -> object:
        if data == target:
            os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else time.sleep(1000)
        return real(data)

    monkeypatch.setattr(portable, "decode", stuck)
    with pytest.raises(DataError, match=r"no batch of images came for 1 seconds; being read: .*b/001\.png; see whether"):
        list(Portable(manifest, Place(), 2).decode(jobs(16, 4)))
    assert children() == before, "none is left stopped or asleep"


@pytest.mark.timeout(60)
def test_a_stopped_worker_does_not_outlive_an_iterator_closed_early(tmp_path: Path) -> None:
    before = children()
    stream, pids = started(scan(folder(tmp_path, {"a": 40, "b": 40})), jobs(80, 4), 1)
    os.kill(pids[0], signal.SIGSTOP)
    stream.close()  # type: ignore[attr-defined]
    assert children() == before


@pytest.mark.timeout(60)
def test_signals_to_all_processes_of_a_run_are_the_trainers(tmp_path: Path) -> None:
    """A queue's SIGTERM and a terminal's Ctrl-C reach the workers too; the trainer still gets its batches."""
    manifest = scan(folder(tmp_path, {"a": 20, "b": 20}))
    asked = jobs(40, 4)
    stream, pids = started(manifest, asked)
    assert len(pids) == 2
    next(stream)  # type: ignore[call-overload]  # the second worker's: both have begun
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    rest: list[Decoded] = list(stream)  # type: ignore[call-overload]
    assert len(rest) == 8
    assert torch.equal(rest[-1].x, whole(manifest, asked[-1])[0].permute(0, 3, 1, 2))


def test_a_mistake_of_ours_is_not_called_a_bad_image(tmp_path: Path) -> None:
    manifest = scan(folder(tmp_path, {"a": 2, "b": 2}))

    class Broken(Training):
        def __call__(self, id: int, height: int, width: int) -> View:
            raise RuntimeError("a mistake in a view")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a mistake in a view"):
            list(Portable(manifest, Place(), workers).decode([Job((0,), Broken(CFG, 8, 0, 0))]))
