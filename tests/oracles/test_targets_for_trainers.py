"""`arch targets --for`: each trainer, told so, trains the layers of the preset and no other.

What the trainers do with their arguments is stated here in a few lines, from their sources: LLaMA-Factory
(hparams/finetuning_args.py, model/adapter.py, model/model_utils/visual.py), axolotl (loaders/adapter.py: its string or
list goes to LoraConfig), sd-scripts (networks/lora.py: LoRANetwork.create_modules) and LyCORIS (lycoris/kohya.py).
What is then trained PEFT itself says, on a live model, and LyCORIS on a UNet.
"""

from __future__ import annotations

import json
import re
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pipelines
import pytest
import torch
import transformers
import yaml
from tiny_files import run_main, tensors_of_llama, write_base

from loratool.plugins import installed

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", SIZES),
    "Bert": ("ForMaskedLM", SIZES),
    "Mixtral": ("ForCausalLM", {**SIZES, "num_local_experts": 4}),
    "Qwen2VL": (
        "ForConditionalGeneration",
        {
            "text_config": {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        },
    ),
}
_TEXT = r"model\.language_model\.layers\.\d\."
#: what each preset means, as one expression for whole names of linear modules and stacks of experts
MEANT = {
    ("Llama", "default"): r".*\.(q|v)_proj",
    ("Llama", "all-linear"): r".*_proj",
    ("Bert", "attention"): r".*\.attention\.(self\.(query|key|value)|output\.dense)",
    ("Bert", "mlp"): r".*\.layer\.\d\.(intermediate|output)\.dense",  # only a number tells these from attention's
    ("Mixtral", "attention"): r".*\.(q|k|v|o)_proj",
    ("Mixtral", "mlp"): r".*\.experts\.(gate_up|down)_proj",
    ("Qwen2VL", "attention"): _TEXT + r".*\.(q|k|v|o)_proj",
    ("Qwen2VL", "all-linear"): _TEXT + r".*_proj",
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Targets = Callable[..., Outcome]


@pytest.fixture
def targets(capfd: pytest.CaptureFixture[str]) -> Targets:
    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        installed.cache_clear()
        code = run_main("arch", "targets", *arguments)
        return Outcome(code, *capfd.readouterr())

    return run


def live(kind: str, place: Path) -> Any:
    tail, settings = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, kind + tail)(getattr(transformers, f"{kind}Config")(**settings))
    model.save_pretrained(place)
    return model


def meant(model: Any, expression: str) -> set[str]:
    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names |= {n for n, p in model.named_parameters() if p.dim() == 3 and n.rpartition(".")[0].endswith(".experts")}
    found = {n for n in names if re.fullmatch(expression, n)}
    assert found
    return found


def adapted(model: Any, modules: Any, parameters: Any = None) -> set[str]:
    """What PEFT adapts: modules by name, stacks of experts by parameter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=modules, target_parameters=parameters))
    names = set()
    for name, module in live.named_modules():
        if isinstance(module, peft.tuners.lora.layer.LoraLayer):
            whole = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", "weight")
            names.add(whole if parameter == "weight" else f"{whole}.{parameter}")
    return names


@pytest.mark.parametrize(("kind", "preset"), MEANT)
def test_axolotl_gives_peft_what_stands_in_its_yaml(targets: Targets, tmp_path: Path, kind: str, preset: str) -> None:
    model = live(kind, tmp_path / "base")
    settings = yaml.safe_load(targets(tmp_path / "base", "--preset", preset, "--for", "axolotl").out)
    assert settings.keys() <= {"lora_target_modules", "lora_target_parameters"}
    modules, parameters = (settings.get(f"lora_target_{what}") or [] for what in ("modules", "parameters"))
    wanted = meant(model, MEANT[kind, preset])
    assert adapted(model, modules, parameters) == wanted
    as_json = targets(tmp_path / "base", "--preset", preset, "--for", "axolotl", "--json").out
    assert json.loads(as_json) == settings


@pytest.mark.parametrize(("kind", "preset"), [case for case in MEANT if case != ("Mixtral", "mlp")])
def test_llama_factory_cuts_its_value_at_the_commas(targets: Targets, tmp_path: Path, kind: str, preset: str) -> None:
    model = live(kind, tmp_path / "base")
    settings = yaml.safe_load(targets(tmp_path / "base", "--preset", preset, "--for", "llama-factory").out)
    (value,) = settings.values()
    names = [item.strip() for item in value.split(",")]
    wanted = meant(model, MEANT[kind, preset])
    towers = ("visual",) if kind == "Qwen2VL" else ()
    for frozen in [(), towers] if towers else []:  # a model that it knows the towers of
        inside = [n for n, _ in model.named_modules() if any(t in n for t in names) and not any(f in n for f in frozen)]
        assert {n for n in inside if isinstance(model.get_submodule(n), torch.nn.Linear)} == wanted
    assert adapted(model, names) == wanted


def test_short_names_stay_short_for_llama_factory(targets: Targets, tmp_path: Path) -> None:
    write_base(tmp_path / "base", tensors_of_llama())
    assert targets(tmp_path / "base", "--for", "llama-factory").out == "lora_target: q_proj,v_proj\n"


def test_what_a_trainer_cannot_be_told_is_refused_by_name(targets: Targets, tmp_path: Path) -> None:
    live("Mixtral", tmp_path / "experts")
    write_base(tmp_path / "base", tensors_of_llama())
    pipelines.build("flux", tmp_path / "scratch").save_pretrained(tmp_path / "flux")
    for where, trainer, why, way_out in (
        ("experts", "llama-factory", "experts.gate_up_proj", "--for axolotl"),
        ("base", "kohya", "image models, and this is of the llama family", "--for llama-factory or axolotl"),
        ("flux", "kohya", "by class, not by name, and this is of the flux family", "--for peft"),
        ("flux", "axolotl", "language models, and this is of the flux family", "--for peft"),
    ):
        outcome = targets(tmp_path / where, "--preset", "mlp", "--for", trainer)
        assert outcome.code == 3, trainer
        assert not outcome.out
        assert why in outcome.err
        assert way_out in outcome.err


# -- sd-scripts --------------------------------------------------------------------------------------------------------

#: what each preset means in the UNet and in the text encoders, under diffusers' and transformers' names
IMAGES = {
    "default": (r".*\.attn[12]\.to_(q|k|v|out\.0)", r".*\.self_attn\.\w+_proj"),
    "attention": (r".*\.attn[12]\.to_(q|k|v|out\.0)", r".*\.self_attn\.\w+_proj"),
    "mlp": (r".*\.ff\.net\.(0\.proj|2)", r".*\.mlp\.fc[12]"),
    "all-linear": (r".*", r".*"),
}


def kind_of(module: torch.nn.Module) -> str:
    return "linear" if isinstance(module, torch.nn.Linear) else "conv" if isinstance(module, torch.nn.Conv2d) else ""


def by_class(model: torch.nn.Module, classes: tuple[str, ...]) -> set[str]:
    """What networks.lora trains: linear maps and 1x1 convolutions inside of modules of some classes."""
    found = set()
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            for inner, child in module.named_modules():
                if kind_of(child) == "linear" or (kind_of(child) == "conv" and child.kernel_size == (1, 1)):
                    found.add(f"{name}.{inner}")
    return found


def by_name(model: torch.nn.Module, patterns: list[str]) -> set[str]:
    """What a preset of LyCORIS with names alone trains."""
    hit = (n for n, m in model.named_modules() if kind_of(m))
    return {n for n in hit if n in patterns or any(re.match(p, n) for p in patterns)}


def in_sd_scripts(kind: str, pipe: Any) -> tuple[torch.nn.Module, dict[str, str]]:
    """The UNet as sd-scripts have it, which in XL is under its original names, and those by diffusers' names."""
    if kind == "sd":
        return pipe.unet, {n: n for n, _ in pipe.unet.named_modules()}
    there = {w.data_ptr(): n for n, w in pipelines.single_file(pipe).items()}
    root, names = torch.nn.Module(), {}
    for name, module in pipe.unet.named_modules():
        if kind_of(module):
            path = there[module.weight.data_ptr()].removeprefix("model.diffusion_model.").removesuffix(".weight")
            names[name], place = path, root
            *above, leaf = path.split(".")
            for element in above:
                if element not in dict(place.named_children()):
                    place.add_module(element, torch.nn.Module())
                place = place.get_submodule(element)
            place.add_module(leaf, module)
    return root, names


def linear(model: torch.nn.Module, expression: str) -> set[str]:
    names = {n for n, m in model.named_modules() if kind_of(m) == "linear"}
    return {n for n in names if re.fullmatch(expression, n)}


@pytest.mark.parametrize("preset", IMAGES)
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_sd_scripts_train_the_names_of_the_preset_file(
    targets: Targets, tmp_path: Path, kind: str, preset: str
) -> None:
    pipe = pipelines.build(kind, tmp_path / "scratch")
    pipe.save_pretrained(tmp_path / "base")
    outcome = targets(tmp_path / "base", "--preset", preset, "--for", "kohya")
    assert "--network_module lycoris.kohya --network_args algo=lora preset=targets.toml" in outcome.out
    settings = tomllib.loads(outcome.out)
    found = json.loads(targets(tmp_path / "base", "--preset", preset, "--for", "kohya", "--json").out)
    assert found["preset"] == settings
    assert targets(tmp_path / "base", "--preset", preset, "--for", "sd-scripts").out == outcome.out
    assert settings["unet_target_module"] == settings["text_encoder_target_module"] == []
    unet, names = in_sd_scripts(kind, pipe)
    texts = [m for n, m in pipelines.models(pipe).items() if n.startswith("text_encoder")]
    wanted = {names[n] for n in linear(pipe.unet, IMAGES[preset][0])}
    wanted_texts = [linear(t, IMAGES[preset][1]) for t in texts]
    assert by_name(unet, settings["unet_target_name"]) == wanted
    assert [by_name(t, settings["text_encoder_target_name"]) for t in texts] == wanted_texts
    classes = ("Transformer2DModel",), ("CLIPAttention", "CLIPMLP")
    theirs = {names[n] for n in by_class(pipe.unet, classes[0])}
    assert theirs != wanted or [by_class(t, classes[1]) for t in texts] != wanted_texts
    assert ("proj_in" in found["networks_lora"]["trains_besides"]) is bool([n for n in theirs - wanted if "_in" in n])


@pytest.mark.parametrize("preset", ["attention", "all-linear"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_lycoris_itself_makes_modules_for_these_names_alone(
    targets: Targets, tmp_path: Path, kind: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lycoris = pytest.importorskip("lycoris.kohya")
    for name in vars(lycoris.LycorisNetworkKohya):
        if name.isupper():  # a preset is set on the class
            monkeypatch.setattr(lycoris.LycorisNetworkKohya, name, getattr(lycoris.LycorisNetworkKohya, name))
    pipe = pipelines.build(kind, tmp_path / "scratch")
    pipe.save_pretrained(tmp_path / "base")
    file = tmp_path / "targets.toml"
    file.write_text(targets(tmp_path / "base", "--preset", preset, "--for", "kohya").out)
    unet, names = in_sd_scripts(kind, pipe)
    texts = [m for n, m in pipelines.models(pipe).items() if n.startswith("text_encoder")]
    network = lycoris.create_network(1.0, 2, 2, None, texts, unet, algo="lora", preset=str(file))
    wanted = {f"lora_unet_{names[n]}" for n in linear(pipe.unet, IMAGES[preset][0])}
    for number, text in enumerate(texts, 1):
        wanted |= {f"lora_te{number}_{n}" for n in linear(text, IMAGES[preset][1])}
    assert {m.lora_name for m in network.loras} == {n.replace(".", "_") for n in wanted}


def test_where_networks_lora_trains_the_same_it_is_taken(targets: Targets, tmp_path: Path) -> None:
    text = pipelines.build("sd", tmp_path / "scratch").text_encoder
    text.save_pretrained(tmp_path / "base")
    options = ("--arch", "stable-diffusion", "--preset", "all-linear", "--for", "kohya")
    assert by_class(text, ("CLIPAttention", "CLIPMLP")) == linear(text, ".*")
    outcome = targets(tmp_path / "base", *options)
    assert outcome.out == "--network_module networks.lora --network_train_text_encoder_only\n"
    found = {"network_module": "networks.lora", "network_train_text_encoder_only": True}
    assert json.loads(targets(tmp_path / "base", *options, "--json").out) == found
