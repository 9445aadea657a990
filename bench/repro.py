"""Train recipes over seeds and keep what came out: a row per run, with its digest and circumstances.

    python bench/repro.py digits none-digits --seeds 0,1,2 [--out FILE] [-- --data DIR --amp ...]

What stands behind `--` goes to `fastffl train` as it is. A run folder lies below the output's folder only while it trains.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fastffl.bench.timing import ROOT, circumstances, write


def main() -> None:
    words = sys.argv[1:]
    more = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    facts = circumstances()
    device = "h200" if "H200" in facts["device"] else "cpu"
    for name in args.recipes:
        out = args.out or ROOT / "bench" / "results" / device / f"{name.removeprefix('none-')}.jsonl"
        for seed in args.seeds.split(","):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "fastffl", "train", name, "--seed", seed, "--json", "--out", f"{folder}/run"]
                done = subprocess.run([*command, *more], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(done.returncode)
            found = json.loads(done.stdout)
            found.pop("run")
            row = {"case": f"{name} seed {seed}", "variant": found["method"], "ms": 1e3 * found["seconds"], **found}
            write(out, [row], facts)
            print(row["case"], {v: r["last"] for v, r in found["results"].items()}, f"{found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
