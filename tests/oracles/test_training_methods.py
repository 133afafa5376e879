"""What training methods leave on disk, each trained for a few steps, and what the verbs make of it.

The oracle is the live model after its last step: what it answers, or the weights that PEFT merges. The table of
docs/training_methods.md sums these tests up.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from quantised_files import FOLDERS, expected, llama, read_all
from safetensors.torch import load_file, save_file
from test_peft_loads_ours import load_in_peft
from tiny_files import write_base

import loratool
from loratool.errors import LoratoolError

ROOT = Path(__file__).parents[2]
TARGETS = ["q_proj", "v_proj", "down_proj"]
Make = Callable[..., Any]


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(live: Any, steps: int, optimizer: Any = None, after: Callable[[int], object] = lambda step: None) -> None:
    """Some steps on one batch, of language or of images."""
    generator = torch.Generator().manual_seed(4)
    optimizer = optimizer or torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=0.02)
    ids = torch.randint(3, 60, (2, 9), generator=generator)
    live.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        live(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        after(step)
    live.eval()


def weights_after(live: Any) -> dict[str, torch.Tensor]:
    """The weights that PEFT merges, in fp64."""
    with quiet():
        return {n: w.detach().double() for n, w in live.double().merge_and_unload().state_dict().items()}


def close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=tolerance, atol=tolerance, msg=name)


def changed_by(live: Any, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that PEFT merges, of which some are not what they were."""
    wanted = weights_after(live)
    assert any(float((wanted[n] - before[n].double()).abs().max()) > 1e-3 for n in before)
    return wanted


def test_adalora_leaves_ranks_of_its_own_for_each_module(tiny: Make, run_model: Make, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    settings = {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8, "lora_alpha": 9}
    live = peft.get_peft_model(tiny("llama"), peft.AdaLoraConfig(target_modules=TARGETS, **settings))
    train(live, 8, after=live.base_model.update_and_allocate)
    with quiet():  # of modules that have no rank left
        live.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    left = {n.removesuffix(".lora_E"): len(t) for n, t in stored.items() if n.endswith(".lora_E") and len(t)}
    assert len(set(left.values())) > 1

    rows = loratool.inspect(tmp_path / "adapter").rows
    assert {f"base_model.model.{row['module']}": row["rank"] for row in rows} == left
    answer = run_model("llama", live)
    for verb, options in (("convert", {"to": "peft"}), ("resize", {"energy": 1.0})):
        getattr(loratool, verb)(tmp_path / "adapter", tmp_path / verb, **options)
        config = json.loads((tmp_path / verb / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["rank_pattern"]
        again = load_in_peft(tiny("llama"), tmp_path / verb)
        ranks = {
            f"base_model.model.{n}": m.r["default"]
            for n, m in again.get_base_model().named_modules()
            if hasattr(m, "lora_A")
        }
        assert ranks == left
        torch.testing.assert_close(run_model("llama", again), answer, rtol=1e-4, atol=1e-5)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    close(read_all(tmp_path / "merged"), changed_by(live, read_all(tmp_path / "base")))


def test_lora_fa_leaves_a_lora_whose_down_factors_never_moved(tiny: Make, run_model: Make, tmp_path: Path) -> None:
    from peft.optimizers import create_lorafa_optimizer

    tiny("llama").save_pretrained(tmp_path / "base")
    live = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    first = {n: p.detach().clone() for n, p in live.named_parameters() if "lora_A" in n}
    train(live, 4, create_lorafa_optimizer(model=live, r=4, lora_alpha=8, lr=0.05))
    live.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(stored[n.replace(".default", "")], t) for n, t in first.items())

    report = loratool.inspect(tmp_path / "adapter")
    assert {row["rank"] for row in report.rows} == {4}
    answer = run_model("llama", live)
    loratool.resize(tmp_path / "adapter", tmp_path / "resized", energy=1.0)
    again = load_in_peft(tiny("llama"), tmp_path / "resized")
    torch.testing.assert_close(run_model("llama", again), answer, rtol=1e-4, atol=1e-5)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    close(read_all(tmp_path / "merged"), changed_by(live, read_all(tmp_path / "base")))


def test_qlora_leaves_a_lora_that_fits_the_base_as_it_was_quantised(tmp_path: Path) -> None:
    import transformers

    FOLDERS["nf4"](tmp_path / "base")  # what it is made of stays in base-plain
    weights = expected(tmp_path / "base")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    with quiet():
        quantised = peft.prepare_model_for_kbit_training(quantised, use_gradient_checkpointing=False)
        live = peft.get_peft_model(quantised, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
        train(live, 4)
    live.save_pretrained(tmp_path / "adapter")
    assert "quant" not in (tmp_path / "adapter/adapter_config.json").read_text().replace('"qalora_group_size"', "")

    decoded = llama()
    decoded.load_state_dict({n: t.double() for n, t in weights.items()}, assign=True)
    wanted = changed_by(load_in_peft(decoded, tmp_path / "adapter"), weights)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", dtype="float32")
    close(read_all(tmp_path / "merged"), wanted)
    plain, saw = tmp_path / "base-plain", tmp_path / "saw"
    loratool.merge(plain, [tmp_path / "adapter"], saw, base_as_trained="nf4", dtype="float32")
    close(read_all(saw), wanted)


def quantised_with_the_rest_in_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """LoftQ in one iteration, as PEFT does it on a GPU (utils/loftq_utils.py): dequant(quant(W)), A, B."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.bfloat16().reshape(1, -1), quant_type="nf4", blocksize=64)
    decoded = functional.dequantize_4bit(codes, state).reshape(weight.shape).float()
    u, s, v = torch.linalg.svd(weight.float() - decoded, full_matrices=False)
    root = s[:rank].sqrt()
    return decoded, root[:, None] * v[:rank], u[:, :rank] * root


def test_loftq_leaves_a_lora_of_another_base_and_says_so_or_not(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    live = peft.get_peft_model(model.float(), peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    for module in live.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            parts = quantised_with_the_rest_in_factors(module.weight.detach(), 8)
            for value, there in zip(parts, (module, module.lora_A["default"], module.lora_B["default"]), strict=True):
                there.get_parameter("base_layer.weight" if there is module else "weight").data = value.contiguous()
    live.save_pretrained(tmp_path / "initial")
    train(live, 3)
    live.save_pretrained(tmp_path / "reset")  # as in PEFT's example: init_lora_weights is True again
    live.peft_config["default"].init_lora_weights = "loftq"
    live.save_pretrained(tmp_path / "adapter")

    before = {n: t.double() for n, t in read_all(tmp_path / "base").items()}
    wanted = changed_by(live, before)
    with pytest.raises(LoratoolError, match="loftq changed the base model") as refusal:
        loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "refused")
    assert "--init-adapter" in refusal.value.hint
    report = loratool.merge(
        tmp_path / "base", [tmp_path / "adapter"], tmp_path / "less", init_adapter=tmp_path / "initial", dtype="float32"
    )
    assert any("quantised" in f.what for f in report.findings)
    old, new = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("initial", "adapter"))
    got = read_all(tmp_path / "less")
    for name, weight in got.items():
        start = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        learnt = [
            t[f"{start}B.weight"].double() @ t[f"{start}A.weight"].double()
            for t in (new, old)
            if f"{start}B.weight" in t
        ]
        exact = before[name] + (learnt[0] - learnt[1] if learnt else 0)
        torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-6)
    options = {"base_as_trained": "nf4", "dtype": "float32"}
    loratool.merge(tmp_path / "base", [tmp_path / "reset"], tmp_path / "whole", **options)
    whole = read_all(tmp_path / "whole")
    adapted = [n for n in whole if n.removesuffix(".weight").endswith(tuple(TARGETS))]
    close({n: whole[n] for n in adapted}, {n: wanted[n] for n in adapted})  # the others were not quantised here


#: examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py (diffusers)
LCM = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]


def test_lcm_lora_leaves_a_unet_alone_with_its_convolutions(
    tiny: Make, run_model: Make, adapter_folder: Make, tmp_path: Path
) -> None:
    tiny("unet").save_pretrained(tmp_path / "base")
    live, folder = adapter_folder(tiny("unet"), target_modules=LCM, r=8, lora_alpha=4)
    flat = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, part = name.removeprefix("base_model.model.").split(".lora_")
        start = f"lora_unet_{module.replace('.', '_')}"
        flat[f"{start}.lora_{ {'A': 'down', 'B': 'up'}[part[0]] }.weight"] = tensor
        flat[f"{start}.alpha"] = torch.tensor(4.0)
    save_file(flat, tmp_path / "lcm.safetensors")

    answer = run_model("unet", live)
    rows = loratool.inspect(tmp_path / "lcm.safetensors").rows
    assert all(row["module"].startswith("unet:") for row in rows)
    assert {row["group"] for row in rows} == {"attention", "mlp", "projection", "resnet", "resample"}
    assert len(rows) == len(flat) // 3
    loratool.convert(tmp_path / "lcm.safetensors", tmp_path / "peft", to="peft")
    loratool.resize(tmp_path / "lcm.safetensors", tmp_path / "resized.safetensors", energy=1.0)
    loratool.convert(tmp_path / "resized.safetensors", tmp_path / "again", to="peft")
    for adapter in ("peft", "again"):
        found = run_model("unet", load_in_peft(tiny("unet"), tmp_path / adapter))
        torch.testing.assert_close(found, answer, rtol=1e-3, atol=1e-4)
    wanted = changed_by(live, load_file(tmp_path / "base/diffusion_pytorch_model.safetensors"))
    for adapter in ("lcm.safetensors", "peft"):
        out = tmp_path / f"merged-{adapter}"
        loratool.merge(tmp_path / "base", [tmp_path / adapter], out)
        close(load_file(out / "diffusion_pytorch_model.safetensors"), wanted)


# -- IncreLoRA ---------------------------------------------------------------------------------------------------------


def grown(
    module: str, inputs: int, outputs: int, sizes: tuple[int, ...]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A module's lists of factors, the last in reserve, and its update in fp64 (IncreLoRA: loralib/increlora.py).

    The update is cat(B) @ (cat(A) * cat(E)) times lora_alpha / (ranknum + 1e-5).
    """
    generator = torch.Generator().manual_seed(len(module))
    shapes = {"A": lambda r: (r, inputs), "E": lambda r: (r, 1), "B": lambda r: (outputs, r)}
    lists = {k: [0.3 * torch.randn(s(r), generator=generator) for r in sizes] for k, s in shapes.items()}
    lists["E"][-1].zero_()
    ranknum = float(sum(sizes[:-1]))
    a, e, b = (torch.cat([t.double() for t in lists[k]], dim) for k, dim in (("A", 0), ("E", 0), ("B", 1)))
    tensors = {f"{module}.lora_{k}.{n}": t for k, ts in lists.items() for n, t in enumerate(ts)}
    return tensors | {f"{module}.ranknum": torch.tensor([ranknum])}, b @ (a * e) * 16 / (ranknum + 1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["the whole model", "its factors"])
def test_increlora_is_named_and_joined_it_is_a_lora_of_many_ranks(whole: bool, tmp_path: Path) -> None:
    base = read_all(write_base(tmp_path / "base"))
    stored, wanted = dict(base) if whole else {}, {n: t.double() for n, t in base.items()}
    for number, sizes in enumerate([(2, 1, 1, 1), (2, 1)]):
        module = f"model.layers.{number}.self_attn.q_proj"
        out, inputs = base[f"{module}.weight"].shape
        tensors, update = grown(module, inputs, out, sizes)
        stored |= tensors
        wanted[f"{module}.weight"] += update
    save_file(stored, tmp_path / "model.safetensors")

    report = loratool.inspect(tmp_path / "model.safetensors")
    assert any("IncreLoRA" in f.what and "docs/training_methods.md" in f.hint for f in report.findings)
    for verb, given in (
        ("merge", (tmp_path / "base", [tmp_path / "model.safetensors"])),
        ("resize", (tmp_path / "model.safetensors",)),
    ):
        with pytest.raises(LoratoolError, match="IncreLoRA"):
            getattr(loratool, verb)(*given, tmp_path / "refused", **({"rank": 1} if verb == "resize" else {}))
    (recipe,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/training_methods.md").read_text(), re.M | re.S)
    scope: dict[str, Any] = {}
    exec(recipe, scope)
    scope["join"](str(tmp_path / "model.safetensors"), str(tmp_path / "adapter"), 16)
    assert {row["rank"] for row in loratool.inspect(tmp_path / "adapter").rows} == {4, 2}
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    close(read_all(tmp_path / "merged"), wanted)
