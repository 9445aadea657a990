"""A table as text: Markdown, LaTeX, CSV, and the columns of the terminal's. Names are escaped for what they are written into."""

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from .. import __version__
from ..errors import printable
from .runs import Run, text_of
from .stats import Spread, Welch
from .table import Line, Select, Table

FILES = ("folder", "imagenet", "imagenette")  # data sets of image files, whose folders decide what is scored


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
    return "-" if found is None else f"{round(found.diff, 2) + 0.0:+.2f} (p {probability(found.p)})"  # + 0.0: no -0.00


def count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def other(table: Table) -> Select:
    """The selection that is not the headline."""
    return "best" if table.select == "last" else "last"


def means(table: Table) -> tuple[int, ...]:
    """The columns of `summary` whose best mean is shown bold."""
    first = 2 + len(table.by)
    return first, first + 1, first + 3, first + 4


def mean(text: str) -> float:
    """The mean in front of a cell, as it is shown; below all others where there is none."""
    return -1.0 if text == "-" else float(text.split()[0])


def highest(made: Shown, column: int) -> float:
    return max((mean(row[column]) for row in made.rows), default=0.0)


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
        rows.append([line.label, *line.by, str(len(line.runs)), *row])
    return Shown(columns, rows, 1 + len(table.by))


def votes(table: Table, pm: str = "±") -> Shown:
    """One row a vote of every method: its last and best, apart."""
    rows = []
    for line in table.lines:
        for vote, cell in line.votes.items():
            mark = " (shipped)" if vote == line.ships else ""
            rows.append(
                [
                    line.label,
                    *line.by,
                    vote + mark,
                    line.runs[0].net(vote) or "-",
                    *(number(c, pm) for c in cell),
                    str(cell.last.n),
                ]
            )
    return Shown(["method", *table.by, "vote", "net", "top-1 last", "top-1 best", "seeds"], rows, 3 + len(table.by))


def _scored(run: Run) -> str:
    """Which images a run is scored on."""
    settings = run.settings()
    if text_of(settings.get("data.val_fraction", 0)) not in ("0", "0.0"):
        return "images held out of the training set"
    if settings.get("data.name") not in FILES:
        return "the data set's own test or validation images"
    return "the images of a val or test folder or, where there is none, the tenth of every class that was held out"


def about(table: Table) -> str:
    """What the numbers are."""
    seeds = ", ".join(map(str, table.seeds))
    chosen = {
        "last": "the last epoch; best is each run's best epoch, chosen on the same images it is reported on",
        "best": "each run's BEST epoch, chosen on the same images it is reported on; last is the last epoch",
    }[table.select]
    images = " or ".join(dict.fromkeys(_scored(run) for run in table.runs))
    return f"Top-1 in % on {images}, mean and sample standard deviation over seeds {seeds}, of {chosen}."


def caution(table: Table) -> str:
    """What the tests are worth."""
    least = min(len(line.runs) for line in table.lines)
    weak = f" n={least}: weak evidence." if table.few else ""
    tests = sum(found.p is not None for _, _, found in table.tests)
    several = f" {tests} tests are not corrected for their number." if tests > 1 else ""
    nets = {tuple(line.runs[0].nets) for line in table.lines}
    arranged = len(nets) > 1 and len({names[0] for names in nets}) == 1
    others = (
        " Methods arrange the other peers: compare p0, which is the same net, not peers or shipped ensembles." if arranged else ""
    )
    base = table.baseline.label
    each = " under the same settings" if sum(line.label == base for line in table.lines) > 1 else ""
    return f"p: Welch's t-test, two-sided, against p0 of {base}{each}.{_untested(table)}{weak}{several}{others}"


def _untested(table: Table) -> str:
    """Why a difference has no p."""
    why = set()
    for line, vote, found in table.tests:
        if found.p is None and (base := table.base(line)):
            few = min(len(line.values(vote, table.select)), len(base.values("p0", table.select))) < 2
            why.add("a side has one seed" if few else "neither side varies over its seeds")
    return f" Where p is -, there is no test: {' or '.join(sorted(why))}." if why else ""


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
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "±": r"$\pm$"},
    **{"`": r"\textasciigrave{}", "[": "{[}", "]": "{]}", "*": "{*}"},
}


def tex(text: str) -> str:
    """Text as LaTeX prints it, with the default fonts too, harmless also after a line break, which takes a star and an argument
    in brackets."""
    return re.sub("-(?=-)", "-{}", "".join(_TEX.get(c, c) for c in printable(text)))  # -- would be a dash


def _tex_cell(text: str, bold: bool) -> str:
    """A cell with a true minus; `bold` is the mean in front of its spread."""
    if text == "-":
        return "--"
    if text[:1] in ("+", "-") and text[1:2].isdigit():
        return f"${text[0]}${tex(text[1:])}"
    mean, space, rest = text.partition(" ")
    return rf"\textbf{{{tex(mean)}}}{space}{tex(rest)}" if bold else tex(text)


def _tex_table(shown: Shown, caption: str, bold: Sequence[int], notes: Sequence[str]) -> list[str]:
    body = []
    tops = {k: highest(shown, k) for k in bold}
    for row in shown.rows:
        cells = [tex(c) if k < shown.right else _tex_cell(c, k in tops and mean(c) == tops[k]) for k, c in enumerate(row)]
        body.append(" & ".join(cells) + r" \\")
    align = "l" * shown.right + "r" * (len(shown.columns) - shown.right)
    return [
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{caption}}}\par\smallskip",
        # a usual table is 435 pt wide, the text of article 345
        rf"\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{\begin{{tabular}}{{{align}}}",
        r"\toprule",
        " & ".join(map(tex, shown.columns)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\smallskip{{\raggedright {tex(note)}.\par}}" for note in notes),
        r"\end{table}",
        "",
    ]


def latex(table: Table) -> str:
    """Two booktabs tables: a row a method, the best mean of each column bold and what to beware of below; every vote."""
    what, shown = tex(table.name), summary(table, times=False)
    caption = f"{what}: {tex(about(table))} {tex(caution(table))} Bold: best mean of a column. fastffl {tex(__version__)}."
    return "\n".join(
        [
            "% needs \\usepackage{booktabs,graphicx,textcomp}; letters of other scripts need lualatex and a font that has them",
            *_tex_table(shown, caption, means(table), table.warnings),
            *_tex_table(votes(table), f"{what}: every vote", (), ()),
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
