"""A ledger closes on every merge: what is too much, missing, renamed or unused in an adapter is named, nothing written.

The adapters are PEFT's, of every kind that it saves; each is damaged in every way, one tensor at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from conftest import build
from safetensors.torch import load_file, save_file
from tiny_files import refusal, run_main, snapshot

import loratool

QV = ["q_proj", "v_proj"]
Q0 = "model.layers.0.self_attn.q_proj"


class Kind(NamedTuple):
    model: str
    config: Callable[[], Any]
    sizes: Any = None


def mixtral() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 32, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()


def lora(*targets: str, **settings: Any) -> Any:
    return peft.LoraConfig(target_modules=list(targets) or QV, r=2, **settings)


KINDS = {
    "lora": Kind("llama", lora),
    "embedding": Kind("llama", lambda: lora("embed_tokens", "q_proj")),
    "conv1d": Kind("gpt2", lambda: lora("c_attn")),
    "dora": Kind("llama", lambda: lora(use_dora=True)),
    "lora_bias": Kind("bert", lambda: lora("query", lora_bias=True)),
    "bias all": Kind("bert", lambda: lora("query", bias="all")),
    "bias lora_only": Kind("bert", lambda: lora("query", bias="lora_only")),
    "modules_to_save": Kind("llama", lambda: lora("q_proj", modules_to_save=["lm_head", "norm"])),
    "head": Kind("bert", lambda: lora("query", task_type="SEQ_CLS")),
    "tokens": Kind("llama", lambda: lora("q_proj", trainable_token_indices=[3, 5])),
    "tokens alone": Kind("llama", lambda: peft.TrainableTokensConfig(token_indices=[3, 5])),
    "tied": Kind(
        "llama", lambda: lora("embed_tokens", "lm_head", ensure_weight_tying=True), {"tie_word_embeddings": True}
    ),
    "experts": Kind(
        "mixtral",
        lambda: lora("q_proj", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "layers repeated": Kind("llama", lambda: lora(layer_replication=[[0, 2], [1, 2]])),
    "adalora": Kind("llama", lambda: peft.AdaLoraConfig(target_modules=QV, init_r=3, target_r=2, total_step=9)),
    "loha": Kind("llama", lambda: peft.LoHaConfig(target_modules=QV, r=2)),
    "lokr": Kind("llama", lambda: peft.LoKrConfig(target_modules=QV, r=2)),
    "vera": Kind("llama", lambda: peft.VeraConfig(target_modules=["q_proj"], r=4)),
    "oft": Kind("llama", lambda: peft.OFTConfig(target_modules=QV, oft_block_size=4)),
    "boft": Kind("llama", lambda: peft.BOFTConfig(target_modules=QV, boft_block_size=4)),
    "ia3": Kind("llama", lambda: peft.IA3Config(target_modules=QV, feedforward_modules=[])),
}


class Made(NamedTuple):
    base: Path
    adapter: Path
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A base and an adapter of a kind, made once."""
    place = tmp_path_factory.mktemp("made")
    found: dict[str, Made] = {}

    def make(kind: str) -> Made:
        if kind not in found:
            name, _, sizes = KINDS[kind]
            model = mixtral() if name == "mixtral" else build(name, **(sizes or {}))
            base, folder = place / f"{kind} base", place / kind
            model.save_pretrained(base)
            generator = torch.Generator().manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                live = peft.get_peft_model(model, KINDS[kind].config())
                with torch.no_grad():
                    for value in (p for p in live.parameters() if p.requires_grad):
                        value.add_(torch.randn(value.shape, generator=generator) * 0.1)
                live.save_pretrained(folder)
            found[kind] = Made(base, folder, load_file(folder / "adapter_model.safetensors"))
        return found[kind]

    return make


def damaged(made: Made, tensors: dict[str, torch.Tensor], place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, place / "adapter_model.safetensors")
    shutil.copy(made.adapter / "adapter_config.json", place)
    return place


def core(name: str) -> str:
    """What a person would look for of a tensor's name: its module's path."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", "")
    module = re.split(r"\.(?:lora_|hada_|lokr_|vera_|oft_|boft_|ia3_|trainable_)", name)[0]
    return module.removesuffix(".weight").removesuffix(".bias")


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_an_undamaged_adapter_is_accounted_for_in_full(kind: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(kind)
    report = loratool.merge(one.base, [one.adapter], tmp_path / "out")
    fates = report.ledger[str(one.adapter)]
    assert sum(fates.values()) == len(one.tensors)
    assert fates.keys() <= {"computed", "copied", "read"}
    assert sum(report.ledger[str(one.base)].values()) == len(load_file(one.base / "model.safetensors"))


@every_kind
def test_a_key_too_many_is_named(kind: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(kind)
    module = next(core(n) for n in one.tensors if ".layer" in n or ".h." in n or "embed" in n)
    for extra in ("optimizer.step", f"base_model.model.{module}.lora_C.weight", f"base_model.model.{module}.scale"):
        folder = damaged(one, {**one.tensors, extra: torch.ones(2, 2)}, tmp_path / "adapter")
        named = extra.removeprefix("base_model.model.").removesuffix(".weight")
        assert named in refusal(one.base, [folder], tmp_path / "out")


def is_missed(kind: str, name: str) -> bool:
    """Whether a tensor must be there: not a copy of the base's own embedding. A bias that lies in no layer may not
    have been part of the model that was trained (a pooler, another head).
    """
    return not name.endswith(".base_layer.weight") and (kind != "bias all" or ".layer." in name)


@every_kind
def test_a_missing_tensor_is_named(kind: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(kind)
    for gone in (n for n in one.tensors if is_missed(kind, n)):
        folder = damaged(one, {n: t for n, t in one.tensors.items() if n != gone}, tmp_path / "adapter")
        said = refusal(one.base, [folder], tmp_path / "out")
        assert core(gone).rpartition(".")[2] in said or "trainable_tokens_delta" in said, (gone, said)


@every_kind
def test_a_key_with_another_prefix_is_named(kind: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(kind)
    for renamed in one.tensors:
        name = renamed.replace("base_model.model.", "base_model.model.other.")
        name = name if name != renamed else f"other.{renamed}"
        tensors = {name if n == renamed else n: t for n, t in one.tensors.items()}
        refused = refusal(one.base, [damaged(one, tensors, tmp_path / "adapter")], tmp_path / "out")
        assert core(renamed).rpartition(".")[2] in refused, (renamed, refused)


@every_kind
def test_all_keys_with_another_prefix_are_named(kind: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(kind)
    tensors = {n.replace("base_model.model.", "base_model.model.other."): t for n, t in one.tensors.items()}
    said = refusal(one.base, [damaged(one, tensors, tmp_path / "adapter")], tmp_path / "out")
    assert any(core(n) in said for n in tensors), said


@every_kind
def test_a_module_that_the_base_has_not_is_named(kind: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(kind)
    of_layers = {n: t for n, t in one.tensors.items() if re.search(r"\.(layers?|h)\.0\.", n) and "LayerNorm" not in n}
    more = {re.sub(r"\.(layers?|h)\.0\.", r".\1.9.", n): t.clone() for n, t in of_layers.items()}
    if not more:  # of embeddings alone
        more = {n.replace("embed_tokens", "embed_words"): t.clone() for n, t in one.tensors.items() if "embed" in n}
    said = refusal(one.base, [damaged(one, {**one.tensors, **more}, tmp_path / "adapter")], tmp_path / "out")
    assert any(core(n) in said for n in more), said


def test_the_command_line_says_so_with_exit_code_3(
    made: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made("dora")
    gone = next(n for n in one.tensors if "magnitude" in n)
    folder = damaged(one, {n: t for n, t in one.tensors.items() if n != gone}, tmp_path / "adapter")
    before = snapshot(tmp_path)
    assert run_main("merge", one.base, folder, "-o", tmp_path / "out") == 3
    assert core(gone) in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_of_two_adapters_the_damaged_one_is_named(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("lora")
    tensors = {n: t for n, t in one.tensors.items() if "layers.1" not in n}
    said = refusal(one.base, [one.adapter, damaged(one, tensors, tmp_path / "half")], tmp_path / "out")
    assert str(tmp_path / "half") in said
    assert "model.layers.1.self_attn.q_proj" in said


def test_what_was_left_out_on_purpose_is_not_missing(made: Callable[[str], Made], tmp_path: Path) -> None:
    biased = made("bias all")
    loratool.merge(biased.base, [biased.adapter], tmp_path / "first", exclude=["bert.encoder.layer.1.**"])
    one = made("modules_to_save")
    report = loratool.merge(one.base, [one.adapter], tmp_path / "out", exclude=["lm_head", "model.layers.1.**"])
    assert report.ledger[str(one.adapter)]["skipped"] == 5
    tensors = {n: t for n, t in one.tensors.items() if "layers.1.self_attn.q_proj" not in n}
    folder = damaged(one, tensors, tmp_path / "half")
    assert "layers.1.self_attn.q_proj" in refusal(one.base, [folder], tmp_path / "none")
    config = json.loads((folder / "adapter_config.json").read_text())
    for changes in ({"layers_to_transform": [0]}, {"target_modules": [Q0]}):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        loratool.merge(one.base, [folder], tmp_path / f"out {next(iter(changes))}")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
