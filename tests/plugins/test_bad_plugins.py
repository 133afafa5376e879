"""Plugins that are wrong, through the command line: each is named with what to do, and the rest of the tool works on.

The same mistake is made twice: in a file given by hand (`-p FILE` must work: exit code 7), and in an installed
distribution (left out with a warning: every command goes on without it).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import Q0, factors, run_main, tensors_of_llama, write_adapter, write_base

from loratool.plugins import installed


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]
Installs = Callable[..., Path]


@pytest.fixture
def cli(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run a command in a folder with a LLaMA `base` and an `adapter` for it; every run loads the plugins anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where a traceback would be left
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")

    def run(*arguments: object) -> Outcome:
        installed.cache_clear()
        capfd.readouterr()
        return Outcome(run_main(*arguments), *capfd.readouterr())

    yield run
    installed.cache_clear()


@pytest.fixture
def installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installs]:
    """Install a distribution for this process: installs("acme", toy=source)."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(name: str, **points: str) -> Path:
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[loratool]", *(f"{p} = {name}_{p}" for p in points)]))
        for point, source in points.items():
            (site / f"{name}_{point}.py").write_text(source)
        return site

    yield install
    for module in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(site))]:
        del sys.modules[module]


def plugin(*families: str, hook: str = "register_architectures", start: str = "") -> str:
    """The source of a plugin with these families."""
    return (
        "from loratool import *\nfrom loratool import hookimpl\n"
        f"{start}\n@hookimpl\ndef {hook}():\n    return [{', '.join(families)}]\n"
    )


def family(name: str = "toy", layers: str = "Linear('blocks.{i}.w')", more: str = "", model_type: str = "toy") -> str:
    return f"Architecture({name!r}, Match(model_types=({model_type!r},)), ({layers},), ('w',){more})"


def merged_llama(folder: Path) -> bool:
    """Whether this is the LLaMA base with its adapter merged, by B @ A in fp64."""
    down, up = (factors()[f"base_model.model.{Q0}.lora_{half}.weight"].double() for half in "AB")
    wanted = tensors_of_llama()[f"{Q0}.weight"].double() + 2 * up @ down
    return torch.allclose(load_file(folder / "model.safetensors")[f"{Q0}.weight"].double(), wanted, atol=1e-6)


#: the source of a plugin, and what must be said of it
WRONG = {
    "a misspelt hook": (plugin(family(), hook="register_architecture"), "register_architecture"),
    "a hook with an argument that there is none of": (
        plugin(family()).replace("register_architectures()", "register_architectures(config)"),
        "config",
    ),
    "an import of a module that does not exist": ("import no_such_module_anywhere", "no_such_module_anywhere"),
    "an import of a name that loratool does not have": ("from loratool import Architcture", "Architcture"),
    "a syntax error": ("def broken(:", "SyntaxError"),
    "an exception on import": ("raise RuntimeError('out of order')", "out of order"),
    "an exit on import": ("raise SystemExit('out of order')", "out of order"),
    "a hook that fails": (plugin("1 / 0"), "ZeroDivisionError"),
    "a hook that exits": (plugin(start="import sys").replace("return []", "sys.exit('no luck')"), "no luck"),
    "a hook that returns a number": (plugin().replace("[]", "5"), "list of Architecture"),
    "a hook that returns one family": (plugin().replace("[]", family()), "list of Architecture"),
    "a hook that returns a tuple": (plugin().replace("[]", f"({family()},)"), "list of Architecture"),
    "a hook that yields": (plugin().replace("return []", f"yield {family()}"), "list of Architecture"),
    "a list of names": (plugin("'llama'"), "list of Architecture"),
    "the class and no instance": (plugin("Architecture"), "Architecture"),
    "a field that does not exist": (plugin("Architecture('toy', layer=())"), "layer"),
    "a name that is none": (plugin("Architecture(5, layers=(Linear('a.w'),))"), "name"),
    "layers without their comma": (plugin(family().replace("('blocks.{i}.w'),)", "('blocks.{i}.w'))")), "layers"),
    "layers that are strings": (plugin(family(layers="'blocks.{i}.w'")), "layers"),
    "a match that is a tuple": (plugin(family().replace("Match(model_types=('toy',))", "('toy',)")), "match"),
    "model types without their comma": (plugin(family().replace("('toy',)", "'toy'")), "model_types"),
    "default targets without their comma": (plugin(family().replace("('w',)", "'w'")), "default_targets"),
    "roles without their comma": (plugin(family(layers="Linear('blocks.{i}.w', roles='q')")), "roles"),
    "a group that is a number": (plugin(family(layers="Linear('blocks.{i}.w', group=5)")), "group"),
    "a component that is a tuple": (plugin(family(layers="Linear('blocks.{i}.w', component=('unet',))")), "component"),
    "an order of experts that is a text": (plugin(family(layers="Experts('blocks.{i}.w', in_out='no')")), "in_out"),
    "a condition that is a dict": (plugin(family().replace("('toy',))", "('toy',), when={'a': 1})")), "when"),
    "shapes without their inner tuple": (
        plugin(family().replace("('toy',))", "('toy',), shapes=('blocks.{i}.w', 'inp == 8'))")),
        "shapes",
    ),
    "a name for no component": (plugin(family(more=", named='lora'")), "named"),
    "a name that is a tuple": (plugin(family(more=", named={'': ('lora',)}")), "named"),
    "tied paths without their inner tuple": (plugin(family(more=", tied=('a.w', 'b.w')")), "tied"),
    "a tie that is a text": (plugin(family(more=", tied_by_default='yes'")), "tied_by_default"),
    "prefixes that are a tuple": (plugin(family(more=", prefixes=('model.',)")), "prefixes"),
    "parts without their comma": (
        plugin(family(more=", fused=(Fused('blocks.{i}.w', 'qk', concat(parts=2)),)")),
        "parts",
    ),
    "a size that is a fraction": (
        plugin(family(more=", fused=(Fused('blocks.{i}.w', ('q', 'k'), concat(0.5, 0.5)),)")),
        "widths",
    ),
    "likeness to a class": (plugin(family(more=", like=Architecture")), "like"),
    "a prefix that is no tuple": (plugin(family(more=", prefixes={'': 'model.'}")), "prefixes"),
    "a pattern with a wildcard": (plugin(family(layers="Linear('blocks.*.w')")), "blocks.*.w"),
    "a pattern with nested choices": (plugin(family(layers="Linear('b.((a|b)|c).w')")), "b.((a|b)|c).w"),
    "a pattern that is not closed": (plugin(family(layers="Linear('blocks.(a|b.w')")), "blocks.(a|b.w"),
    "a pattern that is a number": (plugin(family(layers="Linear(5)")), "pattern"),
    "two layers of one name": (plugin(family(layers="Linear('a.{i}.w'), Linear('a.{i}.(w|x)')")), "a.{i}.w"),
    "two layers of one name with other indices": (
        plugin(family(layers="Linear('a.{i}.w'), Embedding('a.{j}.w')")),
        "two layers claim",
    ),
    "fewer roles than alternatives": (
        plugin(family(layers="Linear('a.{i}.(w|x|y)', roles=('q', 'k'))")),
        "fewer roles",
    ),
    "a rule without an equals sign": (plugin(family(more=", aliases=('x.w',)")), "'x.w'"),
    "a rule with unequal choices": (
        plugin(family(more=", aliases=('x.(a|b).w = blocks.(a|b|c).w',)")),
        "x.(a|b).w",
    ),
    "a fused weight that is no layer": (
        plugin(family(more=", fused=(Fused('blocks.{i}.qkv', ('q', 'k'), concat(parts=2)),)")),
        "blocks.{i}.qkv",
    ),
    "a layout that is a string": (
        plugin(family(more=", fused=(Fused('blocks.{i}.w', ('q', 'k'), 'concat'),)")),
        "layout",
    ),
    "more parts than a layout has": (
        plugin(family(more=", fused=(Fused('blocks.{i}.w', ('q', 'k', 'v'), concat(parts=2)),)")),
        "parts",
    ),
    "a size that is no expression": (
        plugin(family(more=", fused=(Fused('blocks.{i}.w', ('q', 'k'), concat('hidden**2', 'x')),)")),
        "hidden**2",
    ),
    "a condition that is no expression": (
        plugin(family().replace("('toy',))", "('toy',), when='import os')")),
        "import os",
    ),
    "likeness to nothing": (plugin("Architecture('toy', like='nobody')"), "nobody"),
    "no layers at all": (plugin("Architecture('toy')"), "no layers"),
    "one name twice": (plugin(family(), family()), "toy"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_file_given_by_hand_that_is_wrong_stops_the_command_by_name(mistake: str, cli: Cli, tmp_path: Path) -> None:
    source, needle = WRONG[mistake]
    (tmp_path / "myfamily.py").write_text(source)
    outcome = cli("merge", "base", "adapter", "-o", "out", "-p", "myfamily.py")
    assert outcome.code == 7, outcome.err
    assert "myfamily" in outcome.err
    assert needle in outcome.err
    assert "try: " in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
    assert cli("merge", "base", "adapter", "-o", "out", "-q").code == 0, "without it all is as before"


@pytest.mark.parametrize("mistake", WRONG)
def test_an_installed_plugin_that_is_wrong_is_left_out_by_name_and_every_command_works(
    mistake: str, cli: Cli, installs: Installs, tmp_path: Path
) -> None:
    source, needle = WRONG[mistake]
    installs("acme", odd=source, good=plugin(family("good", model_type="good")))
    outcome = cli("merge", "base", "adapter", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert merged_llama(tmp_path / "out")
    assert "acme" in outcome.err
    assert needle in outcome.err
    assert "try: " in outcome.err
    assert "Traceback" not in outcome.err
    assert cli("inspect", "adapter", "-q").code == 0
    families = {row["family"] for row in json.loads(cli("arch", "list", "--json").out)}
    assert {"good", "llama"} <= families
    assert "toy" not in families


#: commands that miss a family, and may miss it because its plugin was left out
MISSING = {
    "merge": ("merge", "toy", "toy-adapter", "-o", "out", "--arch", "toy"),
    "merge a model": ("merge", "toy", "toy-adapter", "-o", "out"),
    "show": ("arch", "show", "toy_family"),
    "check": ("arch", "check", "toy_family"),
    "show a model": ("arch", "show", "./toy"),
    "targets": ("arch", "targets", "./toy"),
    "detect": ("arch", "detect", "./toy"),
    "show another family": ("arch", "show", "llama"),
    "check another family": ("arch", "check", "llama"),
}


@pytest.mark.parametrize("command", MISSING)
def test_a_plugin_that_was_left_out_is_named_where_its_family_is_missed(
    command: str, cli: Cli, installs: Installs, tmp_path: Path
) -> None:
    toy(tmp_path)
    (tmp_path / "toy/config.json").unlink()  # without a family its square weights are refused
    installs("acme", toy=plugin(family(), hook="register_architecture"))
    outcome = cli(*MISSING[command])
    assert "acme" in outcome.err
    assert "register_architecture" in outcome.err
    assert outcome.err.count("acme_toy") == 1 or outcome.err.count("plugin toy") == 1


@pytest.mark.parametrize("command", MISSING)
def test_a_name_that_two_plugins_contest_is_said_where_it_is_missed(
    command: str, cli: Cli, installs: Installs, tmp_path: Path
) -> None:
    toy(tmp_path)
    (tmp_path / "toy/config.json").unlink()
    for name in ("acme", "zenith"):
        installs(name, toy=plugin(family()))
    outcome = cli(*MISSING[command])
    assert "both acme and zenith define" in outcome.err


def test_a_condition_that_cannot_be_asked_of_a_config_is_said_and_stops_nothing(
    cli: Cli, installs: Installs, tmp_path: Path
) -> None:
    write_base(tmp_path / "scaled", rope_scaling={"type": "linear", "factor": 2})
    layers = "Linear('model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|o_proj)')"
    when = family("odd", layers=layers, model_type="llama").replace(
        "('llama',))", "('llama',), when='rope_scaling > 3')"
    )
    installs("acme", odd=plugin(when))
    for command in (
        ("merge", "scaled", "adapter", "-o", "out"),
        ("arch", "show", "scaled"),
        ("arch", "detect", "scaled"),
    ):
        outcome = cli(*command)
        assert outcome.code == 0, outcome.err
        assert "odd" in outcome.err
        assert "acme" in outcome.err
        assert "rope_scaling > 3" in outcome.err
    assert merged_llama(tmp_path / "out")


def test_a_condition_on_shapes_that_cannot_be_worked_out_is_no_fit(cli: Cli, tmp_path: Path) -> None:
    toy(tmp_path)
    (tmp_path / "toy/config.json").unlink()
    match = "('toy',), shapes=(('blocks.{i}.w', 'inp/3 == 2'),))"
    (tmp_path / "mine.py").write_text(plugin(family().replace("('toy',))", match), family("other")))
    outcome = cli("arch", "detect", "./toy", "-p", "mine.py", "--json")
    assert json.loads(outcome.out)["totals"]["family"] == "other"


def test_a_plugin_file_that_registers_nothing_is_said(cli: Cli, tmp_path: Path) -> None:
    forgotten = plugin(family()).replace("@hookimpl\n", "")
    (tmp_path / "myfamily.py").write_text(forgotten)
    outcome = cli("arch", "list", "-p", "myfamily.py")
    assert "myfamily" in outcome.err
    assert "hookimpl" in outcome.err


# -- Families and models ----------------------------------------------------------------------------------------------


def toy(place: Path, names: tuple[str, ...] = ("w",), out: int = 8, **config: object) -> None:
    """Write `toy`, a model whose blocks have square or taller weights, and `toy-adapter`, on the first of the names."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"blocks.{i}.{n}.weight": torch.randn(out, 8, generator=generator) for i in (0, 1) for n in names}
    write_base(place / "toy", weights, model_type="toy", architectures=["ToyModel"], **config)
    named = {}
    for i in (0, 1):
        path = f"base_model.model.blocks.{i}.{names[0]}"
        named[f"{path}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
        named[f"{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    write_adapter(place / "toy-adapter", named, r=2, lora_alpha=2, target_modules=[names[0]])


def weight_of(folder: str, name: str = "blocks.0.w.weight") -> torch.Tensor:
    return load_file(f"{folder}/model.safetensors")[name]


def delta(name: str = "blocks.0.w") -> torch.Tensor:
    named = load_file("toy-adapter/adapter_model.safetensors")
    return named[f"base_model.model.{name}.lora_B.weight"] @ named[f"base_model.model.{name}.lora_A.weight"]


ONE, TWO = family("one"), family("two", layers="Conv1D('blocks.{i}.w')")


def test_two_families_that_claim_a_model_and_read_it_differently_are_named(
    cli: Cli, installs: Installs, tmp_path: Path
) -> None:
    toy(tmp_path)
    installs("acme", one=plugin(ONE))
    installs("zenith", two=plugin(TWO))
    outcome = cli("merge", "toy", "toy-adapter", "-o", "out")
    assert outcome.code == 3
    assert "one, two" in outcome.err
    assert "--arch one" in outcome.err
    assert not (tmp_path / "out").exists()
    assert cli("merge", "base", "adapter", "-o", "llama", "-q").code == 0
    assert cli("merge", "toy", "toy-adapter", "-o", "as-one", "--arch", "one", "-q").code == 0
    assert cli("merge", "toy", "toy-adapter", "-o", "as-two", "--arch", "two", "-q").code == 0
    torch.testing.assert_close(weight_of("as-one"), weight_of("toy") + delta())
    torch.testing.assert_close(weight_of("as-two"), weight_of("toy") + delta().mT)


def test_two_families_that_read_a_model_alike_do_not_stop_anything(
    cli: Cli, installs: Installs, tmp_path: Path
) -> None:
    toy(tmp_path)
    installs("acme", one=plugin(ONE))
    installs("zenith", two=plugin(TWO.replace("Conv1D", "Linear")))
    assert cli("merge", "toy", "toy-adapter", "-o", "out", "-q").code == 0
    torch.testing.assert_close(weight_of("out"), weight_of("toy") + delta())


def test_two_distributions_that_define_one_family_are_named_and_neither_is_used(
    cli: Cli, installs: Installs, tmp_path: Path
) -> None:
    toy(tmp_path)
    installs("acme", one=plugin(ONE))
    installs("zenith", one=plugin(ONE))
    chosen = cli("merge", "toy", "toy-adapter", "-o", "out", "--arch", "one")
    assert chosen.code == 7
    assert "acme" in chosen.err
    assert "zenith" in chosen.err
    assert "LORATOOL_PLUGINS" in chosen.err
    outcome = cli("merge", "base", "adapter", "-o", "llama", "-q")
    assert outcome.code == 0
    assert "acme" in outcome.err
    assert "zenith" in outcome.err


def test_a_file_that_claims_the_models_of_a_built_in_goes_first_and_that_is_said(cli: Cli, tmp_path: Path) -> None:
    layers = "Linear('model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|o_proj)'), Linear('lm_head')"
    (tmp_path / "mine.py").write_text(plugin(family("mine", layers=layers, model_type="llama")))
    only = ("--target", "q_proj")
    outcome = cli("merge", "base", "adapter", "-o", "out", "-p", "mine.py", *only)
    assert outcome.code == 0, outcome.err
    assert "chosen over the built-in llama" in outcome.err
    assert "mine" in outcome.out
    assert merged_llama(tmp_path / "out")
    assert "mine" not in cli("merge", "base", "adapter", "-o", "again").out


FUSED = family(
    layers="Linear('blocks.{i}.(w|out)')",
    more=", fused=(Fused('blocks.{i}.w', ('q', 'k', 'v'), concat(parts=3)),),"
    " aliases=('blocks.{i}.(q|k|v) = blocks.{i}.w[(q|k|v)]',)",
)


@pytest.mark.parametrize("by_config", [False, True], ids=["parts that are equal", "sizes from the config"])
def test_a_layout_whose_sizes_do_not_divide_is_named_and_whole_weights_still_merge(
    by_config: bool, cli: Cli, tmp_path: Path
) -> None:
    toy(tmp_path, ("w", "out"), out=8, heads=5)
    source = plugin(FUSED.replace("parts=3", "'heads', 'heads', 'heads'") if by_config else FUSED)
    (tmp_path / "mine.py").write_text(source)
    named = load_file(tmp_path / "toy-adapter/adapter_model.safetensors")
    split = {k.replace(".w.", ".q."): (v[:4].clone() if "lora_B" in k else v) for k, v in named.items()}
    write_adapter(tmp_path / "split", split, r=2, lora_alpha=2, target_modules=["q"])
    outcome = cli("merge", "toy", "split", "-o", "out", "-p", "mine.py")
    assert outcome.code == 3
    assert "blocks.0.w" in outcome.err
    assert "concat" in outcome.err
    assert "8 rows" in outcome.err or "does not divide" in outcome.err or "no whole number" in outcome.err
    assert "--arch" in outcome.err
    assert not (tmp_path / "out").exists()
    checked = cli("arch", "check", "./toy", "-p", "mine.py")
    assert checked.code == 3
    assert "blocks.0.w" in checked.err + checked.out
    assert cli("merge", "toy", "toy-adapter", "-o", "out", "-p", "mine.py", "-q").code == 0
    torch.testing.assert_close(weight_of("out"), weight_of("toy") + delta())


def test_a_layout_that_needs_a_size_that_the_config_lacks_names_it(cli: Cli, tmp_path: Path) -> None:
    toy(tmp_path, ("w",), out=9)
    (tmp_path / "mine.py").write_text(plugin(FUSED.replace("parts=3", "'n_head', 'n_head', 'n_head'")))
    named = load_file(tmp_path / "toy-adapter/adapter_model.safetensors")
    split = {k.replace(".w.", ".q."): (v[:3].clone() if "lora_B" in k else v) for k, v in named.items()}
    write_adapter(tmp_path / "split", split, r=2, lora_alpha=2, target_modules=["q"])
    outcome = cli("merge", "toy", "split", "-o", "out", "-p", "mine.py")
    assert outcome.code == 3
    assert "n_head" in outcome.err
    assert "config.json" in outcome.err


def test_two_rules_that_disagree_about_a_name_are_named_when_it_is_used(cli: Cli, tmp_path: Path) -> None:
    toy(tmp_path, ("w", "u"))
    rules = ", aliases=('blocks.{i}.x = blocks.{i}.w', 'blocks.{i}.x = blocks.{i}.u')"
    (tmp_path / "mine.py").write_text(plugin(family(layers="Linear('blocks.{i}.(w|u)')", more=rules)))
    named = load_file(tmp_path / "toy-adapter/adapter_model.safetensors")
    renamed = {k.replace(".w.", ".x."): v for k, v in named.items()}
    write_adapter(tmp_path / "renamed", renamed, r=2, lora_alpha=2, target_modules=["x"])
    checked = cli("arch", "check", "./toy", "-p", "mine.py")
    assert checked.code in (3, 7)
    assert "ambiguous" in checked.err
    outcome = cli("merge", "toy", "renamed", "-o", "out", "-p", "mine.py")
    assert outcome.code in (3, 7)
    assert re.search(r"blocks\.\S+\.w\b", outcome.err)
    assert re.search(r"blocks\.\S+\.u\b", outcome.err)


def test_a_flat_name_that_two_layers_have_is_ambiguous_and_both_are_named(cli: Cli, tmp_path: Path) -> None:
    toy(tmp_path, ("a_b.c", "a.b_c"))
    layers = "Linear('blocks.{i}.a_b.c'), Linear('blocks.{i}.a.b_c')"
    (tmp_path / "mine.py").write_text(plugin(family(layers=layers, more=", named={'': Named('lora_toy')}")))
    stem = "lora_toy_blocks_0_a_b_c"
    parts = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2), "alpha": torch.tensor(2.0)}
    save_file({f"{stem}.{part}": value for part, value in parts.items()}, tmp_path / "flat.safetensors")
    outcome = cli("merge", "toy", "flat.safetensors", "-o", "out", "-p", "mine.py")
    assert outcome.code == 3
    assert "blocks.0.a_b.c" in outcome.err
    assert "blocks.0.a.b_c" in outcome.err
    checked = cli("arch", "check", "./toy", "-p", "mine.py")
    assert checked.code == 3
    assert "flat name" in checked.err


# -- --arch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "base", "adapter", "-o", "out"),
        ("inspect", "adapter"),
        ("extract", "base", "--base", "base", "--rank", "2", "-o", "out"),
        ("resize", "adapter", "--rank", "2", "-o", "out"),
        ("convert", "adapter", "--to", "kohya", "-o", "out.safetensors"),
        ("arch", "show", "base"),
        ("arch", "targets", "base"),
        ("arch", "check", "base"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_family_that_does_not_exist_is_answered_with_near_names_everywhere(
    command: tuple[str, ...], cli: Cli
) -> None:
    outcome = cli(*command, "--arch", "lama")
    assert outcome.code == 2
    assert "lama" in outcome.err
    assert "did you mean llama" in outcome.err
    assert "arch list" in outcome.err


def test_a_model_of_no_family_asks_for_arch_where_only_that_can_help(cli: Cli, tmp_path: Path) -> None:
    toy(tmp_path)
    (tmp_path / "toy/config.json").unlink()
    outcome = cli("merge", "toy", "toy-adapter", "-o", "out")
    assert outcome.code == 3
    assert "square" in outcome.err
    assert "--arch" in outcome.err
    assert "-p FILE" in outcome.err
    (tmp_path / "mine.py").write_text(plugin(ONE))
    assert cli("merge", "toy", "toy-adapter", "-o", "out", "-p", "mine.py", "--arch", "one", "-q").code == 0
    torch.testing.assert_close(weight_of("out"), weight_of("toy") + delta())


def test_a_family_that_does_not_fit_the_model_says_what_is_missing(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("merge", "base", "adapter", "-o", "out", "--arch", "gpt2")
    assert outcome.code == 3
    assert f"{Q0}: the base has no such module" in outcome.err
    assert "gpt2" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_plugin_whose_name_is_that_of_a_module_of_python_does_not_replace_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(plugin(ONE))
    outcome = cli("arch", "list", "-p", "json.py", "--json")
    assert outcome.code == 0
    assert "one" in {row["family"] for row in json.loads(outcome.out)}
