"""Tables of planted runs: the numbers, what may be mixed, what is left out, and damaged files in one sentence."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
from scipy import stats as scipy_stats

from fastffl.errors import UsageError
from fastffl.report import table
from fastffl.report.page import page
from fastffl.report.runs import Images, find, read
from fastffl.report.text import caution, latex, markdown
from tests.report import made

ONE = {"p0": [50.0, 90.0, 80.0], "p1": [10.0, 20.0, 30.0]}


def test_means_spreads_and_tests(tmp_path: Path) -> None:
    found = table([made.two_methods(tmp_path)])
    assert [line.label for line in found.lines] == ["none", "ffl"] and found.seeds == [0, 1, 2] and found.warnings == ()
    none, ffl = found.lines
    assert none.votes["p0"].last == pytest.approx((98.0, 1.0, 3)) and none.votes["p0"].best == (99.5, 0.0, 3)
    assert ffl.votes["fused"].last == pytest.approx((99.2, 0.2, 3)) and ffl.votes["fused"].best == pytest.approx((99.9, 0.0, 3))
    assert list(ffl.votes) == ["p0", "p1", "mean", "fused"] and (none.ships, ffl.ships) == ("p0", "fused")
    peers = none.cell("peers")  # per run (97 + 95) / 2 and so on, then over runs; the best epochs differ between peers
    assert peers is not None and peers.last == pytest.approx((97.0, 1.0, 3))
    assert peers.best == pytest.approx(((99.5 + 96) / 2, 0.5, 3))
    assert (none.median("seconds"), none.median("img_s")) == (6.0, 1001.0)
    against = found.against(ffl, "p0")
    assert against is not None and against.diff == pytest.approx(0.5)
    theirs = scipy_stats.ttest_ind([98, 98.5, 99], [97, 98, 99], equal_var=False)
    assert against.t == pytest.approx(0.5 / math.sqrt(1 / 3 + 0.25 / 3)) and against.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert found.against(none, "p0") is None, "the baseline is not tested against itself"
    shipped = found.against(ffl, "fused")
    assert shipped is not None and shipped.diff == pytest.approx(1.2)


def test_best_is_compared_only_when_asked(tmp_path: Path) -> None:
    found = table([made.two_methods(tmp_path)], select="best", baseline="ffl")
    assert [line.label for line in found.lines] == ["ffl", "none"]
    against = found.against(found.lines[1], "p0")
    assert against is not None and against.diff == pytest.approx(99.5 - (98 + 98.5 + 99) / 3)


def test_best_epoch_is_the_first_that_reached_it(tmp_path: Path) -> None:
    run = read(made.run(tmp_path / "r", "none", 0, {"p0": [70.0, 90.0, 90.0, 80.0]}))
    assert run.scores["p0"] == (80.0, 90.0, 2)


# ---- what may be mixed


def test_settings_that_compute_the_same_or_follow_from_the_method_are_mixed(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "none", 0, ONE)
    made.run(tmp_path / "b", "none", 1, ONE, run__threads=2, run__log_every=7, data__workers=3)
    made.run(tmp_path / "c", "ffl", 0, ONE, method__T=5.0, nets__share_stem=False, nets__names=("resnet8", "resnet20"))
    found = table([tmp_path])
    assert [(line.label, line.seeds) for line in found.lines] == [("none", [0, 1]), ("ffl", [0])]
    assert "compare p0, which is the same net" in caution(found)


@pytest.mark.parametrize(
    ("settings", "path", "values"),
    [
        ({"optim__lr": 0.2}, "optim.lr", ("0.1", "0.2")),
        ({"data__batch_size": 32}, "data.batch_size", ("64", "32")),
        ({"optim__nesterov": False}, "optim.nesterov", ("true", "false")),
        ({"amp__enabled": True}, "amp.enabled", ("false", "true")),
        ({"nets__names": ("wrn16_2", "resnet8")}, "nets.names", ("resnet8", "wrn16_2")),
    ],
)
def test_other_settings_are_refused_told_apart_or_forced(settings, path, values, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made.run(tmp_path / "a", "none", 0, ONE)
    made.run(tmp_path / "b", "dml", 0, ONE, **settings)
    with pytest.raises(UsageError) as refused:
        table([tmp_path])
    for part in (f"differ in {path}", *values, str(tmp_path / "a"), str(tmp_path / "b"), f"--by {path}", "--force"):
        assert part in str(refused.value)
    apart = table([tmp_path], by=[path])
    assert len(apart.lines) == 2 and len({line.by for line in apart.lines}) == 2
    assert apart.against(apart.lines[1], "p0") is None, "there is no baseline with that setting"
    forced = table([tmp_path], force=True)
    assert f"mixed by --force: {path} is" in forced.warnings[0] and len(forced.lines) == 2


FLOWERS = Images(("daisy", "rose"), 40, 10)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (Images(("bus", "car", "van"), 40, 10), ("2 classes (daisy, rose)", "3 classes (bus, car, van)")),
        (Images(("daisy", "rose", "tulip"), 40, 10), ("2 classes", "3 classes (tulip)")),
        (Images(("daisy", "rose"), 41, 10), ("40 training images", "41 training images")),
        (Images(("daisy", "rose"), 40, 11), ("10 images that are scored", "11 images that are scored")),
    ],
)
def test_other_images_are_other_data_wherever_they_lie(images: Images, said: tuple[str, str], tmp_path: Path) -> None:
    made.run(tmp_path / "a", "none", 0, ONE, images=FLOWERS, data__root="x/flowers")
    made.run(tmp_path / "moved", "dml", 0, ONE, images=FLOWERS, data__root="y")
    assert len(table([tmp_path]).lines) == 2, "the same data in two places"
    made.run(tmp_path / "b", "none", 1, ONE, images=images, data__root="x/b")
    with pytest.raises(UsageError, match="runs differ in the data: ") as refused:
        table([tmp_path])
    for part in (*said, str(tmp_path / "a"), str(tmp_path / "b"), "--by data.root", "--force"):
        assert part in str(refused.value)
    assert len(table([tmp_path], by=["data.root"]).lines) == 3
    with pytest.raises(UsageError, match="runs differ in the data: "):
        table([tmp_path], by=["run.seed"])
    [warning, *_] = table([tmp_path], force=True).warnings
    assert warning.startswith(f"mixed by --force: the data is {said[0]} in 2, {said[1]} in 1 runs")


def test_data_replaced_where_it_lay_is_other_data(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "none", 0, ONE, images=FLOWERS)
    made.run(tmp_path / "b", "none", 1, ONE)
    with pytest.raises(UsageError, match=r"10 classes .*; leave some out, or mix them with --force"):
        table([tmp_path])
    shutil.rmtree(tmp_path / "b" / "last")
    assert table([tmp_path / "b"]).runs[0].images == (None, None, 450), "without a checkpoint, what its rows say"


def test_peers_of_one_method_are_the_same_nets(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "dml", 0, ONE)
    made.run(tmp_path / "b", "dml", 1, ONE, nets__names=("resnet8", "resnet20"))
    with pytest.raises(UsageError, match=r"nets.names: resnet8,wrn16_2 in .* and resnet8,resnet20 in"):
        table([tmp_path])
    assert "compare p0" not in caution(table([tmp_path / "a"]))
    shutil.rmtree(tmp_path / "b")
    made.run(tmp_path / "b", "dml", 1, ONE, nets__share_stem=False)
    with pytest.raises(UsageError, match=r"nets.share_stem: none in .* and false in"):
        table([tmp_path])


def test_a_methods_own_settings_make_lines_of_their_own(tmp_path: Path) -> None:
    for k, (T, seed) in enumerate(((3.0, 0), (3.0, 1), (1.0, 0), (1.0, 1))):
        made.run(tmp_path / str(k), "dml", seed, {"p0": [50.0 + T + seed]}, method__T=T)
    found = table([tmp_path], baseline="dml T=3.0")
    assert [(line.label, line.votes["p0"].last.mean) for line in found.lines] == [("dml T=3.0", 53.5), ("dml T=1.0", 51.5)]
    with pytest.raises(UsageError, match=r"--baseline dml is several lines; name one of them: 'dml T=1.0', 'dml T=3.0'"):
        table([tmp_path], baseline="dml")


def test_by_compares_under_the_same_setting(tmp_path: Path) -> None:
    for lr, gain in ((0.1, 1.0), (0.2, 3.0)):
        for seed in (0, 1):
            made.run(tmp_path / f"n{lr}{seed}", "none", seed, {"p0": [10 * lr + seed]}, optim__lr=lr)
            made.run(tmp_path / f"d{lr}{seed}", "dml", seed, {"p0": [10 * lr + seed + gain]}, optim__lr=lr)
    found = table([tmp_path], by=["optim.lr"])
    diffs = [(line.label, line.by, d.diff) for line in found.lines if (d := found.against(line, "p0"))]
    assert diffs == [("dml", ("0.1",), pytest.approx(1.0)), ("dml", ("0.2",), pytest.approx(3.0))]
    with pytest.raises(UsageError, match=r"--by optim.lrr: no run has such a setting; did you mean optim.lr"):
        table([tmp_path], by=["optim.lrr"])


def test_a_baseline_without_the_setting_is_everyones(tmp_path: Path) -> None:
    for seed in (0, 1):
        made.run(tmp_path / f"n{seed}", "none", seed, {"p0": [10.0 + seed]})
        made.run(tmp_path / f"o{seed}", "one", seed, {"p0": [11.0 + seed]}, nets__share_stem=True)
        for T in (1.0, 3.0):
            made.run(tmp_path / f"d{T}{seed}", "dml", seed, {"p0": [10.0 + T + seed]}, method__T=T)
    found = table([tmp_path], by=["method.T"])
    shown = [(line.label, line.by, d and d.diff) for line in found.lines for d in [found.against(line, "p0")]]
    assert shown[0] == ("none", ("-",), None) and found.lines[0].name == "none"
    assert shown[1:] == [
        ("dml", ("1.0",), pytest.approx(1.0)),
        ("dml", ("3.0",), pytest.approx(3.0)),
        ("one", ("3.0",), pytest.approx(1.0)),
    ]
    apart = table([tmp_path], by=["method.T"], baseline="dml")
    assert [(line.label, *line.by) for line in apart.lines if apart.against(line, "p0")] == [("one", "3.0")]


def test_a_seed_counts_once(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "dml", 4, ONE)
    made.run(tmp_path / "b", "dml", 4, ONE)
    with pytest.raises(UsageError, match=r"a and .*b are both seed 4 of dml"):
        table([tmp_path])
    assert table([tmp_path / "a", tmp_path / "a", tmp_path / "b" / ".." / "a"]).lines[0].seeds == [4], "one run, named thrice"


# ---- what is left out, and what is missing


def test_unfinished_and_earlier_runs_are_left_out_by_name(tmp_path: Path) -> None:
    made.run(tmp_path / "whole", "dml", 0, ONE)
    made.run(tmp_path / "whole" / "before-1", "none", 0, ONE)
    made.run(tmp_path / "whole" / "copy", "none", 0, ONE)
    made.run(tmp_path / "begun" / "before-1", "none", 1, ONE)  # its second stage has not begun
    made.run(tmp_path / "cut", "dml", 1, ONE, epochs=7)
    early = made.run(tmp_path / "early", "dml", 2, ONE, epochs=4)
    with (early / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 4, "val": {"p0": {"top1": 99.0}}, "stopped_early": True}) + "\n" + '{"epoch": 4, "va')
    found = table([tmp_path])
    assert find([tmp_path]) == [tmp_path / "cut", tmp_path / "early", tmp_path / "whole"]
    assert [r.path.name for r in found.runs] == ["whole"] and found.lines[0].votes["p0"].last == (80.0, None, 1)
    assert f"left out {tmp_path / 'cut'}: it ended at epoch 3 of 7" in found.warnings
    assert f"left out {early}: it ended at epoch 3 of 4" in found.warnings
    assert found.against(found.lines[0], "p1") == (-50.0, None, None, None)
    assert found.lines[0].median("seconds") == 12.0, "with the six seconds of the run before it"
    with pytest.raises(UsageError, match=r"no finished run below .*left out .*cut: it ended at epoch 3 of 7"):
        table([tmp_path / "cut"])


def test_cells_with_fewer_seeds_and_methods_without_runs_are_named(tmp_path: Path) -> None:
    for seed in (0, 1, 5):
        made.run(tmp_path / f"n{seed}", "none", seed, ONE)
        if seed != 1:
            made.run(tmp_path / f"d{seed}", "dml", seed, ONE, machine={**made.MACHINE, "device": "H200", "threads": 8})
    (tmp_path / "sweep.json").write_text(json.dumps({"methods": ["dml", "none", "ffl"], "seeds": [0, 1, 5, 6]}))
    found = table([tmp_path], baseline="dml")
    assert found.warnings == (
        "dml has 2 of 3 seeds (missing 1); shown as n=2",
        "ffl has none of 4 seeds; it has no row",
        "no method has a finished run of seed 6, which the sweep was asked for",
        "runs were made with different device (H200, cpu): rounding differs and times can't be compared",
        "runs were made with different threads (8, 1): rounding differs and times can't be compared",
    )


def test_the_middle_of_an_even_number_of_times(tmp_path: Path) -> None:
    for seed in (0, 1):
        made.run(tmp_path / str(seed), "none", seed, {"p0": [50.0] * 4})
    made.run(tmp_path / "1" / "before-1", "none", 1, {"p0": [50.0] * 2})
    [line] = table([tmp_path]).lines
    assert (line.median("img_s"), line.median("seconds")) == (1001.5, 10.0), "of 1000 to 1003; of 8 and 8 + 4"


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = made.two_methods(tmp_path / "s")
    with monkeypatch.context() as closed:
        made.locked(closed, top / "ffl")
        found = table([top])
    assert [line.label for line in found.lines] == ["none"]
    assert found.warnings == (f"left out {top / 'ffl'}: it can't be read (Permission denied)",)
    for written in (markdown(found), latex(found), page(found)):
        assert "Permission denied" in written
    with monkeypatch.context() as closed:
        made.locked(closed, top / "ffl")
        with pytest.raises(UsageError, match=r"no run folder below .*ffl.*Permission denied"):
            table([top / "ffl"])
    for closed_folder in ("last", "before-1"):
        (top / "ffl" / "seed-1" / closed_folder).mkdir(exist_ok=True)
        with monkeypatch.context() as closed:
            made.locked(closed, top / "ffl" / "seed-1" / closed_folder)
            with pytest.raises(UsageError, match=f"seed-1/{closed_folder}.* can't be read: Permission denied; make it readable"):
                table([top])


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    run = made.run(tmp_path / "r", "dml", 0, ONE)
    (run / "environment.json").unlink()
    (run / "environment.json").mkdir()
    with pytest.raises(UsageError, match=r"r/environment.json can't be read: Is a directory; make it readable, or move its"):
        table([tmp_path])


def test_links_are_followed_once(tmp_path: Path) -> None:
    top = made.two_methods(tmp_path / "elsewhere")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "ffl").symlink_to(top / "ffl")
    (tmp_path / "s" / "one").symlink_to(top / "none" / "seed-1")
    (tmp_path / "s" / "again").symlink_to(top / "ffl" / "seed-0")
    (top / "ffl" / "up").symlink_to(tmp_path / "s")
    (tmp_path / "s" / "self").symlink_to(tmp_path / "s" / "self")
    assert sorted((r.method, r.seed) for r in table([tmp_path / "s"]).runs) == [("ffl", 0), ("ffl", 1), ("ffl", 2), ("none", 1)]


def test_rows_keep_the_order_of_the_sweep_after_the_baseline(tmp_path: Path) -> None:
    for method in ("dml", "ffl", "none"):
        made.run(tmp_path / method, method, 0, ONE)
    assert [line.label for line in table([tmp_path]).lines] == ["none", "dml", "ffl"]
    (tmp_path / "sweep.json").write_text(json.dumps({"methods": ["ffl", "none", "dml"], "seeds": [0]}))
    assert [line.label for line in table([tmp_path]).lines] == ["none", "ffl", "dml"]
    with pytest.raises(UsageError, match=r"--baseline fll: no finished run has it; did you mean ffl\?"):
        table([tmp_path], baseline="fll")


def test_runs_that_do_not_say_what_they_ship(tmp_path: Path) -> None:
    run = made.run(tmp_path / "r", "dml", 0, ONE)
    (run / "rows.jsonl").write_text((run / "rows.jsonl").read_text().replace(', "ships": "p0"', ""))
    found = table([tmp_path])
    assert found.lines[0].ships is None and found.warnings == (
        "1 runs do not say which vote they ship; train them with this version",
    )


# ---- damage


ROW = {"epoch": 3, "val": {"p0": {"top1": 50.0}}}
DAMAGE: dict[str, tuple[str, bytes]] = {
    "recipe of lines": ("recipe.json", b"hello"),
    "recipe not text": ("recipe.json", b"\xff\xfe"),
    "recipe as list": ("recipe.json", b"[]"),
    "recipe of nothing": ("recipe.json", b"{}"),
    "deep recipe": ("recipe.json", b"[" * 100000),
    "rows not text": ("rows.jsonl", b"\xff\xfe\n"),
    "rows cut inside": ("rows.jsonl", b'{"epoch": 1, "va\n{"epoch": 2}\n'),
    "row as number": ("rows.jsonl", b"3\n"),
    "row without epoch": ("rows.jsonl", b"{}\n"),
    "epoch as truth": ("rows.jsonl", b'{"epoch": true}\n'),
    "votes as list": ("rows.jsonl", b'{"epoch": 3, "val": []}\n'),
    "vote without top1": ("rows.jsonl", b'{"epoch": 3, "val": {"p0": {}}}\n'),
    "top1 above 100": ("rows.jsonl", b'{"epoch": 3, "val": {"p0": {"top1": 1e9}}}\n'),
    "top1 not finite": ("rows.jsonl", b'{"epoch": 3, "val": {"p0": {"top1": NaN}}}\n'),
    "environment as list": ("environment.json", b"[]"),
    "environment cut": ("environment.json", b'{"torch":'),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_in_one_sentence(what: str, tmp_path: Path) -> None:
    name, data = DAMAGE[what]
    run = made.run(tmp_path / "r", "dml", 0, ONE)
    (run / name).write_bytes(data)
    with pytest.raises(UsageError) as refused:
        table([tmp_path])
    text = str(refused.value)
    assert str(run / name) in text and "leave its folder out" in text and "\n" not in text and len(text) < 400


def test_mutated_runs_are_a_table_or_one_sentence(tmp_path: Path) -> None:
    rng = random.Random(5)
    run = made.run(tmp_path / "r", "dml", 0, ONE)
    whole = {name: (run / name).read_text() for name in ("recipe.json", "rows.jsonl", "environment.json")}
    tables = 0
    for _ in range(300):
        name = rng.choice(list(whole))
        text = list(whole[name])
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(text))
            if rng.random() < 0.3:
                del text[at : at + rng.choice((1, 5, 40))]
            else:
                text[at:at] = rng.choice(
                    ("-", "9" * 400, "1e999", "NaN", '"', "null", "[[", "{", "}", "\n", '"x": 1,', "\\u202e", "true")
                )
        (run / name).write_text("".join(text))
        try:
            tables += bool(json.dumps(table([tmp_path]).document()))
        except UsageError as error:
            assert str(error)
        (run / name).write_text(whole[name])
    assert 30 < tables < 290


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run folder below"):
        table([tmp_path])
    with pytest.raises(UsageError, match="nowhere: there is no such folder"):
        table([tmp_path / "nowhere"])
