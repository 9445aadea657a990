"""Make the README's tables from committed rows and from the output of `make demo`.

python bench/readme.py              rewrite the speed table from bench/results/
python bench/readme.py --demo FILE  also rewrite the demo's table from a captured `fastffl train digits`
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
    """The closing table of a captured run, as it was printed."""
    lines = path.read_text().splitlines()
    begin = next(k for k, line in enumerate(lines) if line.split()[:2] == ["vote", "net"])
    return "```\n" + "\n".join(line.rstrip() for line in lines[begin:] if line.strip()) + "\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path)
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = between(readme.read_text(), "bench", speed(ROOT / "bench" / "results" / "cpu" / "train.jsonl"))
    if args.demo:
        text = between(text, "demo", demo(args.demo))
    readme.write_text(text)


if __name__ == "__main__":
    main()
