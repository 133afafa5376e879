"""combine against PEFT's add_weighted_adapter: whole processes, and without what both spend before they begin."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks import measure, models

_SHAPE = {"hidden": 2048, "inter": 5632, "heads": 32, "kv_heads": 4, "vocab": 256}
_LAYERS = 2
_PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, one, two, out, kind = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, one, adapter_name="a")
model.load_adapter(two, "b")
if kind:
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=kind)
    model.save_pretrained(out, selected_adapters=["both"])
"""


def main(work: Path, runs: int) -> None:
    base = models.checkpoint(work / "two-layers", _LAYERS, _SHAPE)
    one, two = (models.adapter(work / f"to-combine-{n}", _LAYERS, 16, _SHAPE, seed=n) for n in (1, 2))
    out = work / "combined"

    def fresh(command: list[str]) -> measure.Cost:
        shutil.rmtree(out, ignore_errors=True)
        return measure.process(command)

    def peft(kind: str) -> list[str]:
        return [sys.executable, "-c", _PEFT, *map(str, (base, one, two, out, kind))]

    for method in ("svd", "cat"):
        ours = measure.loratool("combine", one, two, "-w", 0.7, "-w", 0.4, "-o", out, "--method", method, "-q")
        name, start = f"loratool combine --method {method}", "import torch"
        theirs, loading = f"PEFT {method}, with the base", "PEFT: load the base and both adapters"
        contenders = {
            name: lambda ours=ours: fresh(ours),
            start: lambda: measure.process([sys.executable, "-c", "import torch"]),
            theirs: lambda method=method: fresh(peft(method)),
            loading: lambda: measure.process(peft("")),
        }
        costs = measure.in_turns(contenders, min(runs, 1 if method == "svd" else 2))
        measure.show(f"two adapters of rank 16, {7 * _LAYERS} modules, 2048 wide, {method}", costs, name)
        measure.start_up(costs, (name, start), (theirs, loading))
    shutil.rmtree(out, ignore_errors=True)
