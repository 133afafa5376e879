"""The built-in families, families given by hand and models of no family, from the files that PEFT wrote to merged ones.

PEFT's own merge_and_unload, saved by transformers, is the oracle of every merge; an adapter that extract wrote counts
only if PEFT loads it whole and without a word.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from conftest import adapt
from safetensors.torch import load_file, save_file
from tiny_files import run_main, write_adapter, write_base

from loratool.plugins import installed

sys.path.append(str(Path(__file__).parents[1] / "families"))
import zoo


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run a command in an empty folder, with the plugins that are installed and those of its own -p."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where a traceback would be left
    transformers.utils.logging.disable_progress_bar()

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run_main(*arguments)
        if "-p" in arguments:  # it is for one call
            installed.cache_clear()
        return Outcome(code, *capfd.readouterr())

    yield run
    transformers.utils.logging.enable_progress_bar()


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return {n: t for file in Path(folder).glob("*.safetensors") for n, t in load_file(file).items()}


def train(model: Any, **config: Any) -> Any:
    """Save `base`, an adapter of random factors as `adapter`, and what PEFT makes of them as `theirs`."""
    model.save_pretrained("base")
    live = adapt(model, r=3, lora_alpha=5, **config)
    live.save_pretrained("adapter")
    live.merge_and_unload().save_pretrained("theirs")
    return live


def assert_equal(folder: str | Path, wanted: str | Path, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    ours, theirs = tensors(folder), tensors(wanted)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def changed(folder: str | Path) -> set[str]:
    """The tensors that differ from those of the base."""
    base = tensors("base")
    return {n for n, t in tensors(folder).items() if not torch.equal(t, base[n])}


def loads_whole(model: Any, adapter: str) -> Any:
    """The model with an adapter that PEFT loaded without missing or unexpected keys and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # they are not about the adapter: a rename inside transformers, and PEFT's choice for Conv1D
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        live = peft.PeftModel.from_pretrained(model, adapter)
    state = tensors(adapter)
    loaded = {n for n, _ in live.named_parameters() if "lora_" in n}
    assert {n.replace(".default", "") for n in loaded} == set(state), "missing or unexpected keys"
    return live


# -- Built-in families ------------------------------------------------------------------------------------------------

#: the model of the zoo, and one of its weights that the family's own targets must change
FAMILIES = {
    "falcon-FalconForCausalLM-new_decoder_architecture=True": "transformer.h.1.self_attention.query_key_value",
    "bloom-BloomForCausalLM": "transformer.h.1.self_attention.query_key_value",
    "gpt-neox-GPTNeoXForCausalLM": "gpt_neox.layers.1.attention.query_key_value",
    "phi3-Phi3ForCausalLM": "model.layers.1.self_attn.qkv_proj",
    "gpt-bigcode-GPTBigCodeForCausalLM": "transformer.h.1.attn.c_attn",
    "gpt2-GPT2LMHeadModel-tie_word_embeddings=False": "transformer.h.1.attn.c_attn",
    "qwen2-vl-Qwen2VLForConditionalGeneration": "model.layers.1.self_attn.q_proj",
    "gemma3-Gemma3ForConditionalGeneration": "language_model.model.layers.1.self_attn.v_proj",
    "glm-GlmForCausalLM-tie_word_embeddings=False": "model.layers.1.self_attn.q_proj",
    "vit-ViTForImageClassification": "vit.encoder.layer.1.attention.attention.query",
    "whisper-WhisperForConditionalGeneration": "model.decoder.layers.1.encoder_attn.q_proj",
    "t5-T5ForConditionalGeneration": "decoder.block.2.layer.1.EncDecAttention.q",
    "mamba-MambaForCausalLM": "backbone.layers.1.mixer.in_proj",
    "deberta-DebertaModel-relative_attention=True": "encoder.layer.1.attention.self.in_proj",
    "modernbert-ModernBertForMaskedLM": "model.layers.1.attn.Wqkv",
    "mixtral-MixtralForCausalLM-tie_word_embeddings=False": "model.layers.1.self_attn.v_proj",
    "qwen3-next-Qwen3NextForCausalLM-tie_word_embeddings=False": "model.layers.1.self_attn.q_proj",
    "stable-diffusion-CLIPTextModel": "encoder.layers.1.self_attn.q_proj",
    "stable-diffusion-xl-CLIPTextModelWithProjection": "text_model.encoder.layers.1.self_attn.q_proj",
}
ZOO = {str(one): one for one in zoo.every()}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_on_the_familys_own_targets_merges_as_in_peft_and_is_extracted_again(name: str, cli: Cli) -> None:
    one = ZOO[name]
    zoo.build(one).save_pretrained("base")
    told = cli("arch", "targets", "base", "--json")
    assert told.code == 0, told.err
    train(zoo.build(one), **json.loads(told.out))
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 0, merged.err
    assert one.family in merged.out
    assert_equal("merged", "theirs")
    assert f"{FAMILIES[name]}.weight" in changed("merged")

    extracted = cli("extract", "merged", "--base", "base", "-o", "extracted", "--rank", "3")
    assert extracted.code == 0, extracted.err
    loads_whole(zoo.build(one), "extracted").merge_and_unload().save_pretrained("again")
    assert_equal("again", "theirs", rtol=1e-4, atol=1e-5)


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("width", [32, 1280], ids=["that of SD 3's", "SD XL's"])
@pytest.mark.parametrize("projected", [False, True], ids=["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_names_of_a_text_encoder_are_those_of_its_own_class(projected: bool, width: int, cli: Cli) -> None:
    """One model_type, and names in memory that differ by the class; what it projects to decides the component."""
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel

    def model() -> Any:
        torch.manual_seed(0)
        return cls(transformers.CLIPTextConfig(**TEXT, projection_dim=width)).eval()

    train(model(), target_modules=["q_proj", "fc1"])
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 0, merged.err
    assert_equal("merged", "theirs")
    extracted = cli("extract", "merged", "--base", "base", "-o", "extracted", "--rank", "3")
    assert extracted.code == 0, extracted.err
    loads_whole(model(), "extracted").merge_and_unload().save_pretrained("again")
    assert_equal("again", "theirs", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "by names"])
def test_the_second_text_encoder_of_xl_is_told_from_the_first(config: bool, cli: Cli) -> None:
    one = ZOO["stable-diffusion-xl-CLIPTextModelWithProjection"]
    train(zoo.build(one), target_modules=["q_proj"])
    if not config:
        Path("base/config.json").unlink()
    chosen = ("--arch", "stable-diffusion-xl")
    assert cli("merge", "base", "adapter", "-o", "merged", *chosen).code == 0
    assert_equal("merged", "theirs")
    converted = cli("convert", "adapter", "--to", "kohya", "-o", "style.safetensors", *chosen)
    assert converted.code == 0, converted.err
    assert all(n.startswith("lora_te2_text_model_encoder") for n in load_file("style.safetensors"))
    again = cli("merge", "base", "style.safetensors", "-o", "again", *chosen)
    assert again.code == 0, again.err
    assert_equal("again", "theirs")
    assert cli("arch", "show", "base", *chosen).out.count("text_model.encoder.layers.{i}.self_attn.q_proj") == 1


def test_an_adapter_that_may_be_for_either_text_encoder_says_so_and_a_base_decides(cli: Cli) -> None:
    """With a task type PEFT does not write down which class was trained."""
    one = ZOO["stable-diffusion-xl-CLIPTextModelWithProjection"]
    train(zoo.build(one), target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["auto_mapping"] is None
    to = ("convert", "adapter", "--to", "kohya", "-o", "style.safetensors")
    unclear = cli(*to, "--arch", "stable-diffusion-xl")
    assert unclear.code == 3
    assert "can be text_encoder:" in unclear.err
    assert "--base" in unclear.err
    told = cli(*to, "--base", "base")
    assert told.code == 0, told.err
    assert all(n.startswith("lora_te2_") for n in load_file("style.safetensors"))
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 0, merged.err
    assert_equal("merged", "theirs")


#: models whose files have one matrix an expert, or one for what is two in memory: PEFT knows the names in memory alone
OTHERWISE_IN_MEMORY = [
    "phimoe-PhimoeForCausalLM-tie_word_embeddings=False",
    "qwen2-moe-Qwen2MoeForCausalLM-tie_word_embeddings=False",
    "dinov2-Dinov2Model-use_swiglu_ffn=True",
]


@pytest.mark.parametrize("name", OTHERWISE_IN_MEMORY)
def test_what_peft_would_not_load_of_an_extracted_adapter_is_never_lost_in_silence(name: str, cli: Cli) -> None:
    one = ZOO[name]
    zoo.build(one).save_pretrained("base")
    train(zoo.build(one), **json.loads(cli("arch", "targets", "base", "--preset", "all-linear", "--json").out))
    assert cli("merge", "base", "adapter", "-o", "merged", "-q").code == 0
    assert_equal("merged", "theirs")
    extracted = cli("extract", "merged", "--base", "base", "-o", "extracted", "--rank", "6")
    assert extracted.code == 0, extracted.err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(zoo.build(one), "extracted").merge_and_unload().save_pretrained("again")
    lost = changed("merged") - changed("again")
    if lost:
        assert "PEFT" in extracted.err
        assert "warning" in extracted.err
    else:
        assert_equal("again", "theirs", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "square", [False, True], ids=["the shapes show the order", "down_proj is square and they do not"]
)
def test_stacks_in_the_order_in_out_that_transformers_does_not_mark_merge_as_in_peft(square: bool, cli: Cli) -> None:
    """Llama4TextExperts has (experts, in, out) and no is_transposed: PEFT takes it for (experts, out, in)."""
    one = ZOO["llama4-Llama4ForCausalLM-tie_word_embeddings=False"]
    settings = dict(one.settings) | ({"intermediate_size": 32} if square else {})
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings)).eval()
    parameters = ["experts.down_proj"] if square else ["experts.gate_up_proj", "experts.down_proj"]
    train(model, target_modules=["q_proj"], target_parameters=parameters)
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 0, merged.err
    assert any("experts.down_proj" in n for n in changed("theirs"))
    assert_equal("merged", "theirs")


@pytest.mark.parametrize("head", [True, False], ids=["with a head", "the bare model"])
def test_a_vit_adapter_in_the_names_of_transformers_4_merges(head: bool, cli: Cli) -> None:
    one = ZOO["vit-ViTForImageClassification" if head else "vit-ViTModel"]
    zoo.build(one).save_pretrained("base")
    generator = torch.Generator().manual_seed(3)
    factors, wanted = {}, tensors("base")
    start = "vit." if head else ""
    for i in (0, 1):
        for leaf in ("query", "value"):
            path = f"encoder.layer.{i}.attention.attention.{leaf}"
            down, up = torch.randn(2, 32, generator=generator) * 0.1, torch.randn(32, 2, generator=generator) * 0.1
            factors[f"base_model.model.{start}{path}.lora_A.weight"] = down
            factors[f"base_model.model.{start}{path}.lora_B.weight"] = up
            key = f"{start}{path}.weight"
            wanted[key] = (wanted[key].double() + 2 * up.double() @ down.double()).float()
    write_adapter(Path("adapter"), factors, r=2, lora_alpha=4, target_modules=["query", "value"])
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 0, merged.err
    assert changed("merged") == {n for n in wanted if n.endswith(("query.weight", "value.weight"))}
    for name, value in tensors("merged").items():
        torch.testing.assert_close(value, wanted[name])
    live = type(zoo.build(one)).from_pretrained("merged")
    states = torch.ones(1, 3, 16, 16)
    assert not torch.equal(live(states)[0], zoo.build(one)(states)[0])


# -- Models of no family ----------------------------------------------------------------------------------------------

_BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "embedding_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "num_labels": 3}
#: class, config, settings; targets that are square; targets that are not; whether weights are stored (in, out)
NO_FAMILY: dict[str, tuple[str, str, dict[str, Any], list[str], list[str]]] = {
    "albert": ("AlbertForMaskedLM", "AlbertConfig", _BERT, ["query", "value"], ["ffn"]),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", _BERT, ["query", "value"], ["intermediate.dense"]),
    "layoutlm": ("LayoutLMForTokenClassification", "LayoutLMConfig", _BERT, ["query"], ["intermediate.dense"]),
    "openai-gpt": ("OpenAIGPTForSequenceClassification", "OpenAIGPTConfig", _GPT, ["attn.c_proj"], ["c_attn"]),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {**_GPT, "dff": 48}, ["Wq", "Wv"], ["ffn.0"]),  # all in `transformer.`
    "xlnet": (
        "XLNetForSequenceClassification",
        "XLNetConfig",
        {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        ["summary"],
        ["layer_1", "layer_2"],
    ),
}


def of_no_family(name: str) -> Any:
    cls, config, settings, _, _ = NO_FAMILY[name]
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()


@pytest.mark.parametrize("name", NO_FAMILY)
def test_a_model_of_no_family_is_read_from_its_config_and_that_is_said(name: str, cli: Cli) -> None:
    cls, _, _, square, other = NO_FAMILY[name]
    train(of_no_family(name), target_modules=square + other)
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 0, merged.err
    assert_equal("merged", "theirs")
    assert f"info: {name}: no family is made for it; its layers are those of {cls} in transformers" in merged.err
    extracted = cli("extract", "merged", "--base", "base", "-o", "extracted", "--rank", "3")
    assert extracted.code == 0, extracted.err
    loads_whole(of_no_family(name), "extracted").merge_and_unload().save_pretrained("again")
    assert_equal("again", "theirs", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NO_FAMILY)
def test_an_adapter_of_no_family_is_described_and_resized(name: str, cli: Cli) -> None:
    _, _, _, square, other = NO_FAMILY[name]
    train(of_no_family(name), target_modules=square + other)
    assert cli("inspect", "adapter").code == 0
    resized = cli("resize", "adapter", "--rank", "1", "-o", "smaller")
    assert resized.code == 0, resized.err


@pytest.mark.parametrize("command", ["show", "targets", "detect"])
def test_what_merge_can_read_the_arch_commands_can_too(command: str, cli: Cli) -> None:
    of_no_family("electra").save_pretrained("base")
    outcome = cli("arch", command, "base")
    assert outcome.code == 0, outcome.err
    assert "electra" in outcome.out + outcome.err


@pytest.mark.parametrize("name", NO_FAMILY)
def test_without_a_config_the_shapes_of_the_adapter_show_how_weights_are_stored(name: str, cli: Cli) -> None:
    train(of_no_family(name), target_modules=NO_FAMILY[name][4])
    Path("base/config.json").unlink()
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 0, merged.err
    assert_equal("merged", "theirs")
    assert "warning: unknown: read from names and shapes alone" in merged.err
    assert "(out, in) or (in, out)" in merged.err
    assert "which are tied" in merged.err


@pytest.mark.parametrize("name", NO_FAMILY)
def test_without_a_config_square_weights_are_refused_with_what_to_do(name: str, cli: Cli) -> None:
    train(of_no_family(name), target_modules=NO_FAMILY[name][3])
    Path("base/config.json").unlink()
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 3
    assert NO_FAMILY[name][3][0] in merged.err
    assert "square" in merged.err
    assert "--arch" in merged.err
    assert not Path("merged").exists()


@pytest.mark.parametrize("name", NO_FAMILY)
def test_square_weights_without_a_config_merge_rightly_or_not_at_all(name: str, cli: Cli) -> None:
    """A head is a linear layer in models of Conv1D too: it shows nothing about the others."""
    model = of_no_family(name)
    heads = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(("score", "out_proj"))
    ]
    others = heads[:1] or NO_FAMILY[name][4]
    train(model, target_modules=[*NO_FAMILY[name][3], *others])
    Path("base/config.json").unlink()
    merged = cli("merge", "base", "adapter", "-o", "merged")
    if merged.code == 0:
        assert_equal("merged", "theirs")
    else:
        assert merged.code == 3
        assert "square" in merged.err


@pytest.mark.parametrize("adapter_names_it", [False, True], ids=["the base's config", "the adapter's too"])
def test_remote_code_is_never_run(adapter_names_it: bool, cli: Cli, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    generator = torch.Generator().manual_seed(0)
    weights = {f"blocks.{i}.up.weight": torch.randn(12, 8, generator=generator) for i in (0, 1)}
    remote = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
    write_base(Path("base"), weights, model_type="evil", architectures=["Evil"], auto_map=remote)
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py"):
        Path("base", name).write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: pass\n")
    factors = {}
    for i in (0, 1):
        factors[f"base_model.model.blocks.{i}.up.lora_A.weight"] = torch.randn(2, 8, generator=generator)
        factors[f"base_model.model.blocks.{i}.up.lora_B.weight"] = torch.randn(12, 2, generator=generator)
    extra = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "modeling_evil"}}
    more: dict[str, Any] = extra if adapter_names_it else {}
    write_adapter(Path("adapter"), factors, r=2, lora_alpha=2, target_modules=["up"], **more)
    merged = cli("merge", "base", "adapter", "-o", "merged")
    assert merged.code == 0, merged.err
    assert "the model's own code is never run" in merged.err
    for command in (("inspect", "adapter"), ("arch", "show", "base"), ("arch", "detect", "base")):
        assert cli(*command).code in (0, 3)
    assert not mark.exists()
    for i in (0, 1):
        down, up = (factors[f"base_model.model.blocks.{i}.up.lora_{half}.weight"] for half in "AB")
        found = tensors("merged")[f"blocks.{i}.up.weight"]
        torch.testing.assert_close(found, weights[f"blocks.{i}.up.weight"] + up @ down)


# -- A family given by hand, in every command -------------------------------------------------------------------------

TOY = """
from loratool import Architecture, Embedding, Fused, Linear, Match, Named, hookimpl, interleave_heads

QKV = "model.blocks.{i}.attn.qkv"


@hookimpl
def register_architectures():
    return [
        Architecture(
            name="toy",
            match=Match(model_types=("toy",)),
            layers=(
                Embedding("model.embed", group="embedding"),
                Linear(QKV, group="attention", roles=("qkv",)),
                Linear("model.blocks.{i}.mlp.(up|down)", group="mlp"),
            ),
            default_targets=("qkv",),
            fused=(Fused(QKV, ("q", "k", "v"), interleave_heads("heads", "hidden_size/heads", 2, 2)),),
            aliases=("model.blocks.{i}.attn.(query|key|value) = model.blocks.{i}.attn.qkv[(q|k|v)]",),
            prefixes={"": ("model.",)},
            named={"": Named("lora_toy")},
        )
    ]
"""
HEADS, WIDTH = 4, 16  # a head has 4 rows of q, 2 of k, 2 of v
QUERY_ROWS = [8 * head + row for head in range(HEADS) for row in range(4)]


@pytest.fixture
def toy(cli: Cli) -> dict[str, torch.Tensor]:
    """Write toy.py, base, `adapter` (on the fused weight and up) and `split` (on the queries); return the base."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    base = {"model.embed.weight": weight(20, WIDTH)}
    for i in (0, 1):
        base[f"model.blocks.{i}.attn.qkv.weight"] = weight(8 * HEADS, WIDTH)
        base[f"model.blocks.{i}.mlp.up.weight"] = weight(24, WIDTH)
        base[f"model.blocks.{i}.mlp.down.weight"] = weight(WIDTH, 24)
    Path("toy.py").write_text(TOY)
    write_base(Path("base"), base, model_type="toy", architectures=["ToyModel"], hidden_size=WIDTH, heads=HEADS)
    for name, modules in {
        "adapter": {"attn.qkv": (8 * HEADS, WIDTH), "mlp.up": (24, WIDTH)},
        "split": {"attn.query": (4 * HEADS, WIDTH)},
    }.items():
        factors = {}
        for i in (0, 1):
            for module, (out, inputs) in modules.items():
                path = f"base_model.model.model.blocks.{i}.{module}"
                factors |= {f"{path}.lora_A.weight": weight(2, inputs), f"{path}.lora_B.weight": weight(out, 2)}
        targets = [m.rpartition(".")[2] for m in modules]
        write_adapter(Path(name), factors, r=2, lora_alpha=4, target_modules=targets)
    return base


def update(adapter: str, path: str) -> torch.Tensor:
    named = load_file(Path(adapter, "adapter_model.safetensors"))
    down, up = (named[f"base_model.model.model.{path}.lora_{half}.weight"].double() for half in "AB")
    return (2 * up @ down).float()


def test_merge_of_a_family_given_by_hand(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    assert cli("merge", "base", "adapter", "-o", "merged", "-p", "toy.py", "-q") == (0, "", "")
    merged = tensors("merged")
    for path in ("blocks.0.attn.qkv", "blocks.1.mlp.up"):
        name = f"model.{path}.weight"
        torch.testing.assert_close(merged[name], toy[name] + update("adapter", path))
    assert changed("merged") == {n for n in toy if n.endswith(("qkv.weight", "up.weight"))}


def test_merge_of_a_part_of_a_fused_weight(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    assert cli("merge", "base", "split", "-o", "merged", "-p", "toy.py", "-q") == (0, "", "")
    name = "model.blocks.1.attn.qkv.weight"
    wanted = toy[name].clone()
    wanted[QUERY_ROWS] += update("split", "blocks.1.attn.query")
    torch.testing.assert_close(tensors("merged")[name], wanted)


def test_inspect_of_a_family_given_by_hand(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    rows = {r["module"]: r for r in json.loads(cli("inspect", "adapter", "-p", "toy.py", "--json").out)["rows"]}
    assert {(r["group"], r["role"]) for r in rows.values()} == {("attention", "qkv"), ("mlp", "up")}
    assert json.loads(cli("inspect", "adapter", "-p", "toy.py", "--json").out)["totals"]["families"] == ["toy"]
    part = json.loads(cli("inspect", "split", "-p", "toy.py", "--json").out)["rows"]
    assert {r["role"] for r in part} == {"q"}
    assert cli("inspect", "adapter").code == 0, "without the family it is still a PEFT adapter"


def test_extract_of_a_family_given_by_hand(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    assert cli("merge", "base", "adapter", "-o", "merged", "-p", "toy.py", "-q").code == 0
    outcome = cli("extract", "merged", "--base", "base", "-o", "delta", "--rank", "2", "-p", "toy.py", "-q")
    assert outcome.code == 0, outcome.err
    assert cli("merge", "base", "delta", "-o", "again", "-p", "toy.py", "-q").code == 0
    assert_equal("again", "merged", rtol=1e-4, atol=1e-5)


def test_resize_of_a_family_given_by_hand(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    for adapter, leaf in (("adapter", "attn.qkv"), ("split", "attn.query")):
        out = f"small-{adapter}"
        outcome = cli("resize", adapter, "-o", out, "--rank", "1", "-p", "toy.py", "-q")
        assert outcome.code == 0, outcome.err
        path = f"blocks.0.{leaf}"
        u, s, vh = torch.linalg.svd(update(adapter, path).double())
        named = load_file(Path(out, "adapter_model.safetensors"))
        down, up = (named[f"base_model.model.model.{path}.lora_{half}.weight"].double() for half in "AB")
        torch.testing.assert_close(up @ down, s[0] * u[:, :1] @ vh[:1], rtol=1e-4, atol=1e-6)


def test_convert_of_a_family_given_by_hand(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    outcome = cli("convert", "adapter", "-o", "flat.safetensors", "--to", "kohya", "-p", "toy.py", "-q")
    assert outcome.code == 0, outcome.err
    modules = {name.partition(".")[0] for name in load_file("flat.safetensors")}
    assert modules == {f"lora_toy_model_blocks_{i}_{leaf}" for i in (0, 1) for leaf in ("attn_qkv", "mlp_up")}
    assert cli("convert", "flat.safetensors", "-o", "back", "--to", "peft", "-p", "toy.py", "-q").code == 0
    assert cli("merge", "base", "back", "-o", "again", "-p", "toy.py", "-q").code == 0
    assert cli("merge", "base", "adapter", "-o", "merged", "-p", "toy.py", "-q").code == 0
    assert_equal("again", "merged")


def test_compare_of_a_family_given_by_hand(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    assert cli("convert", "adapter", "-o", "flat.safetensors", "--to", "kohya", "-p", "toy.py", "-q").code == 0
    outcome = cli("compare", "adapter", "flat.safetensors", "-p", "toy.py", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert len(report["rows"]) == 4
    assert all(abs(row["cosine"] - 1) < 1e-6 for row in report["rows"])


def test_arch_of_a_family_given_by_hand(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    assert "toy" in {row["family"] for row in json.loads(cli("arch", "list", "-p", "toy.py", "--json").out)}
    layers = json.loads(cli("arch", "show", "toy", "-p", "toy.py", "--json").out)
    assert {(r["layer"], r["fused"], r["layout"]) for r in layers if r["fused"]} == {
        ("model.blocks.{i}.attn.qkv", "q|k|v", "interleave_heads")
    }
    shown = json.loads(cli("arch", "show", "base", "-p", "toy.py", "--json").out)
    assert {r["layer"]: r["count"] for r in shown["rows"]} == {
        "model.embed": 1,
        "model.blocks.{i}.attn.qkv": 2,
        "model.blocks.{i}.mlp.up": 2,
        "model.blocks.{i}.mlp.down": 2,
    }
    told = json.loads(cli("arch", "targets", "base", "-p", "toy.py", "--preset", "mlp", "--json").out)
    assert sorted(told["target_modules"]) == ["down", "up"]
    assert cli("arch", "check", "base", "-p", "toy.py", "--strict").code == 0
    found = json.loads(cli("arch", "detect", "base", "-p", "toy.py", "--json").out)
    assert found["totals"]["family"] == "toy"
    assert [r["family"] for r in found["rows"] if r["chosen"]] == ["toy"]
    adapter = json.loads(cli("arch", "detect", "adapter", "-p", "toy.py", "--json").out)
    assert [r["family"] for r in adapter["rows"]] == ["toy"]


def test_check_names_what_a_family_given_by_hand_does_not_explain(toy: dict[str, torch.Tensor], cli: Cli) -> None:
    save_file({**toy, "model.blocks.0.router.weight": torch.ones(3, WIDTH)}, "base/model.safetensors")
    outcome = cli("arch", "check", "base", "-p", "toy.py")
    assert outcome.code == 3
    assert "model.blocks.0.router" in outcome.err
    assert cli("merge", "base", "adapter", "-o", "merged", "-p", "toy.py", "-q").code == 0, "merge leaves it alone"
    assert torch.equal(tensors("merged")["model.blocks.0.router.weight"], torch.ones(3, WIDTH))
