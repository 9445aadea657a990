"""Make the README's tables from committed rows: python bench/readme.py"""

import json
from collections.abc import Iterable
from pathlib import Path

from fastffl.bench import cases
from fastffl.bench import data as loaders
from fastffl.bench import kernels as benched
from fastffl.bench.goals import Measured, Row, goal_table
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


def goals(measured: Iterable[Measured], timed: list[Row], path: Path) -> str:
    """What a release must reach and what the newest rows say; `unmeasured` where there is no row."""
    lines = ["| goal | case, against | must | aim | measured | met |", "| --- | --- | ---: | ---: | ---: | --- |"]
    lines += [f"| {' | '.join(cells)} |" for cells in goal_table(measured)]
    return "\n".join(lines) + "\n" + (f"\n{_facts(timed[-1], path)}" if timed else "")


def _facts(row: Row, path: Path) -> str:
    facts = "{device}, torch {torch}, Triton {triton}, commit {commit}".format(**row)
    return f"{facts} (`{path.relative_to(ROOT)}`).\n"


def kernels(path: Path) -> str:
    rows = read(path) if path.is_file() else []
    timed = [row for row in rows if row.get("kind") == "time" and row.get("ms") is not None]
    return goals(benched.goals(rows), timed, path)


def step(path: Path) -> str:
    rows = read(path) if path.is_file() else []
    return goals(cases.goals(rows), [row for row in rows if row.get("state") == "ok"], path)


def cpu_step(path: Path) -> str:
    """The newest row of each variant on a CPU: ours beside the plain loop and the authors' code."""
    newest = {(r["case"], r["variant"]): r for r in read(path) if r["ms"] is not None and not r["variant"].startswith("alone ")}
    lines = ["| case | variant | ms | p20 to p80 | rounds | img/s | time, ours = 1 |", "| --- | --- |" + " ---: |" * 5]
    for (case, variant), r in newest.items():
        rate = f"{r['img_s']:,.0f}" if r["img_s"] else ""
        lines.append(
            f"| {case} | {variant} | {r['ms']:.1f} | {r['p20']:.1f} to {r['p80']:.1f} | {r['n']} | {rate} | {r['ratio']:.2f} |"
        )
    last = next(reversed(newest.values()))
    facts = "{device}, {threads} thread(s), torch {torch}".format(**last)
    commits = ", ".join(dict.fromkeys(r["commit"] for r in newest.values()))
    return "\n".join(lines) + f"\n\nMedians of interleaved rounds, {facts}, commits {commits} (`{path.relative_to(ROOT)}`).\n"


def memory(path: Path) -> str:
    """The newest row of each case and variant of bench/kept_memory.py."""
    names = {"kept": "ours", "given back": "ours, memory given back", "plain loop": "plain loop"}
    newest = {(r["case"], r["variant"]): r for r in read(path)}
    lines = ["| case | variant | ms | page faults a step | peak, MiB | time, ours = 1 |", "| --- | --- |" + " ---: |" * 4]
    for (case, variant), r in newest.items():
        cells = f"{r['ms']:.1f} | {r['faults']:,.0f} | {r['peak_mib']:,.0f} | {r['ratio']:.2f}"
        lines.append(f"| {case} | {names[variant]} | {cells} |")
    last = next(reversed(newest.values()))
    facts = "{device}, {threads} thread(s), torch {torch}, commit {commit}".format(**last)
    return "\n".join(lines) + f"\n\nMedians of {last['n']} processes each, {facts} (`{path.relative_to(ROOT)}`).\n"


def cpu_data(path: Path) -> str:
    """The newest row of each loader, step and both together on a CPU."""
    newest = {(r["case"], r["variant"]): r for r in read(path) if r["ms"] is not None}
    lines = [
        "| case | variant | ms a batch | p20 to p80 | img/s | busy cores | time, its first = 1 |",
        "| --- | --- |" + " ---: |" * 5,
    ]
    for (case, variant), r in newest.items():
        cells = f"{r['ms']:.1f} | {r['p20']:.1f} to {r['p80']:.1f} | {r['img_s']:,.0f} | {r['cpu_cores']:.1f} | {r['ratio']:.2f}"
        lines.append(f"| {case} | {variant} | {cells} |")
    last = next(reversed(newest.values()))
    facts = "{device}, torch {torch}, torchvision {torchvision}, DALI {dali}, commit {commit}".format(**last)
    return "\n".join(lines) + f"\n\nMedians of interleaved turns, {facts} (`{path.relative_to(ROOT)}`).\n"


def gpu_data(path: Path) -> str:
    rows = read(path) if path.is_file() else []
    return goals(loaders.goals(rows), [row for row in rows if row.get("state") == "ok"], path)


def gallery(folder: Path) -> str:
    """What `fastffl report --format md,csv` wrote of the sweep over all methods; the runs' figures are in the CSV beside it."""
    row = read(folder / "sweep.jsonl")[-1]
    took = f"{row['runs']} runs in {row['seconds'] / 60:.1f} minutes, {row['jobs']} at a time with a thread each"
    facts = "{device}, torch {torch}, commit {commit}".format(**row)
    return (folder / "report.md").read_text() + f"\n{took}, {facts} (`{folder.relative_to(ROOT)}`).\n"


def made(text: str) -> str:
    """The README with its tables as the committed rows have them."""
    rows = ROOT / "bench" / "results" / "cpu"
    text = between(between(text, "bench", speed(rows / "train.jsonl")), "demo", demo(rows / "digits.jsonl"))
    text = between(text, "memory", memory(rows / "memory.jsonl"))
    gpu = ROOT / "bench" / "results" / "h200"
    text = between(between(text, "step", step(gpu / "step.jsonl")), "step-cpu", cpu_step(rows / "step.jsonl"))
    text = between(between(text, "data-cpu", cpu_data(rows / "data.jsonl")), "data", gpu_data(gpu / "data.jsonl"))
    text = between(text, "gallery", gallery(rows / "digits-sweep"))
    return between(text, "kernels", kernels(gpu / "kernels.jsonl"))


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(made(readme.read_text()))
