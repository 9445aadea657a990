"""A roofline picture as SVG, from the rows of one run.

Left: what each case achieves (GFLOP/s) over its arithmetic intensity (FLOP per byte), both logarithmic, below the roof that
the copy rate and the GEMM rate of the same run make. Right: the share of that roof, a bar per case.
"""

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

LEFT, TOP, WIDTH, HEIGHT = 90, 60, 430, 400  # of the plot
NAMES, BARS, LINE = 570, 900, 18  # where the cases' names and bars begin, height of a line
BAR, MOST = 240, 1.1  # width of a bar of 100 %, and where bars are cut
COLOURS = {
    "distill_graph": "#1f5fa8",
    "fuse_conv": "#b3541e",
    "bn_act": "#2e7d4f",
    "augment": "#7b3f9e",
    "sgd_flat": "#8a6d00",
    "guard": "#a02c5a",
    "nce": "#2a7f8f",
}


class Dot(NamedTuple):
    op: str
    text: str
    x: float  # FLOP per byte
    y: float  # GFLOP/s
    share: float  # of the roof at x
    rate: float  # GB/s


def dots(rows: Iterable[dict[str, Any]]) -> tuple[list[Dot], float, float]:
    """The newest cold row of ours per case, with the run's copy rate (GB/s) and GEMM rate (TFLOP/s)."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    copy = gemm = 0.0
    for row in rows:
        if row.get("kind") == "ceiling":
            copy, gemm = row.get("gb_s", copy), row.get("tflop_s", gemm)
        ours = row.get("kind") == "time" and row.get("group") == "ours" and row.get("l2") == "cold"
        if ours and row.get("ms") and row.get("bytes") and row.get("flop"):
            newest[row["op"], row["shape"], row["dtype"]] = row
    made = []
    for (op, shape, dtype), row in newest.items():
        x, y = row["flop"] / row["bytes"], 1e3 * row["tflop_s"]
        made.append(Dot(op, f"{op} {shape} {dtype}", x, y, y / min(x * copy, 1e3 * gemm), row["gb_s"]))
    return made, copy, gemm


def svg(rows: Iterable[dict[str, Any]], title: str) -> str:
    """The picture as text. ValueError if no row has a time, bytes and FLOP."""
    found, copy, gemm = dots(rows)
    if not found or not copy or not gemm:
        raise ValueError("no timed rows of ours with ceilings of the same run; a roofline needs a CUDA device")
    ridge = 1e3 * gemm / copy
    x0, x1 = math.floor(math.log10(min(d.x for d in found) / 1.2)), math.ceil(math.log10(max(*(d.x for d in found), ridge) * 1.2))
    y0, y1 = math.floor(math.log10(min(d.y for d in found) / 1.2)), math.ceil(math.log10(1.2e3 * gemm))

    def px(x: float) -> float:
        return LEFT + WIDTH * (math.log10(x) - x0) / (x1 - x0)

    def py(y: float) -> float:
        return TOP + HEIGHT * (y1 - math.log10(y)) / (y1 - y0)

    below = TOP + HEIGHT
    tall = max(below + 60, TOP + LINE * (len(found) + 2))
    wide = round(BARS + MOST * BAR) + 150
    head = f'width="{wide}" height="{tall}" font-family="sans-serif" font-size="12" fill="#222"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {head}>']
    out += ['<rect width="100%" height="100%" fill="white"/>', f'<text x="{LEFT}" y="26" font-size="15">{escape(title)}</text>']
    for k in range(x0, x1 + 1):
        out.append(f'<path d="M{px(10.0**k):.1f} {TOP}V{below}" stroke="#ddd"/>')
        out.append(f'<text x="{px(10.0**k):.1f}" y="{below + 18}" text-anchor="middle">{10.0**k:g}</text>')
    for k in range(y0, y1 + 1):
        out.append(f'<path d="M{LEFT} {py(10.0**k):.1f}H{LEFT + WIDTH}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{py(10.0**k) + 4:.1f}" text-anchor="end">{10.0**k:,.0f}</text>')
    out.append(f'<text x="{LEFT + WIDTH / 2}" y="{below + 42}" text-anchor="middle">modelled FLOP per modelled byte</text>')
    out.append(f'<text x="{LEFT}" y="{TOP - 10}">GFLOP/s; roof: copy {copy:,.0f} GB/s, bf16 GEMM {gemm:,.0f} TFLOP/s</text>')
    low = max(10.0**x0, 10.0**y0 / copy)
    corners = " L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in ((low, low * copy), (ridge, 1e3 * gemm), (10.0**x1, 1e3 * gemm)))
    out.append(f'<path d="M{corners}" fill="none" stroke="#444" stroke-width="1.5"/>')
    out.append(f'<text x="{BARS}" y="{TOP - 10}">share of the roof; the line is 85 %</text>')
    for k, d in enumerate(found):
        colour, y = COLOURS.get(d.op, "#444"), TOP + LINE * k
        out.append(f'<circle cx="{px(d.x):.1f}" cy="{py(d.y):.1f}" r="4" fill="{colour}" fill-opacity="0.75"/>')
        out.append(f'<text x="{NAMES}" y="{y + 12}" fill="{colour}">{escape(d.text)}</text>')
        out.append(f'<rect x="{BARS}" y="{y + 2}" width="{BAR * min(d.share, MOST):.1f}" height="{LINE - 6}" fill="{colour}"/>')
        out.append(f'<text x="{BARS + MOST * BAR + 46:.0f}" y="{y + 12}" text-anchor="end">{100 * d.share:.0f} %</text>')
        out.append(f'<text x="{BARS + MOST * BAR + 56:.0f}" y="{y + 12}">{d.rate:,.0f} GB/s</text>')
    line = BARS + 0.85 * BAR
    out.append(f'<path d="M{line} {TOP - 4}V{TOP + LINE * len(found)}" stroke="#222" stroke-dasharray="3 3"/>')
    return "\n".join([*out, "</svg>", ""])


def draw(rows: Iterable[dict[str, Any]], path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(rows, title))
