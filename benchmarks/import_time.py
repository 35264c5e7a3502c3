"""How much longer `import fts` takes than `import torch`: fresh processes, interleaved, medians.

    python benchmarks/import_time.py [--runs 15]

The target is a ratio of at most 1.15.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

MODULES = ("torch", "fts")


def seconds_to_import(module: str, directory: str) -> float:
    """Seconds that a fresh process takes to import `module`, without the start of the interpreter."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="processes per module")
    runs = parser.parse_args().runs

    times: dict[str, list[float]] = {module: [] for module in MODULES}
    with tempfile.TemporaryDirectory() as elsewhere:  # so that the installed package is measured
        for module in MODULES:
            seconds_to_import(module, elsewhere)  # fill the caches of files and byte code
        for run in range(runs):
            for module in MODULES if run % 2 == 0 else reversed(MODULES):
                times[module].append(seconds_to_import(module, elsewhere))

    torch, fts = (statistics.median(times[module]) for module in MODULES)
    pairs = [b / a for a, b in zip(times["torch"], times["fts"], strict=True)]
    print(f"import torch {torch * 1e3:6.0f} ms   (median of {runs}, {os.cpu_count()} processors)")
    print(f"import fts   {fts * 1e3:6.0f} ms")
    print(f"ratio        {fts / torch:6.3f}      (median of the pairs {statistics.median(pairs):.3f}; target <= 1.15)")


if __name__ == "__main__":
    main()
