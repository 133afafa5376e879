"""The examples in every command's help are commands that work."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny_files import factors, run_main, write_adapter, write_base

from loratool.cli.main import COMMANDS, cli
from loratool.plugins import installed
from loratool.testing.hub import Hub

pytest_plugins = ["hub_fixtures"]
QUERY = "bert.encoder.layer.{}.attention.self.query"
SHAPES = {QUERY.format(n): (24, 24) for n in (0, 1)} | {"bert.encoder.layer.0.intermediate.dense": (40, 24)}
PLUGIN = """
from loratool import Architecture, Linear, Match, hookimpl

@hookimpl
def register_architectures():
    layers = (Linear("my.blocks.{i}.dense"),)
    return [Architecture(name="mine", match=Match(), layers=layers, default_targets=("dense",))]
"""


def examples_of(command: str) -> list[str]:
    """The lines of the Examples block, less the remark in parentheses that some end with."""
    text = CliRunner().invoke(cli, [command, "--help"], prog_name="loratool").output
    block = text.partition("Examples:\n")[2]
    return [
        re.sub(r"\s{2,}\(.*\)$", "", line.strip())
        for line in block.splitlines()
        if line.strip().startswith("loratool ")
    ]


EXAMPLES = [(name, line) for name in COMMANDS for line in examples_of(name)]


def bert(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES | {
        "bert.encoder.layer.0.attention.self.value": (24, 24),
        "bert.embeddings.word_embeddings": (30, 24),
    }
    tensors = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"bert.encoder.layer.0.attention.self.query.bias": torch.zeros(24)}


def write_kohya(path: Path, seed: int) -> None:
    tensors = {}
    for name, tensor in factors(seed, shapes=SHAPES).items():
        module, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        flat = "lora_te_" + module.replace(".", "_")
        tensors[f"{flat}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(8.0)
    save_file(tensors, path)


@pytest.fixture
def world(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny files under every name that the examples use, and a Hub with the repository that some do."""
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    write_base(tmp_path / "base", bert(), **config)
    tuned = {name: t + (0.1 if name.endswith("query.weight") else 0.0) for name, t in bert().items()}
    write_base(tmp_path / "tuned", tuned, **config)
    write_adapter(tmp_path / "my-adapter", factors(1, shapes=SHAPES), base_model_name_or_path="base")
    for seed, name in enumerate(("style", "subject", "small"), start=2):
        write_adapter(tmp_path / name, factors(seed, shapes=SHAPES))
    write_kohya(tmp_path / "my-adapter.safetensors", 1)
    write_kohya(tmp_path / "style.safetensors", 2)
    (tmp_path / "my_family.py").write_text(PLUGIN)
    files = {p.name: p.read_bytes() for p in (tmp_path / "my-adapter").iterdir()}
    hub.create("org/my-adapter", files, private=True)
    hub.commit("org/my-adapter", {f"folder/{name}": data for name, data in files.items()}, "v1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str]]:
    def call(line: str) -> tuple[int, str]:
        installed.cache_clear()  # -p adds a plugin for the rest of the process
        code = run_main(*shlex.split(line)[1:])
        installed.cache_clear()
        out, err = capfd.readouterr()
        return code, out + err

    return call


def test_every_command_shows_examples() -> None:
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)


@pytest.mark.parametrize(("command", "line"), [(c, e) for c, e in EXAMPLES if c != "demo"])  # the demo has its own test
def test_an_example_runs_as_printed(
    world: Path, run: Callable[[str], tuple[int, str]], command: str, line: str
) -> None:
    words = shlex.split(line)
    assert command in words
    out = world / words[words.index("-o") + 1] if "-o" in words else None
    if out and out.is_dir():
        shutil.rmtree(out)
    elif out:
        out.unlink(missing_ok=True)
    code, printed = run(line)
    assert code == 0, printed
    assert printed
    if out:
        assert out.exists() is ("-n" not in words)


def test_the_examples_of_compare_say_what_is_so(world: Path, run: Callable[[str], tuple[int, str]]) -> None:
    assert re.search(r"^equal +no$", run("loratool compare my-adapter small")[1], re.MULTILINE)
    assert re.search(r"^equal +yes$", run("loratool compare my-adapter my-adapter.safetensors")[1], re.MULTILINE)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    context = click.Context(group)
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("path", commands(cli), ids=" ".join)
def test_every_command_and_every_option_explains_itself(path: tuple[str, ...]) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    assert command.help
    assert CliRunner().invoke(cli, [*path, "--help"]).exit_code == 0
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
