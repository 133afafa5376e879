"""Families against live models, beyond names: detection without a config, PEFT's defaults, rows of fused weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch.nn.functional import gelu
from zoo import Tiny, build, every, record, tiny
from zoo_encoders import DIFFUSION, SIZES

from loratool.detection import family_of, fits, matrices
from loratool.plugins import load
from loratool.storage import checkpoint

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures"
ALONE = ("bert", "distilbert", "gpt2", "llama", "stable-diffusion")  # no two of these share a name
PEFTS = ("bart", "bert", "deberta", "deberta-v2", "gpt2", "llama", "mistral", "mt5", "roberta", "rwkv", "t5")


@pytest.fixture(scope="module")
def plugins():
    return load()


def nameless(one: Tiny):
    """The saved weights of a model without its config.json."""
    return replace(checkpoint.open_base(str(record(one).folder)), config=None)


@pytest.mark.parametrize("one", [z for z in every() if z.family in ALONE], ids=str)
def test_of_families_that_share_no_names_the_right_one_is_found_without_a_config(one):
    base = nameless(one)
    few = load(",".join(name.replace("-", "_") for name in ALONE))
    assert family_of(base, few).architecture.name == one.family
    assert {a.name for a in few.architectures() if fits(a, matrices(base.tensors))} == {one.family}


@pytest.mark.parametrize("one", [z for z in DIFFUSION if z.component == "unet"], ids=str)
def test_stable_diffusions_are_told_apart_by_names_and_the_width_of_the_text(one, plugins):
    assert family_of(nameless(one), plugins).architecture.name == one.family


@pytest.mark.parametrize("model_type", PEFTS)
def test_default_targets_are_those_of_peft(model_type, plugins):
    (family,) = [a for a in plugins.architectures() if model_type in a.match.model_types]
    assert sorted(family.default_targets) == sorted(PEFT_TARGETS[model_type])


def test_families_validate_and_every_layer_has_a_role(plugins):
    for architecture in plugins.architectures():
        architecture.validate()
        for skeleton, layer in architecture.skeletons():
            assert layer.role(skeleton)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_classifiers_of_t5_hold_the_layers_of_the_model_under_another_name(head, plugins):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    classifier = record(tiny("t5", f"T5For{head}", "T5Config", **sizes))
    plain = record(tiny("t5", "T5Model", "T5Config", **sizes))
    names = [n.removesuffix(".weight") for n, shape in classifier.disk.items() if len(shape) > 1]
    held = [n for n in names if n.startswith("transformer.")]
    assert len(names) - len(held) in (1, 2)  # the head
    paths = {plugins.architecture("t5").find(n).path for n in held}
    assert len(paths) == len(held)
    assert {p + ".weight" for p in paths} <= set(plain.disk)


def test_two_text_encoders_have_a_kohya_prefix_each(plugins):
    family = plugins.architecture("stable-diffusion-xl")
    body = "text_model_encoder_layers_3_mlp_fc1"
    path = "text_model.encoder.layers.3.mlp.fc1"
    for prefix, component in (("lora_te1", "text_encoder"), ("lora_te2", "text_encoder_2")):
        assert [(k.component, k.path) for k in family.unflatten(f"{prefix}_{body}")] == [(component, path)]
    assert family.in_memory("text_encoder", path) == path.removeprefix("text_model.")  # CLIPTextModel
    assert family.in_memory("text_encoder_2", path) == path  # CLIPTextModelWithProjection
    alone = plugins.architecture("stable-diffusion")  # diffusers' own converter calls its only encoder te1
    assert [[k.path for k in alone.unflatten(f"lora_te{n}_{body}")] for n in ("", 1, 2)] == [[path], [path], []]


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the shared fixtures")
def test_the_whole_stable_diffusion_1_checkpoint_is_explained(plugins):
    keymap = json.loads((FIXTURES / "aitoolkit/sd1.json").read_text())  # name in the original file: in diffusers
    architecture = plugins.architecture("stable-diffusion")
    counts = {"unet": 0, "te": 0}
    for name in keymap.values():
        component, _, path = name.partition("_")
        if component not in counts or not path.endswith(".weight") or "norm" in path:
            continue
        known = architecture.find(path.removesuffix(".weight"))
        assert known is not None, path
        assert known.component == {"unet": "unet", "te": "text_encoder"}[component]
        counts[component] += 1
    attention = 16 * (8 + 2 + 2)  # blocks of two attentions, a feed-forward of two layers, proj_in and proj_out
    resnets = 22 * 3 + 14  # conv1, conv2, time_emb_proj; a shortcut where the channels change: 2 going down, 12 up
    assert counts == {"unet": attention + resnets + 3 + 3 + 2 + 2, "te": 12 * 6 + 2}


def fused(plugins, one: Tiny, path: str):
    """A live model in fp64, one of its modules, and the rows of each part of the module's weight."""
    model = build(one).double()
    architecture = plugins.architecture(one.family)
    module = model.get_submodule(path)
    known = architecture.find(path, one.component)
    parts = architecture.layout(known.path, known.component, module.weight.shape[0], record(one).config)
    rows = {name[:-1].rpartition("[")[2]: [n for r in ranges for n in r] for name, ranges in parts.items()}
    return model, module, rows


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def without(module, rows, run):
    """What `run` gives when these rows of a weight are zero."""
    kept = module.weight.detach().clone()
    module.weight.data[rows] = 0
    result = run()
    module.weight.data.copy_(kept)
    return result


def same_everywhere(states):
    return torch.allclose(states, states[:, :1].expand_as(states), atol=1e-12)


def test_deberta_interleaves_q_k_and_v_by_head(plugins):
    model, module, rows = fused(
        plugins, tiny("deberta", "DebertaModel", "DebertaConfig", **SIZES), "encoder.layer.0.attention.self.in_proj"
    )
    attention = model.encoder.layer[0].attention.self
    attention.q_bias.data.normal_()  # what is left of the queries when their rows are zero
    states, mask = noise(1, 5, 32), torch.ones(1, 1, 5, 5)
    mean = (states @ module.weight[rows["v"]].T).mean(1, keepdim=True).expand_as(states)

    def run():
        return attention(states, mask)[0]

    assert not same_everywhere(run())
    assert without(module, rows["v"], run).abs().max() == 0
    torch.testing.assert_close(without(module, rows["k"], run), mean)  # no scores: every token sees the mean
    assert same_everywhere(without(module, rows["q"], run))  # one query: every token sees the same, not the mean
    assert not torch.allclose(without(module, rows["q"], run), mean)


def test_modernbert_stacks_q_k_and_v_and_gates_the_second_half(plugins):
    one = tiny("modernbert", "ModernBertModel", "ModernBertConfig", **SIZES, global_attn_every_n_layers=2)
    model, module, rows = fused(plugins, one, "layers.0.attn.Wqkv")
    states = noise(1, 5, 32)

    def run():
        turn = torch.ones(1, 5, 8, dtype=torch.float64)
        return model.layers[0].attn(states, position_embeddings=(turn, 0 * turn))[0]

    assert without(module, rows["v"], run).abs().max() == 0
    assert same_everywhere(without(module, rows["q"], run))
    assert same_everywhere(without(module, rows["k"], run))
    model, module, rows = fused(plugins, one, "layers.1.mlp.Wi")
    mlp, act, gate = model.layers[1].mlp, module.weight[rows["act"]], module.weight[rows["gate"]]
    torch.testing.assert_close(mlp(states), (gelu(states @ act.T) * (states @ gate.T)) @ mlp.Wo.weight.T)


def test_mamba_puts_the_gate_last_and_the_step_before_b_and_c(plugins):
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 6, "num_hidden_layers": 1, "time_step_rank": 5}
    one = tiny("mamba", "MambaModel", "MambaConfig", **sizes)
    model, into, rows = fused(plugins, one, "layers.0.mixer.in_proj")
    mixer = model.layers[0].mixer
    mixer.D.data.zero_()  # nothing passes by the state
    mixer.conv1d.bias.data.normal_()
    states = noise(1, 4, 32)

    def run():
        return mixer(states)

    assert without(into, rows["z"], run).abs().max() == 0
    assert without(into, rows["x"], run).abs().max() > 0  # the bias of the convolution is left
    mixer.conv1d.bias.data.zero_()
    assert without(into, rows["x"], run).abs().max() == 0
    model, inner, rows = fused(plugins, one, "layers.0.mixer.x_proj")
    mixer = model.layers[0].mixer
    mixer.D.data.zero_()
    assert without(inner, rows["B"], run).abs().max() == 0
    assert without(inner, rows["C"], run).abs().max() == 0
    assert without(inner, rows["dt"], run).abs().max() > 0  # its bias is left


def test_mamba2_puts_the_gate_first_and_the_step_last(plugins):
    one = next(z for z in every() if z.cls == "Mamba2Model")
    model, into, rows = fused(plugins, one, "layers.0.mixer.in_proj")
    mixer = model.layers[0].mixer
    mixer.conv1d.bias.data.zero_()
    states = noise(1, 4, 32)

    def run():
        return mixer(states)

    assert without(into, rows["z"], run).abs().max() == 0
    assert without(into, rows["xBC"], run).abs().max() == 0
    assert without(into, rows["dt"], run).abs().max() > 0  # its bias is left
    assert {name: len(numbers) for name, numbers in rows.items()} == {"z": 96, "xBC": 96 + 2 * 2 * 6, "dt": 12}


@pytest.mark.parametrize("one", [z for z in DIFFUSION if z.component == "unet"], ids=str)
def test_the_feed_forward_of_the_unet_gates_with_the_second_half(one, plugins):
    path = "mid_block.attentions.0.transformer_blocks.0.ff.net.0"
    model, module, rows = fused(plugins, one, f"{path}.proj")
    states = noise(1, 3, 32)
    value, gate = (states @ module.weight[rows[p]].T + module.bias[rows[p]] for p in ("value", "gate"))
    torch.testing.assert_close(model.get_submodule(path)(states), value * gelu(gate))
