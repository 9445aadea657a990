"""Hand-overs between streams, recorded by a stand-in: with all of them no operation races, without any one of them some does."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastffl
from fastffl.nets import Cohort, backbone
from fastffl.streams import Branches, ahead, apart, hand_over, tampered
from fastffl.train import optim
from fastffl.train.step import Step
from tests.train import tiny
from tests.train.recorder import Races, Recorder
from tests.train.test_step import CPU, batch


def cohort(shared: bool, streams: Recorder) -> Cohort:
    torch.manual_seed(0)
    made = Cohort([backbone("resnet8", 3, 1, 8, cut=shared) for _ in range(3)], shared)
    made.branches = Branches(streams)
    made.branches.on = True
    return made


def forward(shared: bool, without: int | None = None) -> tuple[Races, int, list[Tensor]]:
    """A parallel forward pass and a sum of all logits and maps, as a fusion module and a loss read them."""
    streams = Recorder()
    net = cohort(shared, streams)
    with tampered(without=without) as t, Races(streams) as races:
        peers = net(torch.ones(2, 1, 8, 8))
        total = sum(z.sum() for z in peers.z) + sum(f.sum() for f in peers.maps)
    assert isinstance(total, Tensor)
    return races, t.count, [*peers.z, *peers.maps]


@pytest.mark.parametrize("shared", [False, True])
def test_peers_in_parallel_wait_for_what_they_read(shared: bool) -> None:
    races, count, parallel = forward(shared)
    assert races.found == [] and count == 4, "a fork and a join for each of two side streams"
    assert set(races.ops) == {"main", "1", "2"} and races.ops["1"] == races.ops["2"] > 10
    net = cohort(shared, Recorder())
    assert net.branches is not None
    net.branches.on = False
    serial = net(torch.ones(2, 1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip([*serial.z, *serial.maps], parallel, strict=True))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("without", range(4))
def test_any_wait_left_out_is_a_race(shared: bool, without: int) -> None:
    """The input is written inside the recorded block, as a batch's copy into the graph's place is."""
    races, _, _ = forward(shared, without)
    assert races.found


def test_a_whole_step_in_branches_is_free_of_races() -> None:
    streams = Recorder()
    made = tiny.recipe(ema__decay=0.9)
    step = Step(learner := tiny.learner(), optim.build(learner, made.optim, True), made, CPU)
    learner.train()
    learner.cohort.branches = Branches(streams)
    learner.cohort.branches.on = True
    with Races(streams) as races:
        for k in range(2):
            step(batch(at=8 * k))
    assert races.found == [] and races.ops["1"] > 10


# ---- the next batch


def ring(streams: Recorder, count: int, broken: list[int]) -> Iterator[Tensor]:
    """Batches whose memory comes round as an allocator would give it: the third lies where the first lay."""
    buffers = [torch.zeros(4), torch.zeros(4)]
    for k in range(count):
        broken.append(len(broken))
        yield buffers[k % 2].fill_(float(k))


def consumed(without: int | None = None, count: int = 6) -> tuple[Races, list[float], int]:
    streams = Recorder()
    seen, beside, total = [], [], torch.zeros(())
    data = torch.zeros(4)
    with tampered(without=without) as t, Races(streams) as races:
        data.fill_(1.0)  # the data set, put on the device by the main stream
        for x in ahead(ring(streams, count, []), streams, lambda x: x.add_(data)):  # type: ignore[arg-type]
            total += x.sum()
            seen.append(float(x[0]))
            beside.append(streams.main.clock.get("data", 0) < streams.side("data").clock["data"])
    # whoever uses a batch waits for that one and not for the next, which is on its way
    assert without is not None or beside == [True] * (count - 1) + [False]
    return races, seen, t.count


def test_the_next_batch_is_made_while_this_one_is_used() -> None:
    races, seen, count = consumed()
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert races.found == [] and count == 1 + 2 * 6
    assert races.ops["data"] == 2 + 2 * 6, "two buffers, then each batch is filled and put"


@pytest.mark.parametrize("without", range(11))
def test_any_wait_for_a_batch_left_out_is_a_race(without: int) -> None:
    """0: the data set's; odd: a batch is used; even: its place is used again. The last even ones have no batch behind them."""
    races, _, _ = consumed(without)
    reused = without > 0 and without % 2 == 0
    assert bool(races.found) == (not reused or 2 < without <= 10)


def test_one_batch_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    streams = Recorder()
    for k, _ in enumerate(ahead(ring(streams, 5, made), streams, lambda x: x)):  # type: ignore[arg-type]
        assert len(made) == min(5, k + 2)


def test_without_streams_batches_come_one_by_one() -> None:
    made: list[int] = []
    for k, x in enumerate(ahead(ring(Recorder(), 4, made), None, lambda x: x + 1)):
        assert len(made) == k + 1 and float(x[0]) == k + 1


# ---- the helper


def test_a_delay_is_called_at_each_hand_over() -> None:
    streams, delayed = Recorder(), []
    with tampered(lambda stream: delayed.append(stream.name)) as t:
        hand_over(streams.main, streams.side(1))
        hand_over(streams.side(1), streams.main, [torch.zeros(1)])
    assert delayed == ["main", "1"] and t.count == 2


def test_a_tensor_on_a_stream_that_waits_for_nothing_is_a_race() -> None:
    """The recorder sees what it is there for: without a hand-over, and after it."""
    streams = Recorder()
    with Races(streams) as races:
        x = torch.ones(3)
        with streams.use(streams.side(1)):
            x + 1
        assert len(races.found) == 1 and "aten.add" in races.found[0]
        hand_over(streams.main, streams.side(1))
        with streams.use(streams.side(1)):
            x + 1
            x.mul_(2)
        assert len(races.found) == 1
        x.add_(1)
        assert len(races.found) > 1


def test_the_cpu_needs_no_stream() -> None:
    with apart(CPU):
        assert float(torch.ones(2).sum()) == 2.0


def test_streams_are_made_and_changed_in_one_place() -> None:
    root = Path(fastffl.__file__).parent
    pattern = re.compile(r"cuda\.stream\(|cuda\.Stream\(|wait_stream|wait_event|record_event|record_stream")
    users = {str(p.relative_to(root)) for p in root.rglob("*.py") if pattern.search(p.read_text())}
    assert users <= {"streams.py", "bench/timing.py"}, users


def test_branches_of_one_job_need_no_stream() -> None:
    streams: Any = Recorder()
    b = Branches(streams)
    b.on = True
    with tampered() as t:
        assert b.run([lambda: 7], [torch.zeros(1)], lambda r: []) == [7]
    assert t.count == 0
