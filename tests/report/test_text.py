"""Markdown, LaTeX, CSV and the command: the numbers come back out, names can't break out, files are named."""

import csv
import io
import json
import re
from html import unescape
from pathlib import Path

import pytest

from fastffl.report import table
from fastffl.report import text as words
from fastffl.report.stats import Welch
from fastffl.report.text import about, caution, comma_separated, latex, markdown, md, plain, summary, tex
from tests.cli.conftest import command
from tests.report import made
from tests.report.made import HOSTILE


def cells(line: str) -> list[str]:
    return [unescape(c.strip()) for c in line.strip().strip("|").split(" | ")]


def test_markdown_has_last_and_best_apart(tmp_path: Path) -> None:
    text = markdown(table([made.two_methods(tmp_path)]))
    rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    head, _, none, ffl, head2, _, *votes = rows
    assert head == [
        "method",
        "seeds",
        "p0 last",
        "peers last",
        "ships",
        "its last",
        "its best",
        "p0 - none",
        "ships - none p0",
        "seconds",
        "img/s",
    ]
    assert none == ["none", "3", "98.00 ± 1.00", "97.00 ± 1.00", "p0", "98.00 ± 1.00", "99.50 ± 0.00", "-", "-", "6", "1,001"]
    assert ffl[2:7] == ["98.50 ± 0.50", "97.25 ± 0.25", "fused", "99.20 ± 0.20", "99.90 ± 0.00"]
    assert re.fullmatch(r"\+0\.50 \(p 0\.\d{3}\)", ffl[7]) and re.fullmatch(r"\+1\.20 \(p 0\.\d{3}\)", ffl[8])
    assert head2 == ["method", "vote", "net", "top-1 last", "top-1 best", "seeds"]
    assert ["ffl", "fused (shipped)", "-", "99.20 ± 0.20", "99.90 ± 0.00", "3"] in votes and len(votes) == 7
    assert ["ffl", "p1", "wrn16_2", "96.00 ± 0.00", "99.00 ± 0.00", "3"] in votes
    assert "of the last epoch" in text and "n=3: weak evidence" in text and "seeds 0, 1, 2" in text


def test_one_seed_has_no_spread_and_no_p(tmp_path: Path) -> None:
    made.run(tmp_path / "n", "none", 0, {"p0": [74.1]})
    made.run(tmp_path / "d", "dml", 0, {"p0": [75.0]})
    _, dml = summary(table([tmp_path])).rows
    assert dml[2] == "75.00 (1 seed)" and dml[7] == "+0.90 (p -)"


def test_the_headline_says_best_when_best_is_selected(tmp_path: Path) -> None:
    found = table([made.two_methods(tmp_path)], select="best")
    shown = summary(found)
    assert shown.columns[2:7] == ["p0 best", "peers best", "ships", "its best", "its last"]
    assert shown.rows[1][5:7] == ["99.90 ± 0.00", "99.20 ± 0.20"] and "BEST epoch" in markdown(found)


def test_latex_is_bold_where_a_column_is_best(tmp_path: Path) -> None:
    text = latex(table([made.two_methods(tmp_path)]))
    body = text.partition("\\midrule\n")[2].partition("\\bottomrule")[0].splitlines()
    none, ffl = ([c.strip() for c in line.removesuffix(r" \\").split("&")] for line in body)
    assert none[:5] == ["none", "3", r"98.00 $\pm$ 1.00", r"97.00 $\pm$ 1.00", "p0"]
    assert none[5:] == [r"98.00 $\pm$ 1.00", r"99.50 $\pm$ 0.00", "--", "--"]
    assert ffl[2:4] == [r"\textbf{98.50} $\pm$ 0.50", r"\textbf{97.25} $\pm$ 0.25"]
    assert ffl[5:7] == [r"\textbf{99.20} $\pm$ 0.20", r"\textbf{99.90} $\pm$ 0.00"]
    assert re.fullmatch(r"\$\+\$0\.50 \(p 0\.\d{3}\)", ffl[7]) and re.fullmatch(r"\$\+\$1\.20 \(p 0\.\d{3}\)", ffl[8])
    assert "last epoch" in text and "seeds 0, 1, 2" in text and "fastffl 0.1.0" in text
    fits = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{\begin{tabular}{"
    assert [len(part.partition("}")[0]) for part in text.split(fits)[1:]] == [9, 6] and text.count(r"\end{tabular}}") == 2
    assert r"ffl & fused (shipped) & - & 99.20 $\pm$ 0.20 & 99.90 $\pm$ 0.00 & 3 \\" in text and "weak evidence" in text


def test_latex_has_both_selections_and_the_warnings(tmp_path: Path) -> None:
    top = made.two_methods(tmp_path)
    made.run(top / "more", "none", 3, {"p0": [98.0]}, sched__epochs=1)
    text = latex(table([top], select="best", force=True))
    assert r"ships & its best & its last & p0 - none & ships - none p0 \\" in text
    first, _ = text.split(r"\end{table}", 1)
    for warning in ("mixed by -{}-force: sched.epochs is 3 in 6, 1 in 1 runs.", "ffl has 3 of 4 seeds (missing 3)"):
        assert warning in first


def test_what_was_scored_is_said(tmp_path: Path) -> None:
    made.run(tmp_path / "a", "none", 0, {"p0": [98.0]}, data__val_fraction=0.1)
    assert "on images held out of the training set," in about(table([tmp_path]))
    made.run(tmp_path / "b", "none", 1, {"p0": [98.0]})
    both = about(table([tmp_path], by=["data.val_fraction"]))
    assert "on the data set's own test or validation images or images held out of the training set," in both
    file = tmp_path / "b" / "recipe.json"
    file.write_text(file.read_text().replace('"name": "digits",\n  "root"', '"name": "folder",\n  "root"'))
    assert "or, where there is none, the tenth of every class that was held out," in about(table([tmp_path / "b"]))


def test_tests_are_counted_once_and_those_without_p_not(tmp_path: Path) -> None:
    for seed in (0, 1):
        made.run(tmp_path / f"n{seed}", "none", seed, {"p0": [90.0 + seed]})
        made.run(tmp_path / f"d{seed}", "dml", seed, {"p0": [91.0 + seed]})
    assert "corrected" not in caution(table([tmp_path])) and "no test" not in caution(table([tmp_path]))
    made.run(tmp_path / "o", "one", 0, {"p0": [92.0]})
    assert "corrected" not in caution(table([tmp_path])) and "Where p is -, there is no test: a side has one seed." in caution(
        table([tmp_path])
    )
    for seed in (0, 1):
        made.run(tmp_path / f"f{seed}", "ffl", seed, {"p0": [91.0 + seed], "fused": [92.0 + seed]}, ships="fused")
    assert " 3 tests are not corrected" in caution(table([tmp_path])), "p0 of dml and ffl, and what ffl ships"


def test_no_spread_on_either_side_is_said(tmp_path: Path) -> None:
    for seed in (0, 1):
        made.run(tmp_path / f"n{seed}", "none", seed, {"p0": [90.0]})
        made.run(tmp_path / f"d{seed}", "dml", seed, {"p0": [91.0]})
    found = table([tmp_path])
    assert summary(found).rows[1][7] == "+1.00 (p -)"
    assert "Where p is -, there is no test: neither side varies over its seeds." in markdown(found)


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    found = table([made.hostile(tmp_path)])
    shown = markdown(found)
    assert not re.search(r"<(?!/?(details|summary)>)|\]\(|`|@", shown)
    assert all(len(cells(line)) in (11, 6) for line in shown.splitlines() if line.startswith("|"))
    assert cells(shown.splitlines()[2])[0] == HOSTILE.replace("\n", "\\n").replace("\u202e", "\\u202e")
    source = latex(found)
    rows = [line for line in source.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", row)) in (8, 5) for row in rows)
    bare = re.sub(r"\\[{}]", "", source)
    assert bare.count("{") == bare.count("}") and not re.search(r"(?<!\\)[#%](?! needs)|~|\u202e", source)
    rows = list(csv.reader(io.StringIO(comma_separated(found))))
    assert len({len(row) for row in rows}) == 1 and len(rows) == 5


def test_escapes() -> None:
    assert unescape(md(HOSTILE)) == HOSTILE.replace("\n", "\\n").replace("\u202e", "\\u202e")
    assert tex("a_b & 5 % ^") == r"a\_b \& 5 \% \textasciicircum{}" and tex("[x] `") == r"{[}x{]} \textasciigrave{}"
    assert tex('"a" *') == "''a'' {*}", "fonts in OT1 have no straight quote"
    assert md("wrn16_2 _a_ http://b") == "wrn16_2 &#95;a&#95; http&#58;//b"
    assert plain("=cmd()") == "'=cmd()" and plain("+1") == "'+1" and plain("p0 - none") == "p0 - none"


def test_csv_has_a_row_per_run_and_vote(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated(table([made.two_methods(tmp_path)])))))
    assert len(rows) == 3 * 3 + 3 * 4
    row = next(r for r in rows if (r["method"], r["seed"], r["vote"]) == ("ffl", "2", "fused"))
    assert (float(row["last"]), float(row["best"]), row["best_epoch"], row["ships"]) == (99.4, 99.9, "2", "1")
    assert row["run"] == str(tmp_path / "ffl" / "seed-2") and len(row["digest"]) == 64 and row["seconds"] == "6.0"


# ---- the command


def test_the_command_prints_and_writes_what_was_asked(tmp_path: Path) -> None:
    top = made.two_methods(tmp_path / "s")
    got = command("report", str(top))
    assert got.code == 0 and "98.50 +- 0.50" in got.out and "weak evidence" in got.out and not list(top.glob("report*"))
    got = command("report", str(top), "--format", "md,latex,csv", "--out", str(tmp_path / "out"))
    assert got.code == 0 and f"wrote {tmp_path / 'out' / 'report.md'}" in got.out
    assert (tmp_path / "out" / "report.md").read_text() == markdown(table([top]))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.csv", "report.md", "report.tex"]
    answer = json.loads(command("report", str(top), "--json", "--baseline", "ffl", "--format", "md").out)
    assert answer["baseline"] == "ffl" and answer["files"] == [str(top / "report.md")] and len(answer["runs"]) == 6
    none = answer["rows"][1]
    assert none["votes"]["p0"] == {"last": {"mean": 98.0, "std": 1.0, "n": 3}, "best": {"mean": 99.5, "std": 0.0, "n": 3}}
    assert none["welch"]["p0"]["diff"] == -0.5 and answer["rows"][0]["welch"]["p0"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "pdf"), "--format pdf: there is no such format; known: csv, html, latex, md"),
        (("--select", "first"), "first"),
        (("--baseline", "dml"), "--baseline dml: no finished run has it"),
        (("--out", "FILE/x", "--format", "md"), "can't write into"),
    ],
)
def test_wrong_words(words, said, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made.run(tmp_path / "r", "none", 0, {"p0": [1.0]})
    (tmp_path / "file").write_text("kept")
    got = command("report", str(tmp_path), *(w.replace("FILE", str(tmp_path / "file")) for w in words))
    assert got.code == 2 and said in got.err and got.err.count("error:") == 1
    assert command("report", str(tmp_path / "none")).code == 2


def test_no_difference_has_no_sign_of_its_rounding() -> None:
    assert words.tested(Welch(-1e-14, 0.0, 4.0, 1.0)) == words.tested(Welch(1e-14, 0.0, 4.0, 1.0)) == "+0.00 (p 1.000)"
    assert words.tested(Welch(-0.006, None, None, None)) == "-0.01 (p -)"
