"""A roofline picture as SVG: what each case achieves (GFLOP/s, log) over its arithmetic intensity (FLOP per byte, log).

Cases are numbered dots; the numbers are explained beside the plot with the share of the roof that the case reaches. The roof
is the copy rate and the GEMM rate of the same run.
"""

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

LEFT, TOP, WIDTH, HEIGHT, KEY, LINE = 70, 50, 520, 420, 520, 17
COLOURS = {"distill_graph": "#1f5fa8", "fuse_conv": "#b3541e", "bn_act": "#2e7d4f", "augment": "#7b3f9e", "sgd_flat": "#8a6d00"}
LABEL = (18, 13)  # width and height of a dot's number


class Dot(NamedTuple):
    x: float  # FLOP per byte
    y: float  # GFLOP/s
    share: float  # of the roof at x
    op: str
    text: str


def dots(rows: Iterable[dict[str, Any]]) -> tuple[list[Dot], float, float]:
    """The newest cold row of ours per case, with the run's copy rate (GB/s) and GEMM rate (TFLOP/s)."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    copy = gemm = 0.0
    for row in rows:
        if row.get("kind") == "ceiling":
            copy, gemm = row.get("gb_s", copy), row.get("tflop_s", gemm)
        if row.get("kind") == "time" and row.get("group") == "ours" and row.get("l2") == "cold" and row.get("bytes"):
            newest[row["op"], row["shape"], row["dtype"]] = row
    made = []
    for row in newest.values():
        x, y = row["flop"] / row["bytes"], 1e3 * row["tflop_s"]
        roof = min(x * copy, 1e3 * gemm)
        if x > 0 and roof > 0:
            made.append(Dot(x, y, y / roof, row["op"], f"{row['op']} {row['shape']} {row['dtype']}  {row['gb_s']:,.0f} GB/s"))
    return sorted(made), copy, gemm


def _decades(low: float, high: float) -> tuple[int, int]:
    return math.floor(math.log10(low)), math.ceil(math.log10(high))


def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where each dot's number stands (left, top): right of its dot, moved up until it covers no other number."""
    taken: list[tuple[float, float]] = []
    for x, y in points:
        at = (x + 6, y - LABEL[1])
        while any(abs(at[0] - a) < LABEL[0] and abs(at[1] - b) < LABEL[1] for a, b in taken):
            at = (at[0], at[1] - 2)
        taken.append(at)
    return taken


def svg(rows: Iterable[dict[str, Any]], title: str) -> str:
    """The picture as text. ValueError if no row has a time, bytes and FLOP."""
    found, copy, gemm = dots(rows)
    if not found:
        raise ValueError("no timed rows of ours with modelled bytes and FLOP; a roofline needs a CUDA device")
    x0, x1 = _decades(min(d.x for d in found) / 1.5, 1.5 * max(*(d.x for d in found), 1e3 * gemm / copy))
    y0, y1 = _decades(min(d.y for d in found) / 1.5, 1.5e3 * gemm)

    def px(x: float) -> float:
        return LEFT + WIDTH * (math.log10(x) - x0) / (x1 - x0)

    def py(y: float) -> float:
        return TOP + HEIGHT * (y1 - math.log10(y)) / (y1 - y0)

    total = max(HEIGHT + 60, LINE * len(found) + 20)
    size = f'width="{LEFT + WIDTH + KEY}" height="{TOP + total}"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" fill="#222">']
    out.append('<rect width="100%" height="100%" fill="white"/>')
    out.append(f'<text x="{LEFT}" y="26" font-size="15">{escape(title)}</text>')
    for k in range(x0, x1 + 1):
        x = px(10.0**k)
        out.append(f'<path d="M{x:.1f} {TOP}V{TOP + HEIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{10.0**k:g}</text>')
    for k in range(y0, y1 + 1):
        y = py(10.0**k)
        out.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + WIDTH}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**k:,.0f}</text>')
    below, middle = TOP + HEIGHT, TOP + HEIGHT / 2
    out.append(f'<text x="{LEFT + WIDTH / 2}" y="{below + 40}" text-anchor="middle">modelled FLOP per modelled byte</text>')
    out.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">GFLOP/s</text>')
    ridge = 1e3 * gemm / copy
    low = max(10.0**x0, 10.0**y0 / copy)
    roof = [(low, low * copy), (ridge, 1e3 * gemm), (10.0**x1, 1e3 * gemm)]
    out.append(
        f'<path d="M{" L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in roof)}" fill="none" stroke="#444" stroke-width="1.5"/>'
    )
    said = f"roof: copy {copy:,.0f} GB/s, bf16 GEMM {gemm:,.0f} TFLOP/s"
    out.append(f'<text x="{LEFT + 8}" y="{TOP + 16}" fill="#444">{said}</text>')
    at = [(px(d.x), py(d.y)) for d in found]
    for k, (d, (x, y), (u, v)) in enumerate(zip(found, at, place(at), strict=True), 1):
        colour = COLOURS.get(d.op, "#444")
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        if y - v > LABEL[1] + 1:
            out.append(f'<path d="M{x:.1f} {y:.1f}L{u + 4:.1f} {v + LABEL[1]:.1f}" stroke="{colour}" stroke-width="0.7"/>')
        out.append(f'<text x="{u:.1f}" y="{v + LABEL[1] - 2:.1f}" font-size="11" fill="{colour}">{k}</text>')
        line = TOP + 12 + LINE * (k - 1)
        out.append(f'<text x="{LEFT + WIDTH + 54}" y="{line}" text-anchor="end" fill="{colour}">{k}</text>')
        out.append(f'<text x="{LEFT + WIDTH + 104}" y="{line}" text-anchor="end">{100 * d.share:.0f} %</text>')
        out.append(f'<text x="{LEFT + WIDTH + 114}" y="{line}">{escape(d.text)}</text>')
    return "\n".join([*out, "</svg>", ""])


def draw(rows: Iterable[dict[str, Any]], path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(rows, title))
