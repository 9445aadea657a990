"""page: one HTML file that needs nothing else: no script, no request, styles and pictures inside."""

from collections.abc import Callable, Iterable, Sequence

from .. import __version__
from . import svg
from .runs import Run
from .svg import shown
from .table import Line, Table
from .text import Shown, about, caution, highest, mean, means, number, summary, votes

# Nothing may be loaded and nothing run, whatever a name turns out to hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#59636e;--rule:#d8dde3;--warn:#8a4b00;
--c0:#0072b2;--c1:#d55e00;--c2:#008a63;--c3:#b5539a;--c4:#b8860b;--c5:#3f9fd8}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1c2127;--ink:#e6e9ed;--soft:#9aa4af;--rule:#343b44;
--warn:#f0b35c;--c0:#58a8e8;--c1:#ff8a4c;--c2:#2fc79a;--c3:#e08cc8;--c4:#e3bb4a;--c5:#9ad7ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 16px 64px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:40px 0 8px}
h3{font-size:.95rem;margin:0 0 6px;font-weight:600}
p{margin:0 0 10px;max-width:80ch;overflow-wrap:anywhere}
.soft,figcaption{color:var(--soft);font-size:.9rem}
.warn{border-left:4px solid var(--warn);background:var(--card);padding:8px 14px;margin:16px 0;font-size:.92rem;
overflow-wrap:anywhere}
.warn ul{margin:0;padding-left:18px}
.over{overflow-x:auto}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:8px;margin:10px 0}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
thead th{font-weight:600}
tbody tr:last-child>*{border-bottom:0}
th:first-child{position:sticky;left:0;background:var(--paper)}
thead th,thead th:first-child{background:var(--card)}
.left{text-align:left}
tbody th{font-weight:600}
td.wide{white-space:normal;overflow-wrap:anywhere;min-width:12em}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:20px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px;min-width:0}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:10px 0 14px;list-style:none;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:7px;overflow-wrap:anywhere}
.swatch{width:30px;height:10px;flex:none}
.chart{display:block;width:100%;height:auto}
.dots{min-width:520px;max-width:780px}
.chart text{fill:var(--soft);font-size:12px}
.chart .name{fill:var(--ink)}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.axis{stroke:var(--soft);stroke-width:1;fill:none}
.reference{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 4;fill:none}
.base{--c:var(--soft)}.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.d1 .line{stroke-dasharray:7 4}.d2 .line{stroke-dasharray:2 3}
.band{fill:var(--c);opacity:.14;stroke:none}
.bar{stroke:var(--c);stroke-width:1.6;fill:none}
.mark{fill:var(--c);stroke:var(--card);stroke-width:1}
.dot,.seed{fill:var(--c)}.seed{opacity:.4}
.chart:has(.series:hover) .series:not(:hover){opacity:.25}
details{margin:10px 0}summary{cursor:pointer;font-weight:600;margin:6px 0}
code{font:.86rem ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
"""


def _cell(text: str, kind: str = "td", left: bool = False, more: str = "") -> str:
    side = ' class="left"' if left else ""
    return f"<{kind}{side}{more}>{text}</{kind}>"


def _table(made: Shown, bold: Sequence[int] = ()) -> str:
    """A table; in the columns `bold` the best mean is strong."""
    tops = {k: highest(made, k) for k in bold}
    out = ['<div class="scroll" tabindex="0"><table><thead><tr>']
    out += [_cell(f"<bdi>{shown(c)}</bdi>", "th", k < made.right, ' scope="col"') for k, c in enumerate(made.columns)]
    out.append("</tr></thead><tbody>")
    for row in made.rows:
        out.append("<tr>")
        for k, text in enumerate(row):
            inner = f"<bdi>{shown(text)}</bdi>"
            inner = f"<strong>{inner}</strong>" if k in tops and mean(text) == tops[k] else inner
            out.append(_cell(inner, "td" if k else "th", k < made.right, "" if k else ' scope="row"'))
        out.append("</tr>")
    return "".join([*out, "</tbody></table></div>"])


def _facts(rows: Iterable[tuple[str, str]], heads: tuple[str, str]) -> str:
    made = [
        f'<tr><th class="left" scope="row"><code>{shown(a)}</code></th><td class="left wide">{shown(b)}</td></tr>'
        for a, b in rows
    ]
    head = "".join(_cell(h, "th", True, ' scope="col"') for h in heads)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(made)}</tbody></table></div>'


def _series(table: Table, styles: Sequence[str], curve: Callable[[Line, Run], Iterable[tuple[float, float]]]) -> list[svg.Series]:
    named = zip(table.lines, styles, strict=True)
    return [svg.Series(line.name, style, tuple(tuple(curve(line, run)) for run in line.runs)) for line, style in named]


def _top1(vote: str | None, run: Run) -> Iterable[tuple[float, float]]:
    return ((row["epoch"], row["val"][vote]["top1"]) for row in run.scored if vote in row["val"])


def _figure(title: str, picture: str, text: str) -> str:
    return f'<figure><h3>{title}</h3><div class="over">{picture}</div><figcaption>{text}</figcaption></figure>' if picture else ""


def _pictures(table: Table) -> str:
    lines = table.lines
    base = next(k for k, line in enumerate(lines) if line is table.baseline)
    styles = svg.styles(len(lines), base)
    legend = "".join(f"<li>{svg.swatch(s)}<bdi>{shown(line.name)}</bdi></li>" for line, s in zip(lines, styles, strict=True))
    rows = []
    for line, style in zip(lines, styles, strict=True):
        marks = tuple((f"{v} {table.select}", tuple(line.values(v, table.select))) for v in ("p0", line.ships) if v)
        beside = table.base(line)
        p0 = beside.cell("p0") if beside else None
        rows.append(svg.Dots(line.name, style, marks, p0.of(table.select).mean if p0 else None))
    final = svg.dots(rows, f"top-1, %, {table.select} epoch")
    spread = "; the band is the lowest to the highest seed" if len(lines) <= svg.BANDS else "; a line's title has their spread"
    cut = f"Mean over seeds{spread}. The axis fits the second half of the epochs; earlier ones may lie below it."
    charts = (
        _figure(
            "p0: validation top-1, %",
            svg.curves(_series(table, styles, lambda _, r: _top1("p0", r)), 1, "top-1, %", (0, 100)),
            cut,
        ),
        _figure(
            "Shipped vote: validation top-1, %",
            svg.curves(_series(table, styles, lambda line, r: _top1(line.ships, r)), 2, "top-1, %", (0, 100)),
            "What each method ships: p0, the fused classifier, ... (see the table).",
        ),
        _figure(
            "Training loss",
            svg.curves(_series(table, styles, lambda _, r: r.curve("loss")), 3, "training loss", (float("-inf"), float("inf"))),
            "Sums of different terms: its height says nothing between methods, its course does.",
        ),
    )
    dotted = (
        "Circle: p0. Diamond: the shipped vote. Bars are one sample standard deviation, faint dots the seeds; "
        f"the dashed line is p0 of {shown(_baseline(table))}."
    )
    return (
        f"<h2>Where they end</h2>{_figure('Top-1 of the ' + table.select + ' epoch', final, dotted)}"
        f'<h2>How they get there</h2><ul class="legend">{legend}</ul><div class="grid2">{"".join(charts)}</div>'
    )


def _runs(table: Table) -> str:
    rows = []
    for run in table.runs:
        ships = run.ships
        last, best = (f"{run.scores[ships].last:.2f}", f"{run.scores[ships].best:.2f}") if ships else ("-", "-")
        seconds = run.figure("seconds")
        times = "-" if seconds is None else f"{seconds:,.0f}"
        rows.append([run.method, str(run.seed), ships or "-", str(run.path), last, best, times, (run.digest or "-")[:16]])
    return _table(Shown(["method", "seed", "ships", "run", "last", "best", "seconds", "digest"], rows, 4))


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _baseline(table: Table) -> str:
    """The baseline, for what is beside several of its lines."""
    own = [line for line in table.lines if line.label == table.baseline.label]
    return f"{table.baseline.label} under the same settings" if len(own) > 1 else table.baseline.name


def _highest(table: Table) -> str:
    """The line that ships the most, beside p0 of the baseline under the same settings."""
    found = [(cell.of(table.select), line) for line in table.lines if (cell := line.cell(line.ships))]
    if not found:
        return ""
    top, line = max(found, key=lambda pair: pair[0].mean)
    name = f"<strong><bdi>{shown(line.name)}</bdi></strong> (<bdi>{shown(line.ships or '')}</bdi>)"
    base = table.base(line)
    p0 = base.cell("p0") if base else None
    beside = f"; p0 of {shown(base.name)}: {number(p0.of(table.select))}" if base and p0 else ""
    return f"Highest shipped: {name} {number(top)}{beside}."


def page(table: Table) -> str:
    """The whole file."""
    seeds, methods = table.seeds, {line.method for line in table.lines}
    facts = ", ".join([_many(len(methods), "method"), _many(len(seeds), "seed"), _many(len(table.runs), "run")])
    warnings = "".join(f"<li>{shown(w)}</li>" for w in table.warnings)
    settings = table.settings()
    made = [(_many(n, "run"), text) for text, n in table.environments()]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">',
        f"<title>{shown(table.name)}: {facts}</title>",
        f"<style>{STYLE}</style></head><body><main>",
        f"<h1><bdi>{shown(table.name)}</bdi></h1>",
        f'<p class="soft">{facts}; {table.select} epoch; fastffl {shown(__version__)}</p>',
        f"<p>{_highest(table)}</p>",
        f'<div class="warn"><ul>{warnings}</ul></div>' if warnings else "",
        f"<h2>Summary</h2>{_table(summary(table), means(table))}",
        f'<p class="soft">{shown(about(table))} {shown(caution(table))}</p>',
        _pictures(table),
        f"<h2>Every vote</h2>{_table(votes(table))}",
        "<h2>Settings all runs share</h2>",
        f"<details><summary>{len(settings)} values</summary>{_facts(settings.items(), ('setting', 'value'))}</details>",
        f"<h2>Versions and devices</h2>{_facts(made, ('runs', 'made with'))}" if made else "",
        f"<h2>Runs</h2>{_runs(table)}",
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"
