"""Several ranks are one run: the same weights as one process, decisions taken by all, the rank at fault named in time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastffl.errors import UsageError
from fastffl.train.ranks import bits, joined
from tests.train import rankrun, tiny

END = 20.0  # seconds: with a limit of 3 s of silence every fault must be over by then; the default limit of 20 s makes that 60


def weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in result["weights"].items()}


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    return max(float((wa[k] - wb[k]).abs().max()) for k in wa if "running" not in k and "num_batches" not in k)


NORMLESS = {"norm": False, "drop": 0.0}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, nets without batch norm, seven samples in the last batch."""
    return rankrun.run(tmp_path_factory.mktemp("one"), 1, learner=NORMLESS, samples=47).result()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one_process(size: int, single: dict[str, Any], tmp_path: Path) -> None:
    """47 samples in batches of 8: shares of 4 and 4, or 3, 3 and 2; the last batch has 7 samples."""
    ended = rankrun.run(tmp_path, size, learner=NORMLESS, samples=47)
    made = ended.result()
    assert ended.seconds < 60
    assert largest_difference(made, single) < 2e-6
    assert made["steps"] == single["steps"] and made["results"].keys() == single["results"].keys()
    for r in range(1, size):
        assert ended.result(r)["weights"] == made["weights"], "every rank ends with the same weights"
        assert ended.result(r)["digest"] == made["digest"]


def test_a_batch_smaller_than_the_ranks_still_weighs_right(tmp_path: Path) -> None:
    """42 samples in batches of 8: the last batch is two samples, of which one of three ranks has none."""
    one = rankrun.run(tmp_path / "1", 1, learner=NORMLESS, samples=42).result()
    three = rankrun.run(tmp_path / "3", 3, learner=NORMLESS, samples=42).result()
    assert largest_difference(one, three) < 2e-6


@pytest.mark.parametrize("how", ["accum", "clip", "adamw", "ema", "amp", "flat", "flat accum"])
def test_ranks_as_one_process_in_other_settings(how: str, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "accum": {"optim__accum": 2},
        "clip": {"optim__clip": 0.1},
        "adamw": {"optim__name": "adamw", "optim__lr": 0.002},
        "ema": {"ema__decay": 0.9},
        "amp": {"amp__enabled": True, "amp__dtype": "bf16"},
        "flat": {"ema__decay": 0.9, "optim__clip": 0.1},
        "flat accum": {"optim__accum": 2},
    }
    options = {"learner": NORMLESS, "recipe": settings[how], "flat": how.startswith("flat")}
    a = rankrun.run(tmp_path / "1", 1, **options).result()
    b = rankrun.run(tmp_path / "2", 2, **options).result()
    # bf16 rounds activations, so other batch sizes choose other sums; Adam divides by the root of tiny squares
    assert largest_difference(a, b) < {"amp": 3e-2, "adamw": 3e-4}.get(how, 2e-6)


def test_parameters_without_a_gradient(tmp_path: Path) -> None:
    """A part that no image reaches: of no matter, but for several ranks and parts, where it is named."""
    idle = {**NORMLESS, "idle": True}
    made = rankrun.run(tmp_path / "2", 2, learner=idle).result()
    assert largest_difference(made, rankrun.run(tmp_path / "1", 1, learner=idle).result()) < 2e-6
    ended = rankrun.run(tmp_path / "accum", 2, learner=idle, recipe={"optim__accum": 2})
    assert ended.codes == [2, 2]
    assert "4 parameters have no gradient, cohort.p0.plain.idle.weight the first; several ranks" in ended.errors[0]


def test_batch_norm_over_all_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    a = rankrun.run(tmp_path / "1", 1, learner={"drop": 0.0}, samples=47).result()
    b = rankrun.run(tmp_path / "3", 3, learner={"drop": 0.0}, samples=47, recipe={"run__sync_bn": True}).result()
    c = rankrun.run(tmp_path / "own", 3, learner={"drop": 0.0}, samples=47).result()
    assert largest_difference(a, b) < 1e-5
    wa, wb = weights(a), weights(b)
    for k in wa:
        if "running" in k:
            torch.testing.assert_close(wb[k], wa[k], rtol=1e-4, atol=1e-5)
    assert largest_difference(a, c) > 1e-4, "a rank's own statistics are other ones: the test can tell"


def test_running_statistics_are_averaged_once_per_epoch(tmp_path: Path) -> None:
    ended = rankrun.run(tmp_path, 2, learner={"drop": 0.0})
    a, b = weights(ended.result(0)), weights(ended.result(1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    one = weights(rankrun.run(tmp_path / "one", 1, learner={"drop": 0.0}).result())
    k = "cohort.p0.plain.norm.running_var"
    assert torch.all((a[k] / one[k] - 1).abs() < 0.3), "about those of one process: a mean, not a sum"


@pytest.mark.parametrize("size", [2])
def test_stopped_and_resumed_in_an_epoch_ends_in_the_same_digest(size: int, tmp_path: Path) -> None:
    """With dropout and batch norm: random numbers and running statistics are every rank's own."""
    whole = rankrun.run(tmp_path / "whole", size).result()
    ended = rankrun.run(tmp_path / "cut", size, fault={"rank": 1, "at": 8, "kind": "term"})
    assert ended.codes == [143] * size, ended.errors
    assert all("SIGTERM: saved at epoch 2, step" in e for e in ended.errors)
    own = tiny.stored(tmp_path / "cut" / "run")["ranks"]
    assert not torch.equal(own[0]["rng"]["torch"], own[1]["rng"]["torch"]), "dropout must not be the same on all ranks"
    assert not torch.equal(own[0]["buffers"][0], own[1]["buffers"][0]), "within an epoch statistics are a rank's own"
    again = rankrun.run(tmp_path / "cut", size).result()
    assert again["digest"] == whole["digest"]


def test_killed_and_resumed_ends_in_the_same_digest(tmp_path: Path) -> None:
    whole = rankrun.run(tmp_path / "whole", 2).result()
    ended = rankrun.run(tmp_path / "cut", 2, fault={"rank": 1, "at": 9, "kind": "kill"})
    assert ended.codes == [1, -9]
    assert rankrun.run(tmp_path / "cut", 2).result()["digest"] == whole["digest"]


def test_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    """Order and position are those of the whole batch, so nothing is lost or repeated; without dropout nothing else differs."""
    one = rankrun.run(tmp_path / "one", 1, learner=NORMLESS).result()
    rankrun.run(tmp_path / "cut", 2, learner=NORMLESS, fault={"rank": 0, "at": 8, "kind": "term"})
    assert largest_difference(rankrun.run(tmp_path / "cut", 3, learner=NORMLESS).result(), one) < 2e-6


@pytest.mark.parametrize(
    ("kind", "rank", "said"),
    [
        ("kill", 1, "rank 1 on {host} was killed or stopped"),
        ("stop", 1, "rank 1 on {host} was killed or stopped"),
        ("kill", 0, "rank 0 on 127.0.0.1 is gone"),
        ("data", 1, "rank 1 on {host} failed: c1/07.JPEG is gone"),
        ("bug", 2, "rank 2 on {host} failed: ValueError: a bug of someone's"),
        ("flip", 1, "rank 1 differs from rank 0 in cohort.p1.plain.fc.weight"),
    ],
)
def test_the_rank_at_fault_is_named(kind: str, rank: int, said: str, tmp_path: Path) -> None:
    import socket

    said = said.format(host=socket.gethostname())
    changes = {"run__log_every": 1} if kind == "flip" else {}
    ended = rankrun.run(tmp_path, 3, recipe=changes, fault={"rank": rank, "at": 8, "kind": kind})
    assert ended.seconds < END
    assert None not in [c for r, c in enumerate(ended.codes) if r != rank], "no survivor hangs"
    survivors = [e for r, e in enumerate(ended.errors) if r != rank]
    assert all(said in e for e in survivors), survivors
    assert all(c not in (0, None) for r, c in enumerate(ended.codes) if r != rank)
    last = tiny.stored(tmp_path / "run")
    assert last["position"]["step"] == tiny.STEPS, "the checkpoint of the first epoch stands"


def test_an_image_that_can_not_be_scored_costs_no_step(tmp_path: Path) -> None:
    """All ranks are told, and save the epoch they trained."""
    ended = rankrun.run(tmp_path, 2, fault={"rank": 1, "at": 0, "kind": "bad val"})
    assert ended.codes == [2, 2]
    assert "gave 10 of 20 samples; refusing to report accuracy" in ended.errors[0]
    assert "c2/03.JPEG can't be decoded" in ended.errors[1]
    assert tiny.stored(tmp_path / "run")["position"]["step"] == tiny.STEPS


def test_a_rank_that_lives_but_stands_still_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = rankrun.run(tmp_path, 2, target=impatient, fault={"rank": 1, "at": 8, "kind": "stuck"})
    assert ended.seconds < 2 * END
    assert "rank 1 on" in ended.errors[0] and "is stuck" in ended.errors[0] and "at data of step 9" in ended.errors[0]


def impatient(*args: Any) -> None:
    from fastffl.train import watch

    watch.STUCK = 2
    rankrun.one(*args)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    ended = rankrun.run(tmp_path, 2, fault={"rank": 1, "at": 8, "kind": "one nan"})
    assert ended.result(0)["skipped"] == ended.result(1)["skipped"] == 1
    assert ended.result(0)["digest"] == ended.result(1)["digest"]


def test_a_rank_that_stays_not_finite_is_named(tmp_path: Path) -> None:
    """All ranks skip the same ten steps, then stop with the weights of the last finite one."""
    recipe = {"sched__epochs": 4}
    ended = rankrun.run(tmp_path, 3, recipe=recipe, fault={"rank": 2, "at": 8, "kind": "nan"})
    assert ended.codes == [1, 1, 1]
    assert all("loss not finite for 10 steps in a row on rank 2, first bad term" in e for e in ended.errors), ended.errors


def test_ranks_that_were_started_differently_are_told(tmp_path: Path) -> None:
    ended = rankrun.run(tmp_path, 2, target=differing)
    assert all(c == 2 for c in ended.codes)
    assert "rank 0 and rank 1 differ in optim.lr: 0.05 and 0.06" in ended.errors[0]


def differing(rank: int, size: int, port: int, folder: str, options: dict[str, Any]) -> None:
    options["recipe"] = {"optim__lr": 0.05 + rank / 100}
    rankrun.one(rank, size, port, folder, options)


def test_a_bit_always_shows() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8):
        t = torch.arange(64).to(dtype).view(4, 16).t()
        before = bits(t)
        view = t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
        view[3, 2] ^= 1
        assert bits(t) != before and before.dtype == torch.int64


def test_half_an_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UsageError, match="RANK is '' where WORLD_SIZE asks for several ranks; start with torchrun"),
        joined(tiny.recipe()),
    ):
        pass
