"""Whole adapters from file to file: `loratool resize` against sd-scripts' networks/resize_lora.py, cost and error.

SD_SCRIPTS is a checkout of kohya-ss/sd-scripts, or several with ":" between them; SD_SCRIPTS_PYTHON an interpreter
that can run it (default: this one). Its versions differ in how they treat a matrix with both sides above 2048: by a
full SVD; since pull request 2240 by `torch.svd_lowrank`; the latest by the one that --svd_lowrank_niter says.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import measure

PEER = "sd-scripts resize_lora.py"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_NAMES = ((".lora_down.", ".lora_up."), (".lora_A.", ".lora_B."))
Shapes = dict[str, tuple[int, int]]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def main(work: Path, runs: int) -> None:
    scripts = [Path(place, "networks", "resize_lora.py") for place in os.environ.get("SD_SCRIPTS", "").split(":")]
    scripts = [script for script in scripts if script.is_file()]
    if not scripts:
        print("\nresize against sd-scripts: skipped, SD_SCRIPTS names no checkout of it")
        return
    work.mkdir(parents=True, exist_ok=True)
    xl = kohya_file(work / "xl.safetensors", sdxl(), 64)
    full = next((c for c in map(_full_svd, scripts) if c), None)
    if full:
        print(f"\nresize, {len(sdxl())} modules of SDXL (kohya), rank 64 -> 32, peer by full SVD: one turn of it")
        compare(xl, xl, full, 32, runs, once=PEER)
    lowrank = next((c for c in map(_svd_lowrank, scripts) if c), None)
    folder = peft_folder(work / "flux", flux(), 64)
    for keep in (16, 32) if lowrank else ():  # at 32 its 2 * 32 directions hold all of rank 64
        print(f"\nresize, {len(flux())} modules of Flux (PEFT), rank 64 -> {keep}, peer by svd_lowrank")
        compare(folder, folder / "adapter_model.safetensors", lowrank or [], keep, runs)


def compare(ours: Path, theirs: Path, peer: list[str], keep: int, runs: int, *, once: str = "") -> None:
    """Resize one adapter with both, both to float32; print what it cost, and the errors over the optimum."""
    out, peer_out = theirs.with_name("ours-out.safetensors"), theirs.with_name("peer-out.safetensors")
    if ours.is_dir():
        out = ours.with_name("ours-out")
    own = measure.loratool("resize", ours, "-o", out, "--rank", keep, "--dtype", "float32", "-q", "--force")
    script = Path(peer[1])
    variables = {**_ONE_THREAD, "PYTHONPATH": str(script.parents[1])}
    command = [*peer, "--model", str(theirs), "--save_to", str(peer_out), "--new_rank", str(keep)]
    contenders = {
        "loratool resize": lambda: measure.process(own, _ONE_THREAD),
        "import torch": lambda: measure.process([sys.executable, "-c", "import torch"], _ONE_THREAD),
        PEER: lambda: measure.process(command, variables),
        f"{PEER} --help": lambda: measure.process([*peer[:2], "--help"], variables),
    }
    costs = measure.in_turns(contenders, runs, once)
    measure.show("", costs, "loratool resize")
    one, start, _, peer_start = costs
    measure.start_up(costs, (one, start), (PEER, peer_start))
    original = pairs(theirs)
    print(f"  {'error, and what it is over the optimum (fp64)':<56}{'all':>12}{'over':>10}{'worst module':>14}")
    for name, file in ((one, out), (PEER, peer_out)):
        error, over, worst = errors(original, pairs(file / theirs.name if file.is_dir() else file), keep)
        print(f"  {name:<56}{error:>12.6f}{over:>10.1e}{worst:>14.1e}")
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    peer_out.unlink()


def _command(script: Path, *options: str) -> list[str]:
    return [os.environ.get("SD_SCRIPTS_PYTHON", sys.executable), str(script), *options]


def _full_svd(script: Path) -> list[str] | None:
    text = script.read_text()
    if "--svd_lowrank_niter" in text:
        return _command(script, "--svd_lowrank_niter", "0")
    return _command(script) if "svd_lowrank" not in text else None


def _svd_lowrank(script: Path) -> list[str] | None:
    return _command(script) if "svd_lowrank" in script.read_text() else None


# ---- errors, in fp64, of the difference of two products of factors


def pairs(file: Path) -> Pairs:
    """Return up (out, r), with the scale, and down (r, in) of each module, in fp64."""
    tensors, found = load_file(file), {}
    for name, down in tensors.items():
        for one, other in _NAMES:
            if one in name:
                module = name.partition(one)[0]
                scale = float(tensors[f"{module}.alpha"]) / len(down) if f"{module}.alpha" in tensors else 1.0
                found[module] = tensors[name.replace(one, other)].double() * scale, down.double()
    return found


def errors(original: Pairs, result: Pairs, keep: int) -> tuple[float, float, float]:
    """Return the relative error of the whole adapter, its excess over the optimum, and the worst excess of a module."""
    total = error = optimum = 0.0
    worst = -1.0
    for module, (up, down) in original.items():
        new_up, new_down = result[module]
        squares = torch.linalg.svdvals(_core(up, down)).square()
        best = float(squares[keep:].sum())
        left = float(_core(torch.cat([up, -new_up], dim=1), torch.cat([down, new_down])).square().sum())
        total, error, optimum = total + float(squares.sum()), error + left, optimum + best
        worst = max(worst, (left / best) ** 0.5 - 1)
    return (error / total) ** 0.5, (error / optimum) ** 0.5 - 1, worst


def _core(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return a small matrix with the singular values of up @ down."""
    return torch.linalg.qr(up, mode="r")[1] @ torch.linalg.qr(down.T, mode="r")[1].T


# ---- adapters with the names and shapes of real ones


def sdxl() -> Shapes:
    """Return all of the transformers of SDXL's UNet, which are what kohya trains there, in diffusers' names."""
    shapes: Shapes = {}
    every = [(f"down_blocks.{n}.attentions.{m}", w, b) for n, w, b in ((1, 640, 2), (2, 1280, 10)) for m in (0, 1)]
    every += [("mid_block.attentions.0", 1280, 10)]
    every += [(f"up_blocks.{n}.attentions.{m}", w, b) for n, w, b in ((0, 1280, 10), (1, 640, 2)) for m in (0, 1, 2)]
    for place, width, blocks in every:
        shapes |= {f"{place}.{name}": (width, width) for name in ("proj_in", "proj_out")}
        for block in (f"{place}.transformer_blocks.{i}" for i in range(blocks)):
            for attention, context in (("attn1", width), ("attn2", 2048)):
                inputs = {"to_q": width, "to_k": context, "to_v": context, "to_out.0": width}
                shapes |= {f"{block}.{attention}.{name}": (width, inp) for name, inp in inputs.items()}
            shapes |= {f"{block}.ff.net.0.proj": (8 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
    return shapes


def flux() -> Shapes:
    """Return two blocks of each kind of Flux's transformer, in diffusers' names."""
    shapes: Shapes = {}
    square = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for i in range(2):
        double, single = f"transformer_blocks.{i}", f"single_transformer_blocks.{i}"
        shapes |= {f"{double}.attn.{name}": (3072, 3072) for name in square}
        for ff in ("ff", "ff_context"):
            shapes |= {f"{double}.{ff}.net.0.proj": (12288, 3072), f"{double}.{ff}.net.2": (3072, 12288)}
        shapes |= {f"{single}.attn.{name}": (3072, 3072) for name in square[:3]}
        shapes |= {f"{single}.proj_mlp": (12288, 3072), f"{single}.proj_out": (3072, 15360)}
    return shapes


def _factors(shapes: Shapes, rank: int) -> Pairs:
    """Return up and down of each module whose products' singular values fall off as a power law."""
    generator = torch.Generator().manual_seed(0)
    fall = torch.arange(1, rank + 1) ** -0.5
    return {
        module: (
            torch.randn(out, rank, generator=generator) * fall * 0.01,
            torch.randn(rank, inp, generator=generator) / inp**0.5,
        )
        for module, (out, inp) in shapes.items()
    }


def kohya_file(file: Path, shapes: Shapes, rank: int) -> Path:
    """Write a kohya file, fp16, alpha half the rank."""
    tensors = {}
    for module, (up, down) in _factors(shapes, rank).items():
        name = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2).half()
    save_file(tensors, file, {"ss_base_model_version": "sdxl_base_v1-0"})
    return file


def peft_folder(folder: Path, shapes: Shapes, rank: int) -> Path:
    """Write a PEFT adapter, bf16, of scale 1: sd-scripts reads its tensors too, and takes that scale."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (up, down) in _factors(shapes, rank).items():
        start = f"base_model.model.{module}.lora_"
        tensors |= {f"{start}A.weight": down.bfloat16(), f"{start}B.weight": up.bfloat16()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
