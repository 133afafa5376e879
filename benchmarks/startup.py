"""Start-up: what a command costs before it has done anything, against the imports of the peers."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import measure, models


def main(work: Path, runs: int) -> None:
    adapter = models.adapter(work / "adapter-2gb", 22, 16)
    commands = {
        "loratool --help": measure.loratool("--help"),
        "loratool inspect (header only, 154 modules)": measure.loratool("inspect", adapter),
        "python -c pass": [sys.executable, "-c", "pass"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import peft": [sys.executable, "-c", "import peft"],
    }
    contenders = {name: (lambda c=command: measure.process(c)) for name, command in commands.items()}  # type: ignore[misc]
    measure.show("start-up", measure.in_turns(contenders, max(runs, 5)), "loratool --help")
