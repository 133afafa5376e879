"""Whole models: `loratool extract` against mergekit-extract-lora, from checkpoints to adapter, cost and residual.

MERGEKIT_EXTRACT_LORA is the program of that name, in an environment of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks import measure, models
from benchmarks.resize import pairs

PEER = "mergekit-extract-lora (writes bf16)"
_SHAPE = {"hidden": 3072, "inter": 8192, "heads": 24, "kv_heads": 8, "vocab": 256}  # a layer of Llama 3.2 3B
_LAYERS, _RANK = 1, 64
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main(work: Path, runs: int) -> None:
    program = os.environ.get("MERGEKIT_EXTRACT_LORA", "")
    if not Path(program).is_file():
        print("\nextract against mergekit: skipped, MERGEKIT_EXTRACT_LORA does not name mergekit-extract-lora")
        return
    work = work.absolute()  # mergekit takes a relative path for a name on the Hub
    base = models.checkpoint(work / "one-3b-layer", _LAYERS, _SHAPE)
    tuned = models.checkpoint(work / "one-3b-layer-tuned", _LAYERS, _SHAPE, 0.05)
    outs = {name: work / f"{name}-out" for name in ("ours", "ours-bf16", "peer")}
    own = ["extract", tuned, "--base", base, "--rank", _RANK, "-q", "--force", "-o"]
    places = ("--model", str(tuned), "--base-model", str(base), "--out-path", str(outs["peer"]))
    rules = ("--max-rank", str(_RANK), "--skip-undecomposable", "-e", "embed_tokens", "-e", "lm_head")
    peer = [program, *places, *rules, "--device", "cpu"]
    contenders = {
        "loratool extract": lambda: measure.process(measure.loratool(*own, outs["ours"]), _ONE_THREAD),
        "loratool extract --dtype bfloat16": lambda: measure.process(
            measure.loratool(*own, outs["ours-bf16"], "--dtype", "bfloat16"), _ONE_THREAD
        ),
        "import torch": lambda: measure.process([sys.executable, "-c", "import torch"], _ONE_THREAD),
        PEER: lambda: measure.process(peer, _ONE_THREAD),
        "mergekit-extract-lora --help": lambda: measure.process([program, "--help"], _ONE_THREAD),
    }
    costs = measure.in_turns(contenders, runs, once=PEER)
    title = f"extract, {7 * _LAYERS} modules of a layer of Llama 3.2 3B (bf16), rank {_RANK}"
    measure.show(title, costs, "loratool extract")
    one, narrow, start, _, peer_start = costs
    measure.start_up(costs, (one, start), (PEER, peer_start))
    print(f"  {'residual, and what it is over the optimum (fp64)':<56}{'all':>12}{'over %':>10}{'worst module':>14}")
    found = residuals(tuned, base, list(outs.values()))
    for name, (residual, over, worst) in zip((one, narrow, PEER), found, strict=True):
        print(f"  {name:<56}{residual:>12.6f}{100 * over:>10.4f}{100 * worst:>14.4f}")
    for out in outs.values():
        shutil.rmtree(out)


def residuals(tuned: Path, base: Path, adapters: list[Path]) -> list[tuple[float, float, float]]:
    """Return, of each adapter, the relative residual, its excess over the optimum, and the worst of one module."""
    factors = [pairs(adapter / "adapter_model.safetensors") for adapter in adapters]
    new, old = weights(tuned), weights(base)
    total = optimum = 0.0
    left, worst = [0.0] * len(factors), [0.0] * len(factors)
    for name in (n for n in new if "_proj" in n):
        D = new[name].double() - old[name].double()
        gram = D.T @ D if D.shape[0] > D.shape[1] else D @ D.T
        squares = torch.linalg.eigvalsh(gram).flip(0)
        best = float(squares[_RANK:].sum())
        total, optimum = total + float(squares.sum()), optimum + best
        for i, found in enumerate(factors):
            up, down = found[f"base_model.model.{name.removesuffix('.weight')}"]
            square = float((D - up @ down).square().sum())
            left[i] += square
            worst[i] = max(worst[i], (square / best) ** 0.5 - 1)
    return [((s / total) ** 0.5, (s / optimum) ** 0.5 - 1, w) for s, w in zip(left, worst, strict=True)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found
