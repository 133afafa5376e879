"""Models that no family describes: what is read off their config and their files, against the live model."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from loratool import discovery
from loratool.architecture import Architecture
from loratool.layers import Conv1D, Conv2d, Excluded, Experts, Linear, Matrix
from loratool.patterns import selects
from loratool.tensors import module_of

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
}
BERT = {**TEXT, "num_key_value_heads": None, "head_dim": None, "embedding_size": 24, "max_position_embeddings": 40}
BERT = {k: v for k, v in BERT.items() if v is not None}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 40,
}
MOE = {**TEXT, "moe_intermediate_size": 20}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert": ("AlbertForMaskedLM", "AlbertConfig", BERT),
    "albert-bare": ("AlbertModel", "AlbertConfig", BERT),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", BERT),
    "layoutlm": ("LayoutLMForTokenClassification", "LayoutLMConfig", BERT),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "ctrl": (
        "CTRLLMHeadModel",
        "CTRLConfig",
        {"vocab_size": 64, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 40},
    ),
    "openai-gpt": (
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    ),
    "olmo-hybrid": (
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        {
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **TEXT,
            "num_experts": 3,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 6,
            "use_mamba_kernels": False,
        },
    ),
    "dots1": (
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            **MOE,
            "n_routed_experts": 3,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", TEXT),
    "helium": ("HeliumForCausalLM", "HeliumConfig", TEXT),
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        {
            **TEXT,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
        },
    ),
    "ernie-moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {**MOE, "moe_num_experts": 3, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {**TEXT, "num_experts": 3, "moe_topk": 2}),
    "jetmoe": (
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 20,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
    "aria": (
        "AriaTextForCausalLM",
        "AriaTextConfig",
        {**MOE, "moe_num_experts": 3, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "inkling2": (
        "Inkling2ForCausalLM",
        "Inkling2TextConfig",
        {
            **TEXT,
            "moe_intermediate_size": 20,
            "unpadded_vocab_size": 64,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "rel_extent": 16,
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "nomic-bert": ("NomicBertForMaskedLM", "NomicBertConfig", {**BERT, "head_dim": 8}),
    "dinov2": (
        "Dinov2Model",
        "Dinov2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": 28,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 16,
            },
            "image_token_index": 63,
        },
    ),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART),
    "m2m-100": ("M2M100ForConditionalGeneration", "M2M100Config", BART),
}
#: what torch calls the module of each kind of layer
CLASSES = {
    "linear": "Linear",
    "Conv1D": "Conv1D",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "conv3d": "Conv3d",
    "embedding": "Embedding",
}


class Saved(NamedTuple):
    """A live model, and what save_pretrained wrote."""

    model: Any
    config: dict[str, Any]
    disk: dict[str, torch.Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(t.shape) for n, t in self.disk.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("albert")`: built once, all its parameters random, so that no two rows are alike."""
    import transformers

    kept: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in kept:
            cls, config, settings = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
            randomise(model)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            kept[name] = read(model, folder)
        return kept[name]

    return get


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))


def read(model: Any, folder: Path) -> Saved:
    disk: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        disk |= load_file(file)
    return Saved(model, json.loads((folder / "config.json").read_text()), disk)


def discovered(one: Saved, names: Any = None) -> Architecture:
    architecture, findings = discovery.from_config(one.config, one.shapes if names is None else names)
    assert architecture is not None, findings
    architecture.validate()
    return architecture


def said(findings: Any) -> str:
    return "\n".join(f"{f.level}: {f.what}" for f in findings)


def matrix(path: str, one: Saved, architecture: Architecture) -> torch.Tensor:
    """The (out, in) matrix of a canonical path, out of the tensors on disk."""
    whole, _, inside = path.partition("[")
    known = architecture.find(whole)
    tensor = one.disk.get(f"{whole}.weight", one.disk.get(whole))
    assert tensor is not None, f"{whole} is not on disk"
    keys = inside[:-1].split("][") if inside else []
    if isinstance(known.layer, Experts):
        tensor, whole = tensor[int(keys[0])], f"{whole}[{keys.pop(0)}]"
    if known.layer.transposed:
        tensor = tensor.mT
    if keys:
        rows = architecture.layout(whole, "", tensor.shape[0], one.config)[path]
        tensor = torch.cat([tensor[r.start : r.stop : r.step] for r in rows])
    return tensor


def in_memory(name: str, parameter: torch.Tensor, one: Saved) -> torch.Tensor:
    """A live parameter as (out, in) matrices, by what its class does with it."""
    module = one.model.get_submodule(name.rpartition(".")[0])
    turned = type(module).__name__ == "Conv1D" or isinstance(module, torch.nn.Embedding)
    return parameter.mT if turned or getattr(module, "is_transposed", False) else parameter


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_on_disk_is_found(name: str, saved):
    one = saved(name)
    architecture = discovered(one)
    large = {n: s for n, s in one.shapes.items() if len(s) > 1}
    for tensor in large:
        known = architecture.find(module_of(tensor))
        assert known is not None, tensor
        assert [p.partition("[")[0] for p in known.parts] == [module_of(tensor)], "names on disk are canonical"
        assert not isinstance(known.layer, Matrix), tensor
    assert architecture.name == one.config["model_type"]


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_in_memory_is_the_tensors_on_disk_that_it_is_said_to_be(name: str, saved):
    one = saved(name)
    architecture = discovered(one)
    tied = {p for group in architecture.tied for p in group}
    compared = 0
    for full, parameter in one.model.named_parameters():
        known = architecture.find(module_of(full)) if parameter.dim() > 1 else None
        if known is None or isinstance(known.layer, Excluded) or (full not in one.disk and module_of(full) in tied):
            assert parameter.dim() < 2 or known is not None, full
            continue
        indices = range(parameter.shape[0]) if known.axis else [None]
        live = in_memory(full, parameter.detach(), one)
        for index in indices:
            at = known if index is None else known.at(index)
            expected = live if index is None else live[index]
            found = torch.cat([matrix(part, one, architecture) for part in at.parts])
            assert torch.equal(found, expected), (full, at.parts)
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize("name", MODELS)
def test_kinds_are_those_of_the_live_modules(name: str, saved):
    one = saved(name)
    architecture = discovered(one)
    tensors = {n: p for n, p in one.model.named_parameters() if p.dim() > 1}
    for full, parameter in tensors.items():
        module = one.model.get_submodule(full.rpartition(".")[0])
        known = architecture.find(module_of(full))
        assert known is not None, full
        wanted = next((kind for kind, cls in CLASSES.items() if cls in [c.__name__ for c in type(module).__mro__]), "")
        if wanted and full.endswith(".weight"):
            assert known.layer.kind == wanted, full
        elif known.axis:
            assert parameter.dim() == 3, full
        else:  # routers are linear maps of a class of their own
            assert known.layer.kind == "excluded" or known.role == "router", (full, known)


@pytest.mark.parametrize("name", MODELS)
def test_names_in_memory_are_written_back(name: str, saved):
    one = saved(name)
    architecture = discovered(one)
    for full, parameter in one.model.named_parameters():
        known = architecture.find(module_of(full)) if parameter.dim() > 1 else None
        if known and len(known.parts) == 1 and not known.axis and "[" not in known.path:
            assert architecture.in_memory("", known.parts[0], type(one.model).__name__) == module_of(full)


@pytest.mark.parametrize("name", MODELS)
def test_default_targets_select_linear_layers_of_the_main_model(name: str, saved):
    one = saved(name)
    architecture = discovered(one)
    assert architecture.default_targets
    for target in architecture.default_targets:
        chosen = [
            known for n in one.disk if selects(target, module_of(n)) and (known := architecture.find(module_of(n)))
        ]
        assert any(k.layer.kind in ("linear", "Conv1D") for k in chosen), target
        assert any(k.layer.tower in ("", "encoder") for k in chosen), target


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("albert", ("query", "value")),
        ("llava", ("q_proj", "v_proj")),
        ("nomic-bert", ("Wqkv",)),
        ("ctrl", ("Wq", "Wv")),
    ],
)
def test_default_targets_are_q_and_v_or_the_fused_qkv(name: str, targets, saved):
    assert discovered(saved(name)).default_targets == targets


@pytest.mark.parametrize("name", ["jamba", "dots1", "ernie-moe", "hunyuan-moe"])
def test_experts_are_one_linear_layer_each_on_disk_and_a_stack_in_memory(name: str, saved):
    one = saved(name)
    architecture = discovered(one)
    stacks = [n for n, p in one.model.named_parameters() if p.dim() == 3 and n.endswith("experts.gate_up_proj")]
    assert stacks
    for stack in stacks:
        parts = architecture.find(stack).at(2).parts
        assert parts == tuple(f"{stack.removesuffix('gate_up_proj')}2.{leaf}" for leaf in ("gate_proj", "up_proj"))
        assert {architecture.find(p).layer.group for p in parts} == {"experts"}
        assert [architecture.find(p).role for p in parts] == ["gate", "up"]


def test_routers_and_heads_are_not_layers_of_the_body(saved):
    for name, path in [("hunyuan-moe", "model.layers.0.mlp.gate.wg"), ("dots1", "model.layers.1.mlp.gate")]:
        assert discovered(saved(name)).find(path).layer.group == "router", name
    for name, path in [("albert", "predictions.decoder"), ("xlnet", "lm_loss"), ("layoutlm", "classifier")]:
        assert discovered(saved(name)).find(path).layer.group == "head", name


def test_a_weight_that_transformers_divides_when_loading_has_parts(saved):
    architecture = discovered(saved("dinov2"))
    path = "encoder.layer.0.mlp.weights_in"
    assert architecture.find("encoder.layer.0.mlp.up_proj").parts == (f"{path}[up]",)
    assert list(architecture.layout(path, "", 10, {})) == [f"{path}[gate]", f"{path}[up]"]


def test_fused_weights_of_unknown_layout_are_left_whole_and_named(saved):
    one = saved("openai-gpt")
    architecture, findings = discovery.from_config(one.config, one.shapes)
    assert "fused weights (c_attn) are not divided: their layout is unknown" in said(findings)
    assert architecture.layout("transformer.h.0.attn.c_attn", "", 96, one.config) == {}


def test_weights_that_share_a_tensor_are_tied(saved):
    assert discovered(saved("albert")).tied == (("albert.embeddings.word_embeddings", "predictions.decoder"),)
    assert set(discovered(saved("pegasus")).tied[0]) == {
        "model.shared", "lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"
    }  # fmt: skip
    untied = {**saved("ctrl").config, "tie_word_embeddings": False}
    architecture, _ = discovery.from_config(untied, saved("ctrl").shapes)
    assert architecture.tied == ()


def test_a_file_that_omits_the_prefix_is_read_by_its_own_names(saved):
    one = saved("ctrl")
    bare = {n.removeprefix("transformer."): s for n, s in one.shapes.items()}
    architecture = discovered(one, bare)
    assert architecture.find("h.0.multi_head_attention.Wq").path == "h.0.multi_head_attention.Wq"
    assert architecture.find("transformer.h.0.multi_head_attention.Wq").path == "h.0.multi_head_attention.Wq"
    assert (
        architecture.in_memory("", "h.0.multi_head_attention.Wq", "CTRLLMHeadModel")
        == "transformer.h.0.multi_head_attention.Wq"
    )


def test_a_file_of_a_bare_model_understands_the_names_of_a_model_with_a_head(saved):
    architecture = discovered(saved("albert-bare"))
    path = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    assert architecture.find(f"albert.{path}").path == path == architecture.find(path).path


def test_older_files_with_a_tower_of_another_prefix_are_read_by_their_names(saved):
    """LLaVA's files on the Hub have `vision_tower.vision_model.`, which transformers 5 does not have in memory."""
    one = saved("llava")
    old = {n.replace("vision_tower.", "vision_tower.vision_model."): s for n, s in one.shapes.items()}
    architecture, findings = discovery.from_config(one.config, old)
    path = "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
    assert architecture.find("model.vision_tower.encoder.layers.1.mlp.fc1").path == path
    assert architecture.find(path).layer.tower == "vision"
    assert "warning" not in said(findings)


def test_a_model_without_its_head_names_modules_without_the_prefix(saved):
    architecture = discovered(saved("helium"))
    assert architecture.find("layers.1.mlp.up_proj").path == "model.layers.1.mlp.up_proj"
    assert architecture.in_memory("", "model.layers.1.mlp.up_proj", "HeliumModel") == "layers.1.mlp.up_proj"


def test_a_file_in_the_form_of_the_memory_has_stacks(saved, tmp_path):
    one = saved("dots1")
    one.model.save_pretrained(tmp_path, save_original_format=False)
    stacked = read(one.model, tmp_path)
    architecture = discovered(stacked)
    known = architecture.find("model.layers.1.mlp.experts.gate_up_proj")
    assert (known.layer.kind, known.layer.transposed, known.axis) == ("experts", False, "e")
    rows = architecture.layout("model.layers.1.mlp.experts.gate_up_proj[2]", "", 40, stacked.config)
    assert [list(r) for r in rows.values()] == [[range(20)], [range(20, 40)]]


@pytest.mark.parametrize(("flipped", "shape"), [(True, (3, 32, 40)), (False, (3, 40, 32))])
def test_stacks_that_are_saved_in_either_order_are_told_apart_by_shape(flipped: bool, shape):
    import transformers

    text = {**MOE, "num_experts": 3, "decoder_sparse_step": 1}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision).to_dict()
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    architecture, findings = discovery.from_config(config, {name: shape})
    assert architecture is not None, findings
    layer = architecture.find(name).layer
    assert (layer.in_out, layer.flipped_in_memory) == (flipped, flipped)
    assert "of another shape" not in said(findings)


def test_rows_that_transformers_permutes_take_no_adapter_under_the_name_in_memory():
    """mistral_large4 reorders q and k for rotary embeddings when it loads (transformers: PermuteForRope)."""
    from loratool.discovery.conversions import Conversion, Live, Parameter, Step

    step = Step("PermuteForRope", (), True)
    parameter = Parameter((32, 32), Linear, "Linear")
    for name in ("attention.wq.weight", "attention.q_proj.weight"):
        live = Live("m", "M", "transformers", {"attention.q_proj.weight": parameter}, frozenset(),
                    [Conversion(((name,),), ("attention.q_proj.weight",), (step,))])  # fmt: skip
        architecture, findings = discovery.Assembly(live, {name: (32, 32)}).result()
        known = architecture.find("attention.q_proj")
        assert known is None or isinstance(known.layer, Excluded)
        assert "attention.q_proj" in said(findings)


def test_a_name_that_is_one_weight_on_disk_and_another_in_memory_takes_no_adapter():
    from loratool.discovery.conversions import Conversion, Live, Parameter

    parameter = Parameter((48, 32), Linear, "Linear")
    pairs = {"mlp.fc0.weight": "mlp.fc1.weight", "mlp.fc1.weight": "mlp.fc2.weight"}  # as in kimi_k25's vision tower
    live = Live("m", "M", "transformers", dict.fromkeys(pairs.values(), parameter), frozenset(),
                [Conversion(((disk,),), (memory,)) for disk, memory in pairs.items()])  # fmt: skip
    architecture, findings = discovery.Assembly(live, dict.fromkeys(pairs, (48, 32))).result()
    assert isinstance(architecture.find("mlp.fc1").layer, Excluded)
    assert architecture.find("mlp.fc2").parts == ("mlp.fc1",)
    assert architecture.find("mlp.fc0").parts == ("mlp.fc0",)
    assert "warning: one weight on disk and another in memory, so they take no adapter: mlp.fc1" in said(findings)


def test_without_a_base_the_names_are_those_in_memory(saved):
    one = saved("dots1")
    architecture, findings = discovery.from_config(one.config)
    assert architecture.find("model.layers.1.mlp.experts.down_proj").layer.kind == "experts"
    assert "there is no base at hand" in said(findings)


def test_names_alone_are_enough_for_experts(saved):
    one = saved("dots1")
    architecture = discovered(one, list(one.disk))
    assert architecture.find("model.layers.1.mlp.experts.2.up_proj").layer.kind == "linear"


def test_weights_that_the_model_does_not_have_are_read_from_shapes_and_named(saved):
    one = saved("helium")
    extra = {"model.mtp.0.eh_proj.weight": (32, 64), "model.layers.0.mlp.up_proj.qweight": (8, 32)}
    architecture, findings = discovery.from_config(one.config, {**one.shapes, **extra})
    assert architecture.find("model.mtp.0.eh_proj").layer.kind == "matrix"
    assert architecture.find("model.layers.0.mlp.up_proj.qweight").layer.kind == "excluded"
    assert "warning: not in HeliumForCausalLM" in said(findings)


def test_a_config_that_does_not_fit_the_file_is_said(saved):
    one = saved("helium")
    _, findings = discovery.from_config({**one.config, "intermediate_size": 56}, one.shapes)
    assert "warning: of another shape than the config says: model.layers.0.mlp.down_proj.weight" in said(findings)


def test_a_config_without_a_class_gets_a_usual_one(saved):
    one = saved("llava")
    architecture, findings = discovery.from_config({**one.config, "architectures": None}, one.shapes)
    assert architecture.find("language_model.model.layers.0.mlp.up_proj") is not None
    assert "LlavaForConditionalGeneration is assumed" in said(findings)


def test_a_diffusers_transformer(tmp_path):
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, caption_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    one = read(model, tmp_path)
    architecture = discovered(one)
    assert architecture.name == "AuraFlowTransformer2DModel"
    for full, parameter in model.named_parameters():
        if parameter.dim() > 1:
            known = architecture.find(module_of(full))
            cls = type(model.get_submodule(full.rpartition(".")[0])).__name__
            assert known.layer.kind == {v: k for k, v in CLASSES.items()}.get(cls, "excluded"), full
    path = "single_transformer_blocks.0.attn.to_q"
    assert architecture.find(f"transformer.{path}").path == path
    assert [k.path for k in architecture.unflatten(f"lora_unet_{path.replace('.', '_')}")] == [path]
    assert architecture.default_targets == ("to_q", "to_v")


# -- Strangers' configs -----------------------------------------------------------------------------------------------


def refused(config: dict[str, Any]) -> str:
    started = time.monotonic()
    architecture, findings = discovery.from_config(config, {"a.weight": (4, 4)})
    assert architecture is None
    assert time.monotonic() - started < discovery.SECONDS + 10
    return said(findings)


def test_remote_code_is_never_run(tmp_path, monkeypatch, saved):
    code = "from pathlib import Path\nPath({!r}).touch()\nclass A: pass\n"
    marker = tmp_path / "executed"
    (tmp_path / "modeling_evil.py").write_text(code.format(str(marker)))
    remote = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), f"{tmp_path}--modeling_evil.A")
    local = dict.fromkeys(remote, "modeling_evil.A")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    one = saved("llava")
    text = {**one.config["text_config"], "auto_map": local, "_name_or_path": str(tmp_path)}
    for auto_map in (remote, local):
        unknown = {"model_type": "evil", "architectures": ["A"], "auto_map": auto_map, "_name_or_path": str(tmp_path)}
        assert "the model's own code is never run" in refused(unknown)
        known = {
            **one.config,
            "auto_map": auto_map,
            "_name_or_path": str(tmp_path),
            "architectures": ["modeling_evil.A"],
        }
        assert discovery.from_config({**known, "text_config": text}, one.shapes)[0] is not None
    assert not marker.exists()
    assert "modeling_evil" not in sys.modules


@pytest.mark.parametrize(
    "setting",
    [
        {"attn_implementation": "kernels-community/flash-attn3"},
        {"_attn_implementation": "kernels-community/flash-attn3"},
        {"_attn_implementation_internal": "kernels-community/flash-attn3"},
        {"quantization_config": {"quant_method": "nonsense"}},
        {"torch_dtype": "os.system"},
        {"dtype": "float8_e4m3fn"},
    ],
    ids=str,
)
def test_what_a_library_would_act_on_is_taken_out(setting, saved):
    one = saved("helium")
    assert discovery.from_config({**one.config, **setting}, one.shapes)[0] is not None


def test_pointers_to_remote_code_do_not_even_reach_the_library(saved, monkeypatch):
    import transformers

    seen = []
    original = transformers.LlavaConfig.from_dict.__func__
    monkeypatch.setattr(
        transformers.LlavaConfig, "from_dict", classmethod(lambda cls, d: (seen.append(d), original(cls, d))[1])
    )
    one = saved("llava")
    remote = {"auto_map": {"AutoModel": "a.B"}, "_name_or_path": "a"}
    config = {**one.config, **remote, "text_config": {**one.config["text_config"], **remote}}
    assert discovery.from_config(config, one.shapes)[0] is not None
    assert [set(remote) & set(d) for d in (seen[0], seen[0]["text_config"])] == [set(), set()]


def test_the_network_is_out_of_reach_while_a_model_is_built(saved, monkeypatch):
    from huggingface_hub import constants

    from loratool.discovery import library

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []
    described = library._described
    monkeypatch.setattr(library, "_described", lambda *a: (seen.append(constants.is_offline_mode()), described(*a))[1])
    assert discovery.from_config(saved("helium").config, saved("helium").shapes)[0] is not None
    assert seen == [True]
    assert constants.is_offline_mode() is False


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "neither a model_type nor a _class_name"),
        ({"model_type": 7}, "neither a model_type nor a _class_name"),
        ({"model_type": "no-such-model"}, "does not know this model_type"),
        ({"_class_name": "NoSuchModel2D"}, "has no model NoSuchModel2D"),
        ({"_class_name": "__class__"}, "has no model __class__"),
        ({"_class_name": "DDPMScheduler"}, "has no model DDPMScheduler"),
        ({"model_type": "helium", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"model_type": "helium", "num_labels": 10**12}, "num_labels is 1000000000000"),
        ({"model_type": "llava", "text_config": {"num_hidden_layers": 1e9}}, "num_hidden_layers is"),
        ({"model_type": "helium", "layer_types": ["x"] * 2_000_000}, "layer_types has 2000000 entries"),
        ({"model_type": "helium", "hidden_size": "many"}, "hidden_size"),
        ({"model_type": "helium", "hidden_size": -3}, ""),
        ({"model_type": "helium", "hidden_size": 10**30}, ""),
        ({"model_type": "helium", "num_attention_heads": 0}, ""),
        ({"model_type": "llava", "text_config": "llama"}, ""),
        ({"model_type": "rag"}, ""),
    ],
    ids=lambda v: str(v)[:60],
)  # fmt: skip
def test_configs_that_cannot_be_built_are_refused_with_a_reason(config, why):
    told = refused(config)
    assert why in told
    assert told.startswith("info: its layers cannot be read off its config: ")


def test_a_bottomless_config_is_refused():
    config: dict[str, Any] = {"model_type": "helium"}
    for _ in range(100_000):
        config = {"model_type": "helium", "text_config": config}
    assert "RecursionError" in refused(config)


def test_building_has_a_deadline_that_no_library_swallows(saved, monkeypatch):
    import transformers

    from loratool.discovery import library

    def forever(*_: Any) -> None:
        while True:
            with suppress(Exception):
                len("x")

    monkeypatch.setattr(library, "SECONDS", 0.3)
    monkeypatch.setattr(transformers.HeliumForCausalLM, "__init__", forever)
    before = sys.getprofile()
    assert "takes more than" in refused(saved("helium").config)
    assert sys.getprofile() is before


def test_missing_libraries_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "transformers is not installed" in refused({"model_type": "helium"})
    assert "diffusers is not installed" in refused({"_class_name": "AuraFlowTransformer2DModel"})


def test_names_that_are_no_paths_are_left_out_and_said(saved):
    one = saved("helium")
    strange = {"a..b.weight": (4, 4), "x.(q|k).{i}.weight": (4, 4), "y.*.weight": (4, 4), "\x1b[31m.weight": (4, 4)}
    architecture, findings = discovery.from_config(one.config, {**one.shapes, **strange})
    architecture.validate()
    assert architecture.find("x.q.0") is None
    assert "warning: names that are no module paths are left out" in said(findings)
    assert "\x1b" not in said(findings)
    assert discovery.from_headers(strange)[0].layers == ()


# -- Headers alone ----------------------------------------------------------------------------------------------------


def test_headers_alone_give_kinds_by_names_and_shapes():
    shapes = {
        "wte.weight": (9000, 32),
        "h.0.attn.qkv.weight": (96, 32),
        "h.0.attn.out_proj.weight": (32, 32),
        "h.0.ln.weight": (32,),
        "h.0.mlp.experts.up": (4, 48, 32),
        "h.0.mlp.experts.up_bias": (4, 48),
        "h.0.conv.weight": (32, 1, 4),
        "patch.weight": (32, 3, 14, 14),
        "video.weight": (32, 3, 2, 14, 14),
        "type_names.weight": (9000, 16),
        "lm_head.weight": (9000, 32),
        "q_norm.weight": (4, 8),
        "pos_table": (1, 50, 32),
    }
    architecture, findings = discovery.from_headers(shapes)
    architecture.validate()
    kinds = {n: k.layer.kind for n in shapes if (k := architecture.find(module_of(n)))}
    assert kinds == {
        "wte.weight": "embedding",
        "h.0.attn.qkv.weight": "matrix",
        "h.0.attn.out_proj.weight": "matrix",
        "h.0.mlp.experts.up": "experts",
        "h.0.mlp.experts.up_bias": "excluded",
        "h.0.conv.weight": "conv1d",
        "patch.weight": "conv2d",
        "video.weight": "conv3d",
        "type_names.weight": "embedding",
        "lm_head.weight": "matrix",
        "q_norm.weight": "excluded",
        "pos_table": "excluded",
    }
    assert architecture.name == "unknown"
    assert architecture.default_targets == ("qkv",)
    told = said(findings)
    assert "(out, in) or (in, out)" in told
    assert "stacks of experts are taken to be (experts, out, in)" in told
    assert "fused weights (qkv) are not divided" in told


@pytest.mark.parametrize("name", ["albert", "helium", "llava", "dots1", "pegasus"])
def test_headers_alone_find_the_matrices_and_embeddings_of_real_models(name: str, saved):
    one = saved(name)
    exact, guessed = discovered(one), discovery.from_headers(one.shapes)[0]
    for tensor, shape in one.shapes.items():
        if len(shape) > 1:
            right, guess = exact.find(module_of(tensor)).layer, guessed.find(module_of(tensor)).layer
            expected = Matrix if isinstance(right, (Linear, Conv1D)) else type(right)
            assert type(guess) is expected, tensor
            assert right.group in (guess.group, "head", "buffer"), tensor


def test_a_number_stays_literal_where_the_kinds_differ():
    shapes = {f"blocks.{i}.{j}.weight": (8, 8, 3, 3)[: 4 if j else 2] for i in range(3) for j in range(2)}
    architecture, _ = discovery.from_headers(shapes)
    assert {y.pattern: type(y) for y in architecture.layers} == {"blocks.{i}.0": Matrix, "blocks.{i}.1": Conv2d}
