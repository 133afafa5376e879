"""loratool.testing: each thing that can be wrong with a family is said, and nothing is said of one that is right."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_files import environment, tensors_of_llama, write_base, write_sharded

from loratool import (
    Architecture,
    Conv2d,
    Embedding,
    Excluded,
    Experts,
    Fused,
    Linear,
    Match,
    concat,
    interleave_heads,
)
from loratool.plugins import load
from loratool.testing import check_architecture, config_of, shapes_of

GUIDE = Path(__file__).parents[1] / "docs/plugins.md"
GOOD = Architecture(
    name="good",
    match=Match(model_types=("good",)),
    layers=(
        Embedding("model.embed", group="embedding"),
        Linear("model.blocks.{i}.attn.qkv", group="attention"),
        Linear("model.blocks.{i}.mlp.(up|down)", group="mlp"),
        Experts("model.blocks.{i}.moe.stack", group="experts"),
        Excluded("model.table", group="embedding"),
        Linear("head", group="head"),
    ),
    default_targets=("qkv",),
    fused=(
        Fused("model.blocks.{i}.attn.qkv", parts=("q", "k", "v"), layout=concat("heads*width", "width", "width")),
        Fused("model.blocks.{i}.moe.stack", parts=("gate", "up"), layout=concat(parts=2)),
    ),
    memory=("model.text.** = model.**",),
    aliases=(
        "model.blocks.{i}.attn.(q|k|v) = model.blocks.{i}.attn.qkv[(q|k|v)]",
        "model.blocks.{i}.moe.{e}.(gate|up) = model.blocks.{i}.moe.stack[{e}][(gate|up)]",
    ),
    prefixes={"": ("model.",)},
    tied=(("model.embed", "head"),),
)
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed.weight": (50, 16),
    "model.table": (9, 16),
    "model.norm.weight": (16,),
    **{f"model.blocks.{n}.attn.qkv.weight": (24, 16) for n in (0, 1)},
    **{f"model.blocks.{n}.mlp.up.weight": (32, 16) for n in (0, 1)},
    **{f"model.blocks.{n}.mlp.down.weight": (16, 32) for n in (0, 1)},
    **{f"model.blocks.{n}.moe.stack": (4, 12, 16) for n in (0, 1)},
}
CONFIG = {"heads": 4, "width": 4}


def changed(**fields: Any) -> Architecture:
    return replace(GOOD, **fields)


def with_layers(*layers: Any) -> Architecture:
    return changed(layers=(*GOOD.layers, *layers))


def said(architecture: Architecture, shapes: dict[str, tuple[int, ...]] = SHAPES, config: Any = CONFIG) -> str:
    """The one problem that there is."""
    problems = check_architecture(architecture, shapes, config)
    assert len(problems) == 1, problems
    return problems[0]


def test_nothing_is_said_of_a_family_that_fits() -> None:
    assert check_architecture(GOOD, SHAPES, CONFIG) == []
    assert check_architecture(GOOD, SHAPES) == []
    assert check_architecture(GOOD, {}) == []


@pytest.mark.parametrize("family", load().architectures(), ids=lambda a: a.name)
def test_no_built_in_family_contradicts_itself(family: Architecture) -> None:
    assert check_architecture(family, {}) == []


def test_weights_that_no_layer_explains_are_named_once_for_all_layers() -> None:
    extra = {f"model.blocks.{n}.attn.gate.weight": (4, 16) for n in range(5)}
    text = said(GOOD, {**SHAPES, **extra})
    assert "model.blocks.0.attn.gate.weight" in text
    assert "4 x 16" in text
    assert "4 more" in text


def test_a_parameter_without_weight_in_its_name_must_be_explained_too() -> None:
    assert "model.mask: no layer explains" in said(GOOD, {**SHAPES, "model.mask": (2, 16)})
    assert check_architecture(GOOD, {**SHAPES, "model.bias": (16,)}, CONFIG) == []


def test_patterns_that_match_nothing_are_named() -> None:
    assert said(with_layers(Linear("model.blocks.{i}.attn.gaet"))) == "model.blocks.{i}.attn.gaet: matches no tensor"


def test_of_tied_weights_one_is_enough() -> None:
    assert "head: matches no tensor" in said(changed(tied=()))


def test_what_a_family_has_from_another_need_not_match() -> None:
    child = Architecture(
        name="child", like="llama", match=Match(), layers=(Linear("model.layers.{i}.self_attn.extra"),)
    )
    shapes = {"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.0.self_attn.extra.weight": (8, 8)}
    assert check_architecture(child, shapes) == []
    whole = child.completed(load().architecture("llama"))
    assert check_architecture(replace(whole, like="llama"), shapes) == []
    assert "extra: matches no tensor" in said(child, {"model.layers.0.self_attn.q_proj.weight": (8, 8)})


def test_fewer_roles_than_alternatives() -> None:
    text = said(with_layers(Linear("model.x.(a|b|c)", roles=("a", "b"))))
    assert "fewer roles than alternatives" in text


@pytest.mark.parametrize("pattern", ["model.*.x", "model.(a|b", "model..x"])
def test_malformed_patterns(pattern: str) -> None:
    assert re.search("malformed|wildcard", said(with_layers(Linear(pattern))))


def test_two_layers_that_claim_one_name() -> None:
    assert "two layers claim 'head'" in said(with_layers(Embedding("head")))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("model.old.{i}.x = model.blocks.{i}.mlp.upp", "model.blocks.{i}.mlp.upp is no layer"),
        ("model.old.** = model.bloks.**", "model.bloks.** is no layer"),
        ("model.blocks.{i}.attn.(a|b|c) = model.blocks.{i}.attn.qkv[(q|k|w)]", "qkv[w] is no layer"),
        ("model.blocks.{i}.mlp.up = model.blocks.{i}.mlp.down", "never applies"),
        ("model.blocks.{i}.attn.q = model.blocks.{i}.mlp.up", "ambiguous"),
        ("model.old.(a|b) = model.new.(a|b|c)", "malformed"),
        ("model.old.(a|b", "malformed"),
    ],
)
def test_rules_that_are_wrong(rule: str, says: str) -> None:
    problems = check_architecture(changed(aliases=(*GOOD.aliases, rule)), SHAPES, CONFIG)
    assert problems
    assert all(says in p for p in problems), problems


def test_a_rule_may_lead_to_another_rule_and_to_a_path_without_its_prefix() -> None:
    rules = ("older.{i}.(a|b|c) = text.blocks.{i}.attn.(q|k|v)", "text.** = model.text.**")
    assert check_architecture(changed(aliases=(*GOOD.aliases, *rules)), SHAPES, CONFIG) == []


def test_two_names_that_are_one_layer() -> None:
    text = said(GOOD, {**SHAPES, "model.text.blocks.0.mlp.up.weight": (32, 16)})
    assert "is one layer with model.blocks.0.mlp.up.weight" in text


def test_flat_names_that_do_not_come_back() -> None:
    layers = (Linear("model.x.a_b.c"), Linear("model.x.a.b_c"))
    problems = check_architecture(with_layers(*layers), {})
    assert len(problems) == 2
    assert all("model_x_a_b_c is read as model.x.a.b_c or model.x.a_b.c" in p for p in problems)


def test_fused_sizes_that_do_not_divide_or_add_up() -> None:
    thirds = (Fused("model.blocks.{i}.mlp.up", parts=("a", "b", "c"), layout=concat(parts=3)), *GOOD.fused)
    assert "32 does not divide by 3" in said(changed(fused=thirds))
    assert "4 + 4" in said(GOOD, config={"heads": 5, "width": 4})
    heads = Fused("model.blocks.{i}.mlp.up", parts=("a", "b"), layout=interleave_heads("heads", "width", "width"))
    assert check_architecture(changed(fused=(heads, *GOOD.fused)), SHAPES, CONFIG) == []
    assert "model.blocks.0.moe.stack" in said(GOOD, {**SHAPES, "model.blocks.0.moe.stack": (4, 13, 16)})


def test_sizes_that_only_a_config_knows_are_checked_with_one() -> None:
    assert check_architecture(GOOD, SHAPES, None) == []
    assert "the config has no heads" in said(GOOD, config={"width": 4})


def test_layers_of_another_kind_than_their_weights() -> None:
    shapes = {**SHAPES, "model.blocks.0.mlp.up.weight": (32, 16, 3, 3)}
    assert "has 4 dimensions, and the family calls it a linear layer" in said(GOOD, shapes)
    assert "has 2 dimensions" in said(GOOD, {**SHAPES, "model.blocks.0.moe.stack": (48, 16)})
    conv = with_layers(Conv2d("model.patch"))
    for shape in ((8, 3, 4, 4), (8, 3)):  # a 1x1 convolution may be stored as a matrix
        assert check_architecture(conv, {**SHAPES, "model.patch.weight": shape}, CONFIG) == []


def test_default_targets_that_select_nothing() -> None:
    assert "qvk: is a default target and selects no layer" in said(changed(default_targets=("qkv", "qvk")))


def test_shapes_come_from_a_folder_an_index_or_a_file(tmp_path: Path) -> None:
    wanted = {name: tuple(t.shape) for name, t in tensors_of_llama().items()}
    assert shapes_of(write_base(tmp_path / "one")) == wanted
    assert shapes_of(str(tmp_path / "one/model.safetensors")) == wanted
    assert shapes_of(write_sharded(tmp_path / "many")) == wanted
    assert config_of(tmp_path / "one")["model_type"] == "llama"
    assert config_of(tmp_path) == {}


@pytest.mark.parametrize("mistake", [False, True])
def test_the_test_of_the_plugin_guide_passes_and_can_fail(tmp_path: Path, mistake: bool) -> None:
    family, test = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "toy.py").write_text(family.replace("|out)", "|ouT)") if mistake else family)
    (tmp_path / "test_toy.py").write_text(test)
    names = [
        f"model.blocks.0.{n}.weight" for n in ["attn.query", "attn.key", "attn.value", "attn.out", "mlp.up", "mlp.down"]
    ]
    tensors = {name: torch.zeros(4, 4) for name in (*names, "model.embed.weight")}
    write_base(tmp_path / "model", tensors, model_type="toy")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_toy.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == mistake, done.stdout + done.stderr
    assert ("model.blocks.0.attn.out.weight: no layer explains" in done.stdout) is mistake


def test_checking_needs_no_torch(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    code = (
        "import sys; from loratool.plugins import load; from loratool.testing import *;"
        f"check_architecture(load('llama').architecture('llama'), shapes_of({str(tmp_path / 'm.safetensors')!r}));"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
