"""svg: line charts and a dot plot as text. Colours are classes, so that the page's style sheet gives light and dark ones."""

import itertools
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from ..errors import printable
from .stats import spread

COLOURS, DASHES = 6, 3  # classes c0.. and d0.. of the style sheet: so many series can be told apart; the baseline is `base`
WIDE, HIGH = 400, 280  # of a line chart; text is 12 high
LEFT, RIGHT, TOP, BELOW = 46, 12, 12, 40  # margins of its plot
BROAD, NAME, ROW = 640, 140, 32  # of the dot plot: width, that of the names, height of a row


class Series(NamedTuple):
    """A line: one curve of (epoch, value) per run. `style` is a class of the style sheet."""

    label: str
    style: str
    curves: tuple[tuple[tuple[float, float], ...], ...]


class Dots(NamedTuple):
    """A row of the dot plot: per mark (circle, then diamond) what it is and its values, one per run. reference: what it is
    compared with, None: nothing."""

    label: str
    style: str
    marks: tuple[tuple[str, tuple[float, ...]], ...]
    reference: float | None


def shown(text: str) -> str:
    """Text that markup shows as it is."""
    return escape(printable(text), quote=True)


def styles(count: int, base: int) -> list[str]:
    """A class per series; number `base` is the baseline."""
    others = iter(f"c{k % COLOURS} d{k // COLOURS % DASHES}" for k in range(count))
    return ["base" if k == base else next(others) for k in range(count)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within low..high, about so many."""
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _named(values: Sequence[float]) -> list[str]:
    step = values[1] - values[0] if len(values) > 1 else 1.0
    digits = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return [f"{v:.{digits}f}" for v in values]


def _span(values: Iterable[float], least: float, limits: tuple[float, float]) -> tuple[float, float]:
    """What an axis shows: the values with a margin, at least `least` wide, within limits."""
    found = list(values)
    low, high = min(found), max(found)
    margin = max(0.06 * (high - low), (least - (high - low)) / 2, 0)
    low, high = max(low - margin, limits[0]), min(high + margin, limits[1])
    return low, high


BANDS = 6  # curves up to which their bands can be told apart


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def curves(series: Sequence[Series], number: int, y_label: str, limits: tuple[float, float], settled: float = 0.5) -> str:
    """Mean over seeds by epoch, with a band from the lowest to the highest seed where there are few curves.

    number   of this chart on its page    limits   that values never pass: (0, 100) for percent
    The axis shows what the curves do after the first `settled` share of the epochs; what is outside before is cut.
    """
    merged = []
    for s in series:
        at: dict[float, list[float]] = {}
        for curve in s.curves:
            for x, y in curve:
                at.setdefault(x, []).append(y)
        merged.append((s, [(x, spread(ys).mean, min(ys), max(ys)) for x, ys in sorted(at.items())]))
    last = max((p[-1][0] for _, p in merged if p), default=0)
    late = [v for _, p in merged for x, _, low, high in p for v in (low, high) if x >= settled * last or len(p) == 1]
    if not late:
        return ""
    low, high = _span(late, 0.02, limits)
    if low == high:
        low, high = low - 1, high + 1
    first = min(p[0][0] for _, p in merged if p)
    first = first if last > first else first - 1

    def px(x: float) -> float:
        return LEFT + (WIDE - LEFT - RIGHT) * (x - first) / (last - first)

    def py(y: float) -> float:
        y = min(max(y, low - 9 * (high - low)), high + 9 * (high - low))  # far outside is outside: no huge numbers
        return TOP + (HIGH - TOP - BELOW) * (high - y) / (high - low)

    out = [f'<svg class="chart" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{shown(y_label)} by epoch">']
    plot = f'x="{LEFT}" y="{TOP}" width="{WIDE - LEFT - RIGHT}" height="{HIGH - TOP - BELOW}"'
    out.append(f'<clipPath id="plot{number}"><rect {plot}/></clipPath>')
    rows = ticks(low, high)
    for y, text in zip(rows, _named(rows), strict=True):
        out.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDE - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{text}</text>')
    for x in [x for x in ticks(first, last, 6) if x == int(x)]:
        out.append(f'<text x="{px(x):.1f}" y="{HIGH - BELOW + 18}" text-anchor="middle">{x:.0f}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {HIGH - BELOW}H{WIDE - RIGHT}"/>')
    out.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 8}" text-anchor="middle">epoch</text>')
    out.append(f'<g clip-path="url(#plot{number})">')
    for s, points in merged:
        if not points:
            continue
        runs, end = len(s.curves), points[-1]
        band = [(px(x), py(b)) for x, _, _, b in points] + [(px(x), py(a)) for x, _, a, _ in reversed(points)]
        spreads = f", seeds {end[2]:.2f} to {end[3]:.2f}" if runs > 1 else ""
        out.append(f'<g class="series {s.style}"><title>{shown(s.label)}: {end[1]:.2f} at epoch {end[0]:.0f}{spreads}</title>')
        if runs > 1 and len(series) <= BANDS:
            out.append(f'<path class="band" d="{_path(band)}Z"/>')
        line = [(px(x), py(y)) for x, y, _, _ in points]
        if len(line) == 1:
            out.append(f'<circle class="dot" cx="{line[0][0]:.1f}" cy="{line[0][1]:.1f}" r="4"/>')
        out.append(f'<path class="line" d="{_path(line)}"/></g>')
    return "".join([*out, "</g></svg>"])


def dots(rows: Sequence[Dots], x_label: str) -> str:
    """Means with error bars of one standard deviation, each seed as a faint dot; a dashed line at the rows' reference."""
    made = [(row, [(what, values, spread(values)) for what, values in row.marks if values]) for row in rows]
    ends = [v for _, marks in made for _, values, s in marks for v in (*values, s.mean - (s.std or 0), s.mean + (s.std or 0))]
    if not ends:
        return ""
    low, high = _span(ends, 0.5, (-math.inf, math.inf))
    high_px = TOP + ROW * len(rows) + BELOW

    def px(x: float) -> float:
        return NAME + (BROAD - NAME - RIGHT) * (x - low) / (high - low)

    floor = high_px - BELOW
    out = [f'<svg class="chart dots" viewBox="0 0 {BROAD} {high_px}" role="img" aria-label="{shown(x_label)} by method">']
    at = [x for x in ticks(low, high, 7) if x <= 100]
    for x, text in zip(at, _named(at), strict=True):
        out.append(f'<path class="grid" d="M{px(x):.1f} {TOP}V{floor}"/>')
        out.append(f'<text x="{px(x):.1f}" y="{floor + 18}" text-anchor="middle">{text}</text>')
    beside = [row.reference for row in rows]
    for reference, together in itertools.groupby(range(len(rows)), lambda k: beside[k]):
        places = list(together)
        ends_at = f"{TOP + ROW * places[0]}V{TOP + ROW * (places[-1] + 1)}"
        out += [f'<path class="reference" d="M{px(reference):.1f} {ends_at}"/>'] if reference is not None else []
    out.append(f'<path class="axis" d="M{NAME} {floor}H{BROAD - RIGHT}"/>')
    out.append(f'<text x="{(NAME + BROAD - RIGHT) / 2}" y="{high_px - 8}" text-anchor="middle">{shown(x_label)}</text>')
    for k, (row, marks) in enumerate(made):
        middle = TOP + ROW * (k + 0.5)
        name = row.label if len(row.label) <= 20 else f"{row.label[:19]}…"
        out.append(f'<text class="name" x="{NAME - 12}" y="{middle + 4:.1f}" text-anchor="end">{shown(name)}</text>')
        for j, (what, values, s) in enumerate(marks):
            y = middle + (7 * (2 * j - 1) if len(marks) > 1 else 0)
            text = f"{s.mean:.2f}" + ("" if s.std is None else f" ± {s.std:.2f}")
            out.append(f'<g class="series {row.style}"><title>{shown(row.label)}, {shown(what)}: {text}, n={s.n}</title>')
            if s.std is not None:
                a, b = px(s.mean - s.std), px(s.mean + s.std)
                out.append(f'<path class="bar" d="M{a:.1f} {y:.1f}H{b:.1f}M{a:.1f} {y - 4:.1f}v8M{b:.1f} {y - 4:.1f}v8"/>')
            out += [f'<circle class="seed" cx="{px(v):.1f}" cy="{y:.1f}" r="2.5"/>' for v in values if s.n > 1]
            x = px(s.mean)
            shape = f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6Z"
            out.append(f'<path class="mark" d="{shape}"/>' if j else f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
            out.append("</g>")
    return "".join([*out, "</svg>"])


def swatch(style: str) -> str:
    """A piece of a series' line, for a legend."""
    line = f'<g class="{style}"><path class="line" d="M1 5H29"/></g>'
    return f'<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true">{line}</svg>'
