"""A table as text: Markdown, LaTeX, CSV, and the columns of the terminal's. Names are escaped for what they are written into."""

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from .. import __version__
from ..errors import printable
from .runs import Run
from .stats import Spread, Welch
from .table import Line, Select, Table


class Shown(NamedTuple):
    """A table ready to print: names flush left up to column `right`, numbers after it flush right."""

    columns: list[str]
    rows: list[list[str]]
    right: int


def number(found: Spread | None, pm: str = "±") -> str:
    """`98.44 ± 0.12`; one seed has no spread, and says so."""
    if found is None:
        return "-"
    return f"{found.mean:.2f} (1 seed)" if found.std is None else f"{found.mean:.2f} {pm} {found.std:.2f}"


def probability(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def tested(found: Welch | None) -> str:
    """`+0.52 (p 0.031)`: the difference in points and Welch's p."""
    return "-" if found is None else f"{found.diff:+.2f} (p {probability(found.p)})"


def count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def other(table: Table) -> Select:
    """The selection that is not the headline."""
    return "best" if table.select == "last" else "last"


def _names(table: Table, line: Line) -> list[str]:
    return [line.label, *line.by]


def summary(table: Table, pm: str = "±", times: bool = True) -> Shown:
    """One row a method: p0, the mean of the peers, the shipped vote, both against the baseline; medians of the times."""
    base = table.baseline.label
    columns = ["method", *table.by, "seeds", f"p0 {table.select}", f"peers {table.select}", "ships", f"its {table.select}"]
    columns += [f"its {other(table)}", f"p0 - {base}", f"ships - {base} p0", *(["seconds", "img/s"] if times else [])]
    rows = []
    for line in table.lines:
        p0, peers, ships = (line.cell(v) for v in ("p0", "peers", line.ships))
        row = [number(c and c.of(table.select), pm) for c in (p0, peers)]
        row += [line.ships or "-", *(number(ships and ships.of(s), pm) for s in (table.select, other(table)))]
        row += [tested(table.against(line, v)) for v in ("p0", line.ships)]
        row += [count(line.median(key)) for key in ("seconds", "img_s")] if times else []
        rows.append([*_names(table, line), str(len(line.runs)), *row])
    return Shown(columns, rows, 1 + len(table.by))


def votes(table: Table, pm: str = "±") -> Shown:
    """One row a vote of every method: its last and best, apart."""
    rows = []
    for line in table.lines:
        for vote, cell in line.votes.items():
            mark = " (shipped)" if vote == line.ships else ""
            rows.append(
                [
                    *_names(table, line),
                    vote + mark,
                    line.runs[0].net(vote) or "-",
                    *(number(c, pm) for c in cell),
                    str(cell.last.n),
                ]
            )
    return Shown(["method", *table.by, "vote", "net", "top-1 last", "top-1 best", "seeds"], rows, 3 + len(table.by))


def about(table: Table) -> str:
    """What the numbers are."""
    seeds = ", ".join(map(str, table.seeds))
    chosen = {
        "last": "the last epoch; best is each run's best epoch, chosen on the same images it is reported on",
        "best": "each run's BEST epoch, chosen on the same images it is reported on; last is the last epoch",
    }[table.select]
    held = table.settings().get("data.val_fraction", "0.0") in ("0", "0.0")
    images = "the data set's own test or validation images" if held else "images held out of the training set"
    return f"Top-1 in % on {images}, mean and sample standard deviation over seeds {seeds}, of {chosen}."


def caution(table: Table) -> str:
    """What the tests are worth."""
    least = min(len(line.runs) for line in table.lines)
    weak = f" n={least}: weak evidence." if table.few else ""
    tests = 2 * (len(table.lines) - 1)
    several = f" {tests} tests are not corrected for their number." if tests > 2 else ""
    nets = {tuple(line.runs[0].nets) for line in table.lines}
    arranged = len(nets) > 1 and len({names[0] for names in nets}) == 1
    others = (
        " Methods arrange the other peers: compare p0, which is the same net, not peers or shipped ensembles." if arranged else ""
    )
    return f"p: Welch's t-test, two-sided, against p0 of {table.baseline.label}.{weak}{several}{others}"


# ---- Markdown

_MARKS = re.compile(r"[^\w\s.,;:'()%=+±/-]|(?<![^\W_])_|_(?![^\W_])|:(?! )")


def md(text: str) -> str:
    """Text that Markdown and the HTML in it show as it is: everything they could read is a character reference."""
    return _MARKS.sub(lambda m: f"&#{ord(m[0])};", printable(text))


def _md_table(shown: Shown) -> list[str]:
    ends = ["---" if k < shown.right else "---:" for k in range(len(shown.columns))]
    return [
        f"| {' | '.join(cells)} |" for cells in ([md(c) for c in shown.columns], ends, *([md(c) for c in r] for r in shown.rows))
    ]


def markdown(table: Table) -> str:
    """The table for GitHub: a row a method, what the numbers are, and every vote in a fold."""
    notes = [f"- {md(w)}" for w in table.warnings]
    return "\n".join(
        [
            *_md_table(summary(table)),
            "",
            f"{md(table.name)}: {md(about(table))} {md(caution(table))}",
            *(["", *notes] if notes else []),
            "",
            "<details><summary>every vote</summary>",
            "",
            *_md_table(votes(table)),
            "",
            "</details>",
            "",
        ]
    )


# ---- LaTeX

_TEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$"},
    **{"`": r"\textasciigrave{}", "[": "{[}", "]": "{]}"},
}


def tex(text: str) -> str:
    """Text as LaTeX prints it, harmless also after a line break, which takes an argument in brackets."""
    return "".join(_TEX.get(c, c) for c in printable(text))


def _tex_number(found: Spread | None, best: bool) -> str:
    if found is None:
        return "--"
    text = f"{found.mean:.2f}"
    text = rf"\textbf{{{text}}}" if best else text
    return text if found.std is None else rf"{text} $\pm$ {found.std:.2f}"


def latex(table: Table) -> str:
    """A booktabs table, the best mean of each column bold."""
    rows: list[list[Spread | None]] = []
    for line in table.lines:
        cells = [line.cell(v) for v in ("p0", "peers", line.ships)]
        rows.append([c and c.of(table.select) for c in cells] + [cells[2] and cells[2].best])
    tops = [max((round(c.mean, 2) for c in column if c), default=None) for column in zip(*rows, strict=True)]
    body = []
    for line, found in zip(table.lines, rows, strict=True):
        numbers = [_tex_number(c, c is not None and round(c.mean, 2) == top) for c, top in zip(found, tops, strict=True)]
        names = [*map(tex, _names(table, line)), str(len(line.runs))]
        body.append(" & ".join([*names, *numbers[:2], tex(line.ships or "-"), *numbers[2:]]) + r" \\")
    heads = [
        "method",
        *table.by,
        "$n$",
        f"$p_0$, {table.select}",
        f"peers, {table.select}",
        "ships",
        f"its {table.select}",
        "its best",
    ]
    heads = [h if "$" in h else tex(h) for h in heads]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs} and \\usepackage{textcomp}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{tex(table.name)}: {tex(about(table))} Bold: best mean of a column. fastffl {tex(__version__)}.}}",
            rf"\begin{{tabular}}{{{'l' * (1 + len(table.by))}rrrlrr}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


# ---- CSV


def plain(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    shown = printable(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown


def comma_separated(table: Table) -> str:
    """A row per run and vote."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [
        "method",
        "label",
        *table.by,
        "seed",
        "vote",
        "net",
        "ships",
        "last",
        "best",
        "best_epoch",
        "epochs",
        "seconds",
        "img_s",
    ]
    writer.writerow([*map(plain, heads), "digest", "run"])
    for line in table.lines:
        for run in line.runs:
            writer.writerows(_csv_rows(line, run))
    return out.getvalue()


def _csv_rows(line: Line, run: Run) -> Sequence[Sequence[object]]:
    names = [plain(line.method), plain(line.label), *map(plain, line.by), run.seed]
    end = [run.epochs, run.figure("seconds"), run.figure("img_s"), run.digest or "", plain(str(run.path))]
    return [
        [*names, plain(vote), plain(run.net(vote)), int(vote == run.ships), *score, *end] for vote, score in run.scores.items()
    ]
