"""Whole adapters: resize against PEFT's way of recompressing (add_weighted_adapter, svd), and extract end to end."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks import measure, models

_SHAPE = {"hidden": 2048, "inter": 5632, "heads": 32, "kv_heads": 4, "vocab": 256}
_LAYERS = 1
_PEFT_NAME = "PEFT add_weighted_adapter(svd), with the base"
# As a stand-in for resize: one adapter with weight 1 is copied, so two copies of it are combined at half weight each.
_PEFT = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from peft import PeftModel
base, adapter, out, rank = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter, adapter_name="a")
model.load_adapter(adapter, "b")
model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "small", combination_type="svd", svd_rank=int(rank))
model.save_pretrained(out, selected_adapters=["small"])
"""
_FULL_SVD = """
import sys, torch
from safetensors.torch import load_file, save_file
tuned, base, out, rank = sys.argv[1:]
torch.set_num_threads(1)
from pathlib import Path
def load(folder):
    return {k: v for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}
new, old, factors = load(tuned), load(base), {}
for name in new:
    if "_proj" in name:
        U, S, V = torch.linalg.svd(new[name].float() - old[name].float(), full_matrices=False)
        k = int(rank)
        factors[name + ".B"], factors[name + ".A"] = (U[:, :k] * S[:k]).contiguous(), V[:k].contiguous()
save_file(factors, out)
"""


def main(work: Path, runs: int) -> None:
    base = models.checkpoint(work / "one-layer", _LAYERS, _SHAPE)
    adapter = models.adapter(work / "adapter-64", _LAYERS, 64, _SHAPE)
    out = work / "out"

    def fresh(command: list[str]) -> measure.Cost:
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".safetensors").unlink(missing_ok=True)
        return measure.process(command)

    contenders = {
        "loratool resize": lambda: fresh(measure.loratool("resize", adapter, "-o", out, "--rank", 32, "-q")),
        "import torch": lambda: measure.process([sys.executable, "-c", "import torch"]),
        _PEFT_NAME: lambda: fresh([sys.executable, "-c", _PEFT, *map(str, (base, adapter, out, 32))]),
    }
    costs = measure.in_turns(contenders, min(runs, 2))
    measure.show("resize, 7 modules of a 2048-wide layer, rank 64 -> 32", costs, "loratool resize")

    tuned = models.checkpoint(work / "one-layer-tuned", _LAYERS, _SHAPE, 0.05)
    contenders = {
        "loratool extract": lambda: fresh(
            measure.loratool("extract", tuned, "--base", base, "-o", out, "--rank", 64, "-q")
        ),
        "full fp32 SVD of every difference": lambda: fresh(
            [sys.executable, "-c", _FULL_SVD, str(tuned), str(base), str(out.with_suffix(".safetensors")), "64"]
        ),
    }
    costs = measure.in_turns(contenders, min(runs, 2))
    measure.show("extract, 7 modules of a 2048-wide layer, rank 64", costs, "loratool extract")
    shutil.rmtree(out, ignore_errors=True)
