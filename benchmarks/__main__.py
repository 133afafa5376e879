"""`python -m benchmarks [NAME...]`: run the benchmarks, or those named, and print their ratios.

resize and extract need a peer in an environment of its own, and are skipped without: SD_SCRIPTS (checkouts of kohya's
sd-scripts, with ":" between) and SD_SCRIPTS_PYTHON; MERGEKIT_EXTRACT_LORA (the program of that name).
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import import_module
from pathlib import Path

NAMES = ("startup", "kernels", "adapters", "combine", "resize", "extract", "merge")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--work", type=Path, help="folder for models (20 GB are needed for merge); default: temporary")
    parser.add_argument("--runs", type=int, default=3, help="turns a contender gets")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.names or NAMES:
            import_module(f"benchmarks.{name}").main(arguments.work or Path(temporary), arguments.runs)


if __name__ == "__main__":
    main()
