"""Real pictures through the whole command line: either loader, one and two ranks, stopped and resumed, packed into shards."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastffl.train import checkpoint
from tests.train import rankrun

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SETS = ("data.size=64", "data.eval_batch_size=16", "run.threads=1", "run.memory_format=contiguous", "sched.warmup_epochs=0")
WORDS = ("--model", "resnet18,mobilenetv3_small_100", "--device", "cpu", "--batch-size", "16", "--json")


def drawn(root: Path) -> None:
    """A stand-in where the real pictures are not at hand: two classes of JPEGs of several sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for c, name in enumerate(("stripes", "checks")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                h, w = rng.integers(60, 120, 2)
                y, x = np.mgrid[:h, :w]
                grey = ((x // 8) % 2 if c == 0 else (x // 8 + y // 8) % 2) * 200 + rng.integers(0, 40, (h, w))
                Image.fromarray(np.stack([grey] * 3, 2).astype(np.uint8)).save(root / split / name / f"{k}.jpg")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 training and 12 validation images of Imagenette, or drawn ones."""
    root = tmp_path_factory.mktemp("pictures")
    if not (SHARED / "imagenette128_webp.npz").is_file():
        drawn(root)
        return root
    spec = importlib.util.spec_from_file_location("read_imagenette", SHARED / "read_imagenette.py")
    assert spec and spec.loader
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    taken: dict[tuple[str, str], int] = {}
    for split, name, label, file, data in reader.records(SHARED / "imagenette128_webp.npz"):
        n = taken[split, name] = taken.get((split, name), 0) + 1
        if label < 4 and n <= {"train": 11, "val": 3}[split]:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.open(BytesIO(data)).convert("RGB").save(folder / f"{Path(file).stem}.JPEG", quality=90)
    return root


def words(data: Path, *sets: str, epochs: int = 2, out: str = "run") -> list[str]:
    made = ["train", "--amp", "imagenette", "--data", str(data), "--epochs", str(epochs), "--out", out, *WORDS]
    for item in (*SETS, *sets):
        made += ["--set", item]
    return made


def result(answer) -> dict:  # type: ignore[no-untyped-def, type-arg]
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_the_newcomers_command(call: Callable[..., object], pictures: Path) -> None:
    """fastffl train --amp imagenette --data DIR --model resnet18,mobilenetv3_small_100 --epochs 2; then what it made is used."""
    made = result(call(*words(pictures, "data.loader=torchvision", "data.workers=1")))
    assert made["epochs"] == 2 and [made["results"][p]["net"] for p in ("p0", "p1")] == ["resnet18", "mobilenetv3_small_100"]
    scored = json.loads(call("evaluate", "run", "--json").out)["results"]  # type: ignore[attr-defined]
    assert scored["p1"]["top1"] == pytest.approx(made["results"]["p1"]["last"], abs=0.01)
    assert call("export", "run", "--vote", "p1").code == 0  # type: ignore[attr-defined]


def test_both_loaders_give_the_same_run_on_a_cpu(call: Callable[..., object], pictures: Path) -> None:
    pytest.importorskip("nvidia.dali")
    sets = (
        "data.rand_augment=2",
        "data.mixup=0.2",
        "data.cutmix=1.0",
        "data.smoothing=0.1",
        "data.start_size=32",
        "data.grow_epochs=1",
    )
    made = [result(call(*words(pictures, f"data.loader={loader}", *sets, out=loader))) for loader in ("torchvision", "dali")]
    assert made[0]["digest"] == made[1]["digest"]


def test_stopped_inside_an_epoch_it_ends_in_the_same_digest(call: Callable[..., object], pictures: Path) -> None:
    whole = result(call(*words(pictures, "data.loader=torchvision", "data.workers=1", out="whole")))
    cut = result(call(*words(pictures, "data.loader=torchvision", "data.workers=1", "run.max_steps=2", out="cut")))
    assert cut["steps"] == 2 < whole["steps"] / 2
    again = result(call(*words(pictures, "data.loader=torchvision", "data.workers=0", out="cut")))
    assert again["digest"] == whole["digest"]


def test_shards_hold_the_folder_they_were_packed_from(call: Callable[..., object], pictures: Path, tmp_path: Path) -> None:
    """Packed in another order, so a run on them is another one; what a run scores on either is the same to the last image."""
    packed = tmp_path / "packed"
    assert call("data", "prepare", str(pictures), "--out", str(packed), "--shards", "1").code == 0  # type: ignore[attr-defined]
    assert list(packed.rglob("*.tar"))
    made = result(call(*words(packed, "data.loader=torchvision", "data.workers=0", epochs=1)))
    assert made["steps"] == -(-len(list((pictures / "train").rglob("*.*"))) // 16)
    for split in ("train", "val"):
        scores = [result(call("evaluate", "run", "--data", str(d), "--split", split, "--json")) for d in (packed, pictures)]
        for vote, score in scores[0]["results"].items():
            other = scores[1]["results"][vote]
            assert (score["top1"], score["top5"], score["samples"]) == (other["top1"], other["top5"], other["samples"])
            assert score["nll"] == pytest.approx(other["nll"], rel=1e-3)  # bf16, other batches


def test_what_a_check_found_is_left_out(call: Callable[..., object], pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(pictures, root)
    bad = next((root / "train").rglob("*.*"))
    bad.write_bytes(bad.read_bytes()[:700])
    answer = call("train", "--amp", "imagenette", "--data", str(root), "--epochs", "1", *WORDS[:-1], "--set", "data.size=64")
    log = next(Path("runs").glob("*/log.txt")).read_text()
    assert answer.code == 0 and f"{bad} can't be decoded" in log  # type: ignore[attr-defined]
    assert call("data", "check", str(root)).code == 1  # type: ignore[attr-defined]
    assert bad.name in (root / ".fastffl" / "exclude.txt").read_text()
    again = call("train", "--amp", "imagenette", "--data", str(root), "--epochs", "1", *WORDS[:-1], "--set", "data.size=64")
    assert again.code == 0 and "1 image is left out" in again.out  # type: ignore[attr-defined]
    assert "can't be decoded" not in again.out + again.err  # type: ignore[attr-defined]


def test_two_ranks_read_every_image_once_and_train_on(pictures: Path, tmp_path: Path) -> None:
    ended = rankrun.run(tmp_path, 2, limit=150.0, target=on_pictures, pictures=str(pictures))
    assert ended.codes == [0, 0], ended.errors
    seen = [json.loads((tmp_path / f"seen-{r}.json").read_text()) for r in range(2)]
    images = len(list((pictures / "train").rglob("*.*")))
    for epoch in range(2):
        assert sorted(seen[0][epoch] + seen[1][epoch]) == list(range(images))
    assert checkpoint.whole(tmp_path / "run" / "last")


def on_pictures(rank: int, size: int, port: int, folder: str, options: dict[str, str]) -> None:
    """A rank of the command line's own path, which notes the ids of the batches it got."""
    import os

    from fastffl import cli
    from fastffl.data.folder import Folder

    out = os.open(f"{folder}/rank-{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    seen: list[list[int]] = []
    train = Folder.train

    def noted(self: Folder, *args: int) -> object:
        seen.append([])
        for batch in train(self, *args):
            seen[-1] += batch.id.tolist()
            yield batch

    Folder.train = noted  # type: ignore[method-assign, assignment]
    code = 0
    try:
        cli.main(words(Path(options["pictures"]), "data.loader=torchvision", "data.workers=0", out=f"{folder}/run"))
    except SystemExit as ended:
        code = int(ended.code or 0)
    Path(f"{folder}/seen-{rank}.json").write_text(json.dumps(seen))
    os._exit(code)
