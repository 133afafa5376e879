"""merge: a LLaMA-shaped bf16 checkpoint, rank 16 on every linear layer, file to file, against PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks import measure, models

_PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out)
"""


def main(work: Path, runs: int) -> None:
    small = models.checkpoint(work / "llama-2gb", 22)
    adapter = models.adapter(work / "adapter-2gb", 22, 16)
    out = work / "merged"

    def fresh(command: list[str]) -> measure.Cost:
        shutil.rmtree(out, ignore_errors=True)
        return measure.process(command)

    ours = measure.loratool("merge", small, adapter, "-o", out, "-q")
    contenders = {
        "loratool merge": lambda: fresh(ours),
        "loratool merge --workers 1": lambda: fresh([*ours, "--workers", "1"]),
        "cp -r": lambda: fresh(["/bin/cp", "-r", str(small), str(out)]),
    }
    contenders["PEFT load, merge_and_unload, save"] = lambda: fresh(
        [measure.sys.executable, "-c", _PEFT, *map(str, (small, adapter, out))]
    )
    size = sum(f.stat().st_size for f in small.glob("*.safetensors")) / 1e9
    measure.show(f"merge, {size:.1f} GB, rank 16", measure.in_turns(contenders, runs), "loratool merge")

    large = models.checkpoint(work / "llama-6gb", 62)
    adapter = models.adapter(work / "adapter-6gb", 62, 16)
    cost = fresh(measure.loratool("merge", large, adapter, "-o", out, "-q"))
    size = sum(f.stat().st_size for f in large.glob("*.safetensors")) / 1e9
    measure.show(f"merge, {size:.1f} GB, rank 16", {"loratool merge": cost}, "loratool merge")
    shutil.rmtree(out)
