"""`loratool arch`: families, what they say of a model, and targets that PEFT understands as meant."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import HIDDEN, environment, factors, run_main, tensors_of_llama, write_adapter, write_base, write_json

from loratool.cli.arch import PRESETS
from loratool.operations import survey
from loratool.plugins import installed, load

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: models beyond those of conftest: (class, config class, settings)
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SIZES, "num_experts": 4, "moe_intermediate_size": 12, "mlp_only_layers": [0], "num_experts_per_tok": 2},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 8,
            "patch_size": 4,
        },
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        },
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**SIZES, "num_local_experts": 4, "head_dim": 8}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**SIZES, "head_dim": 8},
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 28,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
        },
    ),
}
_TEXT = r"model\.language_model\.layers\.\d\."
#: what each preset means, as one expression for whole names of the live model's modules and expert parameters
MEANT = {
    ("llama", "default"): r".*\.(q|v)_proj",
    ("llama", "attention"): r".*\.(q|k|v|o)_proj",
    ("llama", "mlp"): r".*\.(gate|up|down)_proj",
    ("llama", "all-linear"): r".*_proj",
    ("llama-bare", "all-linear"): r".*_proj",
    ("gpt2", "default"): r".*\.c_attn",
    ("gpt2", "attention"): r".*\.attn\.c_(attn|proj)",
    ("gpt2", "mlp"): r".*\.mlp\.c_(fc|proj)",
    ("gpt2", "all-linear"): r"transformer\.h\..*\.c_\w+",
    ("bert", "default"): r".*\.(query|value)",
    ("bert", "attention"): r".*\.attention\.(self\.(query|key|value)|output\.dense)",
    ("bert", "mlp"): r".*\.layer\.\d\.(intermediate|output)\.dense",
    ("bert", "all-linear"): r"bert\.encoder\..*",
    ("bert-bare", "mlp"): r"encoder\.layer\.\d\.(intermediate|output)\.dense",
    ("distilbert", "attention"): r".*\.\w+_lin",
    ("distilbert", "mlp"): r".*\.lin[12]",
    ("distilbert", "all-linear"): r".*\.(\w+_lin|lin[12])",
    ("mixtral", "attention"): r".*\.(q|k|v|o)_proj",
    ("mixtral", "mlp"): r".*\.experts\.(gate_up|down)_proj",
    ("mixtral", "all-linear"): r".*_proj",
    ("qwen3-moe", "mlp"): r".*\.mlp\.(experts\.gate_up_proj|(experts\.)?down_proj|gate_proj|up_proj)",
    ("qwen3-moe", "all-linear"): r".*_proj",
    ("gpt-oss", "mlp"): r".*\.experts\.(gate_up|down)_proj",
    ("mamba", "all-linear"): r".*\.(in_proj|x_proj|dt_proj)",  # PEFT refuses out_proj: the kernel reads past it
    ("vit", "default"): r".*\.attention\.(q|v)_proj",
    ("vit", "attention"): r".*\.attention\.\w+_proj",
    ("vit", "mlp"): r".*\.mlp\.fc[12]",
    ("vit", "all-linear"): r"vit\.layers\..*",
    ("qwen2-vl", "attention"): _TEXT + r".*\.(q|k|v|o)_proj",
    ("qwen2-vl", "all-linear"): _TEXT + r".*_proj",
    ("gemma3", "default"): _TEXT + r".*\.(q|v)_proj",
    ("gemma3", "mlp"): _TEXT + r".*\.(gate|up|down)_proj",
    ("unet", "attention"): r".*\.attn[12]\.to_(q|k|v|out\.0)",
    ("unet", "mlp"): r".*\.ff\.net\.(0\.proj|2)",
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=pytest.fail)


Arch = Callable[..., Outcome]


@pytest.fixture
def arch(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Arch:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        installed.cache_clear()  # -p adds a plugin for the rest of the process
        code = run_main("arch", *arguments)
        installed.cache_clear()
        return Outcome(code, *capfd.readouterr())

    return run


Live = Callable[[str], tuple[Any, Path]]


@pytest.fixture
def live(tiny: Callable[..., Any], tmp_path: Path) -> Live:
    """A model in memory and the folder that it was saved to."""

    def make(kind: str) -> tuple[Any, Path]:
        import transformers

        if kind in MORE:
            cls, config, settings = MORE[kind]
            torch.manual_seed(0)
            model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
        else:
            model = tiny(kind)
        model.save_pretrained(tmp_path / f"model-{kind}")
        return model, tmp_path / f"model-{kind}"

    return make


def adapted(model: Any, settings: dict[str, Any], rank: int = 4) -> tuple[set[str], int]:
    """What PEFT adapts, modules by name and stacks of experts by parameter, and how many numbers it trains."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D
        live = peft.get_peft_model(model, peft.LoraConfig(r=rank, **settings))
    names = set()
    for name, module in live.named_modules():
        if isinstance(module, peft.tuners.lora.layer.LoraLayer):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")  # noqa: PLW2901
            parameter = getattr(module, "parameter_name", "weight")
            names.add(name if parameter == "weight" else f"{name}.{parameter}")
    return names, sum(p.numel() for n, p in live.named_parameters() if "lora_" in n)


def meant(model: Any, expression: str) -> set[str]:
    """The linear modules and stacks of experts of a live model that an expression means."""
    from transformers.pytorch_utils import Conv1D

    names = {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    names |= {n for n, p in model.named_parameters() if p.dim() == 3 and n.rpartition(".")[0].endswith(".experts")}
    found = {n for n in names if re.fullmatch(expression, n)}
    assert found
    return found


@pytest.mark.parametrize(("kind", "preset"), MEANT)
def test_peft_adapts_exactly_what_the_targets_of_a_preset_mean(arch: Arch, live: Live, kind: str, preset: str) -> None:
    model, folder = live(kind)
    wanted = meant(model, MEANT[kind, preset])
    settings = arch("targets", folder, "--preset", preset, "--json").json
    sizes = arch("show", folder, "--rank", 4, "--json").json["totals"]["adapters"]
    names, parameters = adapted(model, settings)
    assert names == wanted
    (row,) = [r for r in sizes if r["preset"] == preset]
    assert (row["rank"], row["parameters"]) == (4, parameters)
    assert (row["fp32_bytes"], row["bf16_bytes"]) == (4 * parameters, 2 * parameters)


SPARSE = {**SIZES, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
GATED = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
#: mixtures of experts with dense layers beside the experts, whose names on disk PEFT takes for the experts'
MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3Moe", {**SPARSE, "num_experts": 4, "mlp_only_layers": [0]}),
    "qwen2-moe": ("Qwen2Moe", {**SPARSE, "num_experts": 4, "shared_expert_intermediate_size": 20}),
    "glm4-moe": ("Glm4Moe", SPARSE | ROUTED),
    "glm4-moe-lite": ("Glm4MoeLite", SPARSE | ROUTED | LATENT),
    "deepseek-v2": ("DeepseekV2", SPARSE | ROUTED | LATENT),
    "deepseek-v3": ("DeepseekV3", SPARSE | ROUTED | LATENT),
    "qwen3-next": ("Qwen3Next", {**SPARSE, **GATED, "num_experts": 4, "shared_expert_intermediate_size": 20}),
}


@pytest.mark.parametrize("preset", ["mlp", "all-linear"])
@pytest.mark.parametrize("kind", MIXED)
def test_peft_adapts_the_same_layers_whichever_way_a_model_is_given(
    arch: Arch, tmp_path: Path, kind: str, preset: str
) -> None:
    import transformers

    name, settings = MIXED[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    model.save_pretrained(tmp_path / "one-by-one")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    model.config.save_pretrained(tmp_path / "config-alone")
    wanted = r".*\.(mlp|experts|shared_experts?)\.(gate_up|gate|up|down)_proj" if preset == "mlp" else r"(?!lm_head).*"
    expected = {n for n in meant(model, wanted) if not n.endswith((".gate", ".shared_expert_gate"))}  # routers
    for way in ("one-by-one", "stacked", "config-alone"):
        settings = arch("targets", way, "--preset", preset, "--json").json
        assert adapted(copy.deepcopy(model), settings)[0] == expected, way


@pytest.mark.parametrize("kind", ["llama", "bert", "mixtral"])
def test_the_text_of_targets_is_python_that_makes_the_same_config(arch: Arch, live: Live, kind: str) -> None:
    import peft

    _, folder = live(kind)
    for preset in PRESETS:
        pasted = eval(arch("targets", folder, "--preset", preset).out, {"LoraConfig": peft.LoraConfig})
        given = peft.LoraConfig(**arch("targets", folder, "--preset", preset, "--json").json)
        assert pasted.target_modules == given.target_modules
        assert (pasted.target_parameters or []) == (given.target_parameters or [])


def test_targets_are_the_shortest_names_and_longer_only_where_those_mean_more(arch: Arch, live: Live) -> None:
    def modules(kind: str, preset: str) -> Any:
        return arch("targets", f"model-{kind}", "--preset", preset, "--json").json["target_modules"]

    for kind in ("llama", "gpt2", "bert"):
        live(kind)
    assert sorted(modules("llama", "attention")) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert sorted(modules("gpt2", "mlp")) == ["c_fc", "mlp.c_proj"]
    assert sorted(modules("bert", "attention")) == ["attention.output.dense", "key", "query", "value"]
    assert isinstance(modules("bert", "mlp"), str)  # only the layer's number tells output.dense from attention's


def test_a_preset_without_layers_says_which_have_some(arch: Arch, live: Live) -> None:
    live("mamba")
    outcome = arch("targets", "model-mamba", "--preset", "attention")
    assert outcome.code == 3
    assert "preset attention" in outcome.err
    assert "--preset default, all-linear" in outcome.err


def test_the_text_encoders_of_images_have_default_targets_of_their_own(arch: Arch, live: Live) -> None:
    model, folder = live("clip")
    wanted = meant(model, r".*\.self_attn\.\w+")
    settings = arch("targets", folder, "--json").json
    assert sorted(settings["target_modules"]) == ["k_proj", "out_proj", "q_proj", "v_proj"]
    assert adapted(model, settings)[0] == wanted


def test_the_presets_of_the_command_are_those_of_the_operation() -> None:
    assert tuple(survey.PRESETS) == PRESETS


def test_list_names_every_family_with_all_that_it_covers(arch: Arch) -> None:
    rows = {row["family"]: row for row in arch("list", "--json").json}
    families = load().architectures()
    assert list(rows) == [a.name for a in families]
    assert all(rows[a.name]["default_targets"] == list(a.default_targets) for a in families)
    assert "llama" in rows["llama"]["model_types"]
    assert "UNet2DConditionModel" in rows["stable-diffusion"]["model_types"]


def test_list_fits_a_terminal(arch: Arch) -> None:
    lines = arch("list").out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert any(line.split()[:2] == ["gpt2", "gpt2"] and "c_attn" in line for line in lines)


def test_show_takes_a_model_type_and_says_whose_it_is(arch: Arch) -> None:
    outcome = arch("show", "ministral3", "--json")
    assert "ministral3 is a model_type of the mistral family" in outcome.err
    assert outcome.json == arch("show", "mistral", "--json").json
    several = arch("show", "clip_text_model")
    assert several.code == 2
    assert "stable-diffusion" in several.err


def test_show_says_what_is_known_of_each_layer(arch: Arch) -> None:
    rows = {r["layer"]: r for r in arch("show", "qwen2-vl", "--json").json}
    qkv = rows["visual.blocks.{i}.attn.qkv"]
    assert (qkv["tower"], qkv["group"], qkv["role"]) == ("vision", "attention", "qkv")
    assert (qkv["fused"], qkv["layout"], qkv["default"]) == ("q|k|v", "concat", False)
    assert rows["model.layers.{i}.self_attn.q_proj"]["default"]
    assert rows["visual.patch_embed.proj"]["kind"] == "conv3d"
    assert "vision attention qkv" in arch("show", "qwen2-vl").out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral", "qwen2-vl", "unet", "gpt-oss"])
def test_show_counts_every_parameter_of_a_model_once(arch: Arch, live: Live, kind: str) -> None:
    _, folder = live(kind)
    report = arch("show", folder, "--json").json
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    matrices = [t for t in stored.values() if t.dim() > 1]
    assert sum(row["parameters"] for row in report["rows"]) == sum(t.numel() for t in matrices)
    assert sum(row["count"] for row in report["rows"]) == len(matrices)
    assert report["totals"]["parameters"] == sum(t.numel() for t in stored.values())
    assert report["totals"]["unknown_weights"] == 0
    assert {tuple(row["shape"]) for row in report["rows"]} == {tuple(t.shape) for t in matrices}


def test_show_gives_roles_and_groups_to_the_layers_of_a_model(arch: Arch, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    rows = {r["layer"]: r for r in arch("show", "base", "--json").json["rows"]}
    gate = rows["model.layers.{i}.mlp.gate_proj"]
    assert (gate["role"], gate["group"], gate["count"], gate["shape"]) == ("gate", "mlp", 2, [24, 16])
    assert rows["model.layers.{i}.self_attn.k_proj"]["role"] == "k"


def test_show_reads_a_weights_file_without_a_config(arch: Arch, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    report = arch("show", "base/model.safetensors", "--json").json
    assert report["totals"]["found_by"] == "tensor names"
    assert report["rows"] == arch("show", "base", "--json").json["rows"]


def test_show_has_the_ranks_that_are_asked_for(arch: Arch, tmp_path: Path) -> None:
    write_base(tmp_path / "base")

    def ranks(*options: object) -> list[int]:
        rows = arch("show", "base", "--json", *options).json["totals"]["adapters"]
        return [row["rank"] for row in rows if row["preset"] == "default"]

    assert ranks() == [4, 8, 16, 32, 64]
    assert ranks("--rank", 3, "--rank", 128) == [3, 128]
    text = arch("show", "base", "--rank", 16).out
    assert re.search(r"^ all-linear +\d+ +16 ", text, re.MULTILINE)
    assert arch("show", "base", "--rank", 0).code == 2
    alone = arch("show", "llama", "--rank", 8)
    assert alone.code == 2
    assert "has no sizes" in alone.err
    assert "try: loratool arch show PATH --rank 8" in alone.err


def test_a_config_alone_is_enough_where_the_library_knows_the_model(arch: Arch, tmp_path: Path) -> None:
    for name in ("folder/config.json", "alone.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_json(tmp_path / name, {"model_type": "bert"})
    for path in ("folder", "folder/config.json", "alone.json"):
        assert arch("detect", path, "--json").json["totals"]["family"] == "bert"
        parameters = arch("show", path, "--json").json["totals"]["parameters"]
        assert parameters == pytest.approx(BERT_BASE, rel=0.01)
        assert '["query", "value"]' in arch("targets", path).out
    write_json(tmp_path / "alone.json", {"model_type": "nobody-knows-it"})
    for verb in ("show", "check", "targets"):
        outcome = arch(verb, "alone.json")
        assert outcome.code == 3
        assert "the folder with the weights" in outcome.err


BERT_BASE = 110_000_000  # Devlin et al. 2019, section 3: the parameters of BERT base


def test_an_adapter_is_detected_and_elsewhere_refused(arch: Arch, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", base_model_name_or_path="org/base")
    outcome = arch("detect", "adapter", "--json").json
    assert "llama" in {row["family"] for row in outcome["rows"]}
    assert outcome["totals"]["base_model"] == "org/base"
    assert "llama" in arch("detect", "adapter/adapter_model.safetensors").out
    for verb in ("show", "check", "targets"):
        refused = arch(verb, "adapter")
        assert refused.code == 2
        assert "loratool inspect adapter" in refused.err


def test_an_adapter_of_no_family_fails(arch: Arch, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", factors(shapes={"strange.module": (HIDDEN, HIDDEN)}))
    outcome = arch("detect", "adapter")
    assert outcome.code == 3
    assert "no family knows every module" in outcome.err


def test_detect_says_how_a_family_was_found_and_who_else_fits(arch: Arch, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    report = arch("detect", "base", "--json").json
    assert report["totals"] == {"family": "llama", "found_by": "model_type llama"}
    rows = {row["family"]: row for row in report["rows"]}
    assert rows["llama"] == {
        "family": "llama",
        "named_by_config": True,
        "knows_every_weight": True,
        "reads_them_alike": True,
        "chosen": True,
    }
    assert rows["mixtral"]["knows_every_weight"]
    assert not rows["mixtral"]["named_by_config"]
    assert "bert" not in rows
    alike = [name for name, row in rows.items() if row["reads_them_alike"] and not row["chosen"]]
    assert re.search(rf"^reading it alike {alike[0]}, .* \({len(alike)}\)$", arch("detect", "base").out, re.MULTILINE)


def plugin(path: Path, *, kinds: tuple[str, str]) -> Path:
    """A plugin with two families of one spelling; `kinds` are their classes of layer."""
    first, second = kinds
    path.write_text(
        "from loratool import Architecture, Conv1D, Linear, Match, hookimpl\n"
        "def one(name, kind):\n"
        '    return Architecture(name=name, match=Match(model_types=("strange",)), default_targets=("in",),\n'
        '                        layers=(kind("strange.{i}.(in|out)", roles=("in", "out")),))\n'
        "@hookimpl\n"
        "def register_architectures():\n"
        f'    return [one("first", {first}), one("second", {second})]\n'
    )
    return path


STRANGE = {f"strange.{n}.{m}.weight": torch.ones(4, 6) for n in (0, 1) for m in ("in", "out")}


def test_families_that_disagree_are_listed_and_fail(arch: Arch, tmp_path: Path) -> None:
    write_base(tmp_path / "base", STRANGE, model_type="strange")
    file = plugin(tmp_path / "two.py", kinds=("Linear", "Conv1D"))
    outcome = arch("detect", "base", "-p", file)
    assert outcome.code == 3
    assert "first" in outcome.out
    assert "second" in outcome.out
    assert "read it differently" in outcome.err
    assert "--arch" in outcome.err
    same = plugin(tmp_path / "same.py", kinds=("Linear", "Linear"))
    assert arch("detect", "base", "-p", same).code == 0


@pytest.mark.parametrize("verb", [("show",), ("check",), ("targets",)], ids=str)
def test_a_family_file_and_its_name_work_in_every_command(arch: Arch, tmp_path: Path, verb: tuple[str, ...]) -> None:
    write_base(tmp_path / "base", STRANGE, model_type="strange")
    file = plugin(tmp_path / "two.py", kinds=("Linear", "Conv1D"))
    without = arch(*verb, "base")
    assert without.code == 3 or "names and shapes alone" in without.err
    report = arch(*verb, "base", "-p", file, "--arch", "second", "--json")
    assert report.code == 0, report.err
    if verb != ("targets",):
        assert report.json["totals"]["family"] == "second"


@pytest.mark.parametrize("verb", ["show", "check", "detect", "targets"])
def test_models_are_described_without_torch(tmp_path: Path, verb: str) -> None:
    write_base(tmp_path / "base")
    code = f"""
import sys
from loratool.cli.main import main
try:
    main(["arch", {verb!r}, "base"])
except SystemExit as ending:
    heavy = sorted({{"torch", "numpy", "transformers", "peft"}} & set(sys.modules))
    sys.exit(f"{{ending.code}} {{heavy}}")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "0 []"


def test_check_passes_a_model_that_fits(arch: Arch, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    outcome = arch("check", "base", "--arch", "llama")
    assert outcome.code == 0
    assert re.search("^result +everything fits$", outcome.out, re.MULTILINE)
    assert "info: score: matches no tensor" in outcome.err
    assert arch("check", "llama").code == 0


def test_check_names_what_does_not_fit_and_fails(arch: Arch, tmp_path: Path) -> None:
    tensors = {**tensors_of_llama(), "model.layers.1.extra.weight": torch.ones(3, 4)}
    write_base(tmp_path / "base", tensors)
    outcome = arch("check", "base")
    assert outcome.code == 3
    assert "error: model.layers.1.extra.weight: no layer explains this weight (3 x 4)" in outcome.err
    assert re.search("^result +1 problem$", outcome.out, re.MULTILINE)
    report = arch("check", "base", "--json")
    assert report.code == 3
    assert [f["where"] for f in report.json["findings"] if f["level"] == "error"] == ["model.layers.1.extra.weight"]
    assert "the llama family has no such layer" in arch("show", "base").err


def test_strict_checks_fail_where_patterns_match_nothing(arch: Arch, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    outcome = arch("check", "base", "--strict")
    assert outcome.code == 3
    assert "error: score: matches no tensor" in outcome.err
    write_base(tmp_path / "whole", STRANGE, model_type="strange")
    file = plugin(tmp_path / "two.py", kinds=("Linear", "Linear"))
    assert arch("check", "whole", "-p", file, "--strict", "--arch", "first").code == 0


def test_check_works_out_fused_sizes_with_the_config(arch: Arch, live: Live) -> None:
    live("gpt2")
    assert arch("check", "model-gpt2").code == 0
    (Path("model-gpt2") / "config.json").write_text(json.dumps({"model_type": "falcon", "num_attention_heads": 5}))
    assert arch("check", "model-gpt2").code == 3


@pytest.mark.parametrize("verb", ["show", "check", "detect", "targets"])
def test_what_is_neither_a_family_nor_a_file_says_so(arch: Arch, verb: str) -> None:
    outcome = arch(verb, "lama")
    assert outcome.code == 2
    assert "no family is called 'lama'" in outcome.err
    assert "llama" in outcome.err
    missing = arch(verb, "no/such/model")
    assert missing.code == 2
    assert "no such file or folder" in missing.err


@pytest.mark.parametrize("verb", ["detect", "targets"])
@pytest.mark.parametrize("word", ["llama", "gpt_neox"])
def test_a_family_where_a_model_is_needed_is_called_one(arch: Arch, verb: str, word: str) -> None:
    outcome = arch(verb, word)
    assert outcome.code == 2
    assert f"{word} is a " in outcome.err
    assert "a model is needed here" in outcome.err
    assert f"arch show {word}" in outcome.err


def test_patterns_of_components_that_a_file_does_not_have_are_no_news(arch: Arch, live: Live) -> None:
    for kind, other in (("unet", "text_model"), ("clip", "down_blocks")):
        _, folder = live(kind)
        outcome = arch("check", folder, "--arch", "stable-diffusion")
        assert outcome.code == 0, outcome.err
        assert other not in outcome.err


def test_the_layer_of_another_prediction_is_not_counted_as_one_that_peft_adapts(arch: Arch, tmp_path: Path) -> None:
    weights = tensors_of_llama()
    base = write_base(tmp_path / "base", weights)
    more = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in weights.items() if "layers.1." in n}
    write_base(tmp_path / "more", {**weights, **more}, num_hidden_layers=2, num_nextn_predict_layers=1)
    counts = [arch("show", f, "--json").json["totals"]["adapters"] for f in (base, tmp_path / "more")]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("verb", ["show", "check", "detect", "targets"])
def test_nothing_foreign_reaches_the_terminal_raw(arch: Arch, tmp_path: Path, verb: str) -> None:
    evil = "\x1b]0;owned\x07\u202e\r"
    write_base(tmp_path / "named", {**tensors_of_llama(), f"x{evil}.weight": torch.ones(2, 2)})
    write_base(tmp_path / "typed", {f"x{evil}.weight": torch.ones(2, 2)}, model_type=evil, architectures=[evil])
    for folder in ("named", "typed"):
        outcome = arch(verb, folder)
        assert outcome.code in (0, 3)
        shown = (outcome.out + outcome.err).replace("\n", "")
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf")]
