"""Make the README's tables from committed rows: python bench/readme.py"""

import json
from pathlib import Path

from fastffl.bench.kernels import goal_table, goals
from fastffl.bench.timing import ROOT, read


def between(text: str, mark: str, new: str) -> str:
    """The text with what stands between <!-- mark --> and <!-- /mark --> replaced."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    head, rest = text.split(begin)
    return head + begin + new + end + rest.split(end)[1]


def speed(path: Path) -> str:
    """A table of the newest row of every case and variant."""
    newest = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        newest[row["case"], row["variant"]] = row
    lines = [
        "| case | variant | ms | img/s | time, official = 1 | loss difference in float64 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in newest.values():
        error = f"{row['parity_f64']:.0e}" if "parity_f64" in row else ""
        lines.append(
            f"| {row['case']} | {row['variant']} | {row['ms']:.2f} | {row['img_s']:,.0f} | {row['ratio']:.3f} | {error} |"
        )
    any_row = next(iter(newest.values()))
    facts = f"{any_row['device']}, {any_row['threads']} threads, torch {any_row['torch']}, commit {any_row['commit']}"
    return "\n".join(lines) + f"\n\nMedians, {facts} (`{path.relative_to(ROOT)}`).\n"


def demo(path: Path) -> str:
    """The table `make demo` ends with, from the committed row of its recipe and seed."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(r for r in reversed(rows) if r["case"] == "digits seed 0")
    head = f"{'vote':8}{'net':9}{'top-1 last':>12}{'top-1 best':>13}{'at epoch':>11}"
    lines = [head, "-" * len(head)]
    for vote, r in row["results"].items():
        net = r["net"] if r["net"] != vote else ""
        lines.append(f"{vote:8}{net:9}{r['last']:12.2f}{r['best']:13.2f}{r['best_epoch']:11}")
    lines.append(f"{row['epochs']} epochs, {row['steps']} steps in {row['seconds']:.1f} s, {row['img_s']:,.0f} img/s")
    return "\n".join(["```", *lines, f"digest {row['digest']}", "```", ""])


def kernels(path: Path) -> str:
    """The goals and what the newest rows say about them; `unmeasured` where there is no row."""
    rows = read(path) if path.is_file() else []
    lines = ["| goal | case, against | must | aim | measured | met |", "| --- | --- | ---: | ---: | ---: | --- |"]
    lines += [f"| {' | '.join(cells)} |" for cells in goal_table(goals(rows))]
    timed = [row for row in rows if row.get("kind") == "time" and row.get("ms") is not None]
    if not timed:
        return "\n".join(lines) + "\n"
    facts = "{device}, torch {torch}, Triton {triton}, commit {commit}".format(**timed[-1])
    return "\n".join(lines) + f"\n\n{facts} (`{path.relative_to(ROOT)}`).\n"


def made(text: str) -> str:
    """The README with its tables as the committed rows have them."""
    rows = ROOT / "bench" / "results" / "cpu"
    text = between(between(text, "bench", speed(rows / "train.jsonl")), "demo", demo(rows / "digits.jsonl"))
    return between(text, "kernels", kernels(ROOT / "bench" / "results" / "h200" / "kernels.jsonl"))


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(made(readme.read_text()))
