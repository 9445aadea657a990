"""The benchmark's protocol: interleaving, rows, the README's tables; and what it says without the authors' checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import readme  # noqa: E402
from fastffl.bench import timing as protocol  # noqa: E402


def test_variants_take_turns() -> None:
    calls: list[str] = []
    times = protocol.interleave({n: (lambda n=n: calls.append(n)) for n in "abc"}, rounds=3, warmup=1)  # type: ignore[misc]
    assert calls == list("abc" + "abc" + "bca" + "cab")
    assert {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_rows_carry_medians_and_ratios_of_pairs() -> None:
    """The ratio is the median over rounds, so a round in which the machine was slow for both does not count double."""
    times = {"ours": [0.5, 5.0, 0.5, 0.4, 0.6], "official": [1.0, 10.0, 1.0, 1.0, 1.0]}
    made = {r["variant"]: r for r in protocol.rows("case", times, "official", bytes=8)}
    assert made["ours"]["ms"] == 500 and made["ours"]["ratio"] == 0.5 and made["official"]["ratio"] == 1
    assert made["ours"]["p20"] <= made["ours"]["ms"] <= made["ours"]["p80"] and made["ours"]["bytes"] == 8


def test_rows_are_appended_with_their_circumstances(tmp_path: Path) -> None:
    facts = protocol.circumstances()
    assert {"device", "commit", "torch", "triton", "threads"} <= facts.keys()
    path = tmp_path / "cpu" / "x.jsonl"
    for _ in range(2):
        protocol.write(path, [{"case": "c", "ms": 1 / 3}], facts)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["ms"] == 0.333333 and lines[0]["torch"] == facts["torch"]


def test_without_the_authors_checkout_it_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "bench/train.py", "--official", str(tmp_path), "--rounds", "1", "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "has no our_network.py; expected a checkout of Jangho-Kim/FFL-pytorch" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_augmentation_bench_gives_rows() -> None:
    import train as bench_train

    made = bench_train.bench_augment(rounds=2)
    assert [r["variant"] for r in made] == ["official", "ours", "ours, channels_last"]
    assert all(r["img_s"] > 0 and r["speedup"] > 0 for r in made)


def test_the_readme_says_what_the_rows_say() -> None:
    """Its two tables are the committed rows' and nothing else."""
    text = (ROOT / "README.md").read_text()
    assert readme.made(text) == text, "run: python bench/readme.py"
    assert readme.made(text.replace("resnet8", "resnet9")) != text.replace("resnet8", "resnet9")


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").rglob("*.jsonl")), ids=lambda p: p.name)
def test_committed_rows_are_whole(path: Path) -> None:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert {"case", "variant", "ms", "device", "commit", "torch"} <= row.keys()


def test_the_checks_of_an_op_see_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: values 1 % too large, a byte written behind an output, other rows behind the 2^31st element, a drifting repeat."""
    import opchecks
    from fastffl.bench import problems
    from fastffl_kernels import _launch

    cpu, file = torch.device("cpu"), problems.module("bn_act")
    assert file is not None
    real = file.bn_act
    assert opchecks.check_random("bn_act", cpu, 6, 60)["ok"] and opchecks.check_large("bn_act", cpu, True)["ok"]
    monkeypatch.setattr(file, "bn_act", lambda x, *args, **named: 1.01 * real(x, *args, **named))
    found = opchecks.check_random("bn_act", cpu, 6, 60)
    assert not found["ok"] and "off by" in found["said"][0]

    def beyond(x: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
        out = _launch.empty((3,), torch.float32, cpu)
        torch.as_strided(out, (4,), (1,)).fill_(0)
        return real(x, *args, **named)

    monkeypatch.setattr(file, "bn_act", beyond)
    found = opchecks.check_random("bn_act", cpu, 1, 60)
    assert not found["ok"] and found["canaries"] > 0
    monkeypatch.setattr(file, "bn_act", lambda x, *args, **named: real(x, *args, **named).roll(1, 0))
    assert not opchecks.check_large("bn_act", cpu, True)["ok"]
    times = iter(range(99))
    monkeypatch.setattr(file, "bn_act", lambda x, *args, **named: real(x, *args, **named) + next(times) // 2)
    assert not opchecks.check_repeats("bn_act", cpu, 3)["ok"]


def test_a_block_that_does_not_stop_is_stopped() -> None:
    import gpu

    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    assert gpu.run_for([sys.executable, "-c", deaf], 1.0, grace=0.3) == -9
    assert gpu.run_for([sys.executable, "-c", "import os; os._exit(int(os.environ['CODE']))"], 30, CODE="5") == 5
    assert set(gpu.SHARES) == set(gpu.FULL) and sum(gpu.SHARES.values()) == pytest.approx(1)
