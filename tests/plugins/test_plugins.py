"""Plugins: a real third-party distribution, broken ones, conflicts, and the list of the built-in ones."""

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import PluginError, UsageError
from loratool.plugins import load

ROOT = Path(__file__).parents[2]
TOY = ROOT / "docs/examples/loratool-toy"


def entry_points_of_the_project():
    """The section of pyproject.toml, read by hand: tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text()
    _, _, section = text.partition("[project.entry-points.loratool]\n")
    lines = section.partition("\n[")[0].split("\n")
    return {k.strip(): v.strip().strip('"') for k, _, v in (line.partition("=") for line in lines if "=" in line)}


def run(*arguments, path=(), **environment):
    command = [sys.executable, "-m", "loratool", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "200", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=ROOT)


def listed(result):
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with loratool-toy installed, as pip installs it for a user."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-build-isolation", "--no-deps", "--target", str(place), str(TOY)]
    subprocess.run(command, check=True, capture_output=True)
    return place


def distribution(place, name, points):
    """Write an installed distribution: modules {name: source} and their entry points."""
    info = place / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = ["[loratool]"]
    for point, source in points.items():
        module = f"{name.replace('-', '_')}_{point}"
        (place / f"{module}.py").write_text(textwrap.dedent(source))
        lines.append(f"{point} = {module}")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return place


def family(name, pattern="blocks.{i}.w"):
    return f"""
        from loratool import Architecture, Linear, Match, hookimpl

        @hookimpl
        def register_architectures():
            return [Architecture({name!r}, Match(model_types=({name!r},)), (Linear({pattern!r}),), ("w",))]
    """


@pytest.fixture
def installs(tmp_path, monkeypatch):
    """Install distributions for this process: installs("acme", toy=source)."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, **points):
        return distribution(tmp_path, name, points)

    yield install
    for module in [m for m in sys.modules if str(getattr(sys.modules[m], "__file__", "")).startswith(str(tmp_path))]:
        del sys.modules[module]


def test_the_folder_the_list_and_the_installed_entry_points_agree():
    sources = [p for p in (ROOT / "plugins/loratool_families").glob("*.py") if "@hookimpl" in p.read_text()]
    files = {p.stem for p in sources}  # the others are what several families are built of
    told = entry_points_of_the_project()
    installed = importlib.metadata.distribution("loratool").entry_points
    assert {p.name: p.value for p in installed if p.group == "loratool"} == told
    assert set(told) == files
    assert set(told.values()) == {f"loratool_families.{f}" for f in files}


def test_every_built_in_plugin_loads_and_brings_a_family():
    plugins = load(",".join(entry_points_of_the_project()))
    assert plugins.findings == []
    assert {p.name for p in plugins.loaded} == set(entry_points_of_the_project())
    assert all(p.hooks == ("register_architectures",) for p in plugins.loaded)
    assert len(plugins.architectures()) >= len(plugins.loaded)


def test_the_toy_is_as_small_as_the_documentation_says():
    assert len((TOY / "loratool_toy.py").read_text().splitlines()) < 30


def test_an_installed_third_party_plugin_is_listed_with_its_distribution(site):
    rows = listed(run("plugins", "--json", path=[site]))
    (row,) = [r for r in rows if r["name"] == "toy"]
    assert (row["distribution"], row["version"], row["module"]) == ("loratool-toy", "0.1.0", "loratool_toy")
    assert {h.strip() for h in row["hooks"].split(",")} == {"register_architectures", "register_commands"}


def test_its_family_is_known_and_its_command_runs(site):
    assert "toy" in {r["family"] for r in listed(run("arch", "list", "--json", path=[site]))}
    layers = listed(run("arch", "show", "toy", "--json", path=[site]))
    assert {r["layer"] for r in layers} == {"blocks.{i}.mix", "blocks.{i}.out"}
    hello = run("toy-hello", path=[site])
    assert (hello.returncode, hello.stdout) == (0, "hello from a plugin\n")
    assert "toy-hello" in run("--help", path=[site]).stdout


def test_without_it_neither_exists():
    assert "toy" not in {r["family"] for r in listed(run("arch", "list", "--json"))}
    assert run("toy-hello").returncode == 2


def toy_model(place):
    """A checkpoint and an adapter of the toy family; returns the folders and the weights that a merge must give."""
    generator = torch.Generator().manual_seed(0)
    base = {f"blocks.{i}.{m}.weight": torch.randn(8, 8, generator=generator) for i in (0, 1) for m in ("mix", "out")}
    factors, wanted = {}, dict(base)
    for name in [n for n in base if "mix" in n]:
        A, B = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
        module = "base_model.model." + name.removesuffix(".weight")
        factors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        wanted[name] = base[name] + 3 * B @ A
    for folder in ("base", "adapter"):
        (place / folder).mkdir()
    save_file(base, place / "base/model.safetensors")
    (place / "base/config.json").write_text('{"model_type": "toy"}')
    save_file(factors, place / "adapter/adapter_model.safetensors")
    (place / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    return place / "base", place / "adapter", wanted


def test_a_merge_works_on_its_family(site, tmp_path):
    base, adapter, wanted = toy_model(tmp_path)
    arguments = ["merge", base, adapter, "-o", tmp_path / "out", "-q"]
    without = run(*arguments)
    assert without.returncode == 3
    assert "toy" in without.stderr
    done = run(*arguments, path=[site])
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors"), wanted)


@pytest.mark.parametrize("front", [True, False], ids=["before the command", "after the command"])
def test_a_plugin_file_is_registered_for_one_call(front, tmp_path):
    base, adapter, wanted = toy_model(tmp_path)
    option = ["-p", TOY / "loratool_toy.py"]
    verb = ["merge", base, adapter, "-o", tmp_path / "out"]
    done = run(*option, *verb) if front else run(*verb, *option)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors"), wanted)
    assert run(*option, "toy-hello").stdout == "hello from a plugin\n"


@pytest.mark.parametrize(
    ("source", "code", "needle"),
    [
        (None, 2, "no such plugin file"),
        ("raise RuntimeError('out of order')", 7, "out of order"),
        ("def broken(:", 7, "SyntaxError"),
        (
            "from loratool import hookimpl\n@hookimpl\ndef register_architecture(): return []",
            7,
            "register_architecture",
        ),
        ("from loratool import hookimpl\n@hookimpl\ndef register_architectures(typo): return []", 7, "typo"),
        ("from loratool import hookimpl\n@hookimpl\ndef register_architectures(): return 5", 7, "list"),
        ("from loratool import hookimpl\n@hookimpl\ndef register_architectures(): return ['llama']", 7, "Architecture"),
        (
            "from loratool import hookimpl\n@hookimpl\ndef register_architectures(): return 1 / 0",
            7,
            "ZeroDivisionError",
        ),
        ("from loratool import hookimpl\n@hookimpl\ndef register_formats(): return [object()]", 0, ""),
    ],
)
def test_a_plugin_file_that_is_wrong_stops_with_its_name_and_the_reason(source, code, needle, tmp_path):
    path = tmp_path / "wrong.py"
    if source is not None:
        path.write_text(source)
    result = run("-p", path, "arch", "list")
    assert result.returncode == code, result.stderr
    if code:
        assert "wrong" in result.stderr.replace("\n", "")
        assert needle in result.stderr
        assert "Traceback" not in result.stderr


def test_every_command_takes_a_plugin_file():
    from loratool.cli.main import COMMANDS, cli

    commands = {name: cli.get_command(click.Context(cli), name) for name in COMMANDS}
    commands |= {f"arch {name}": command for name, command in commands["arch"].commands.items()}
    assert [name for name, command in commands.items() if "plugin" not in {p.name for p in command.params}] == []


def test_a_plugin_file_given_twice_counts_once():
    option = ["-p", TOY / "loratool_toy.py"]
    rows = listed(run(*option, *option, "arch", "list", *option, "--json"))
    assert [r["family"] for r in rows].count("toy") == 1


def test_one_module_under_two_entry_points_is_reported_and_counts_once(installs, tmp_path):
    place = installs("acme", one=family("one"))
    entries = place / "acme-1.0.dist-info/entry_points.txt"
    entries.write_text(entries.read_text() + "other = acme_one\n")
    plugins = load()
    assert [p.name for p in plugins.loaded if p.distribution == "acme"] == ["one"]
    (finding,) = plugins.findings
    assert "other" in finding.where
    assert plugins.architecture("one").find("blocks.0.w") is not None


def test_a_plugin_whose_commands_fail_is_named_and_the_help_still_works(tmp_path):
    (tmp_path / "bad.py").write_text(
        "from loratool import hookimpl\n@hookimpl\ndef register_commands(cli): raise KeyError('no luck')"
    )
    result = run("-p", tmp_path / "bad.py", "-p", TOY / "loratool_toy.py", "--help")
    assert result.returncode == 0
    assert "toy-hello" in result.stdout
    assert "bad" in result.stderr
    assert "no luck" in result.stderr
    assert run("-p", tmp_path / "bad.py", "-p", TOY / "loratool_toy.py", "toy-hello").stdout == "hello from a plugin\n"


def test_a_plugin_cannot_replace_a_built_in_command(tmp_path):
    (tmp_path / "bold.py").write_text(
        "import click\nfrom loratool import hookimpl\n@hookimpl\ndef register_commands(cli):\n"
        "    cli.add_command(click.Command('formats', callback=lambda: click.echo('mine')))"
    )
    result = run("-p", tmp_path / "bold.py", "formats", "--json")
    assert {r["format"] if "format" in r else r["name"] for r in listed(result)} >= {"kohya", "peft"}


def test_a_format_that_is_none_is_named(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("from loratool import hookimpl\n@hookimpl\ndef register_formats(): return [object()]")
    result = run("-p", path, "formats")
    assert result.returncode == 7
    assert "register_formats" in result.stderr


def test_a_broken_plugin_is_reported_by_name_and_the_others_work(installs):
    installs("acme", good=family("good"), broken="import no_such_module_anywhere")
    plugins = load()
    (finding,) = plugins.findings
    assert "broken" in finding.where
    assert "acme" in finding.where
    assert "no_such_module_anywhere" in finding.what
    names = {a.name for a in plugins.architectures()}
    assert {"good", "llama", "bert"} <= names


def test_a_misspelt_hook_is_reported_and_its_plugin_left_out(installs):
    installs("acme", good=family("good"), misspelt=family("bad").replace("register_architectures", "register_familys"))
    plugins = load()
    (finding,) = plugins.findings
    assert "misspelt" in finding.where
    assert "register_familys" in finding.what
    names = {a.name for a in plugins.architectures()}
    assert "good" in names
    assert "bad" not in names
    assert "misspelt" not in {p.name for p in plugins.loaded}


@pytest.mark.parametrize("value", ["5", "None", "['llama']", "(1, 2)"])
def test_a_hook_that_returns_something_else_is_left_out_by_name_and_the_rest_works(value, installs):
    installs("acme", odd=f"from loratool import hookimpl\n@hookimpl\ndef register_architectures(): return {value}")
    plugins = load()
    assert "llama" in {a.name for a in plugins.architectures()}
    (finding,) = plugins.findings
    assert "acme:odd" in finding.where
    assert "list of Architecture" in finding.what
    assert finding.hint


@pytest.mark.parametrize("value", ["5", "['llama']"])
def test_a_plugin_file_given_by_hand_must_work(value, tmp_path):
    source = f"from loratool import hookimpl\n@hookimpl\ndef register_architectures(): return {value}"
    (tmp_path / "odd.py").write_text(source)
    plugins = load()
    plugins.add_file(tmp_path / "odd.py")
    with pytest.raises(PluginError, match="odd"):
        plugins.architectures()


def test_a_family_that_contradicts_itself_is_left_out_by_name(installs):
    source = """
        from loratool import Architecture, Linear, Match, hookimpl

        @hookimpl
        def register_architectures():
            layers = (Linear("a.{i}.w"), Linear("a.{j}.(w|x)"))
            return [Architecture("twice", Match(), layers, ("w",))]
    """
    installs("acme", twice=source.replace("{j}", "{i}"))
    plugins = load()
    assert "twice" not in {a.name for a in plugins.architectures()}
    (finding,) = plugins.findings
    assert finding.where == "plugin twice"
    assert "a.{i}.w" in finding.what


@pytest.mark.parametrize(("like", "what"), [("nobody", "'nobody', which is not loaded"), ("odd", "like itself")])
def test_a_family_that_is_like_none_is_left_out_by_name(like, what, installs):
    source = f"""
        from loratool import Architecture, hookimpl

        @hookimpl
        def register_architectures():
            return [Architecture("odd", like={like!r})]
    """
    installs("acme", odd=source)
    plugins = load()
    assert "odd" not in {a.name for a in plugins.architectures()}
    assert [what in f.what for f in plugins.findings] == [True]


def test_families_that_are_like_a_built_in_stay_so_when_a_third_party_replaces_that(installs):
    installs("zzz", llama=family("llama", "mine.{i}.w"))
    plugins = load()
    assert plugins.architecture("mistral").find("model.layers.0.self_attn.q_proj") is not None
    assert plugins.architecture("mistral").find("mine.0.w") is None


def test_a_third_party_replaces_a_built_in_family_and_that_is_said(installs):
    installs("zzz", llama=family("llama", "mine.{i}.w"))
    plugins = load()
    assert plugins.architecture("llama").find("mine.0.w") is not None
    assert plugins.architecture("llama").find("model.layers.0.self_attn.q_proj") is None
    assert [(f.where, "zzz" in f.what) for f in plugins.findings] == [("llama", True)]


def test_it_replaces_it_whichever_of_the_two_is_loaded_first(installs):
    installs("aaa", gpt2=family("gpt2", "mine.{i}.w"))
    plugins = load()
    assert plugins.architecture("gpt2").find("mine.0.w") is not None
    assert [(f.where, "aaa" in f.what) for f in plugins.findings] == [("gpt2", True)]


def test_a_plugin_file_replaces_a_built_in_too(tmp_path):
    (tmp_path / "mine.py").write_text(textwrap.dedent(family("llama", "mine.{i}.w")))
    plugins = load()
    plugins.add_file(tmp_path / "mine.py")
    assert plugins.architecture("llama").find("mine.0.w") is not None
    assert any(f.where == "llama" for f in plugins.findings)


def test_two_third_parties_with_one_name_are_an_error_that_names_both(installs):
    installs("acme", toy=family("toy"))
    installs("zenith", toy=family("toy"))
    plugins = load()
    assert "toy" not in {a.name for a in plugins.architectures()}
    assert [("acme" in f.what, "zenith" in f.what) for f in plugins.findings] == [(True, True)]
    with pytest.raises(PluginError, match=r"acme.*zenith"):
        plugins.architecture("toy")


def test_loading_can_be_restricted_to_names(installs):
    installs("acme", one=family("one"), two=family("two"))
    plugins = load("one,bert")
    assert {a.name for a in plugins.architectures()} == {"one", "bert"}
    assert load("").architectures() == ()


def test_the_environment_restricts_loading_and_a_missing_name_is_said(site):
    rows = listed(run("arch", "list", "--json", path=[site], LORATOOL_PLUGINS="toy,llama"))
    assert {r["family"] for r in rows} == {"toy", "llama"}
    result = run("plugins", "--json", LORATOOL_PLUGINS="llama,nonesuch")
    assert [r["name"] for r in listed(result)] == ["llama"]
    assert "nonesuch" in result.stderr


def test_a_broken_plugin_does_not_stop_a_command_and_is_said(tmp_path):
    place = distribution(tmp_path / "site", "acme", {"broken": "import no_such_module_anywhere"})
    result = run("plugins", path=[place])
    assert result.returncode == 0
    assert "broken" in result.stderr
    assert "no_such_module_anywhere" in result.stderr


def test_the_metadata_of_a_distribution_is_parsed_once_however_many_plugins_it_has(installs, monkeypatch):
    """It is parsed whenever it is asked, which took most of the time of `arch list`."""
    installs("acme", **{f"toy{n}": family(f"toy{n}") for n in range(5)})
    read = importlib.metadata.PathDistribution.read_text
    parsed = []

    def counted(distribution, filename):
        if filename == "METADATA":
            parsed.append(str(distribution._path))
        return read(distribution, filename)

    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", counted)
    plugins = load()
    assert {p.distribution for p in plugins.loaded} >= {"acme", "loratool"}
    assert {p.version for p in plugins.loaded if p.distribution == "acme"} == {"1.0"}
    of_plugins = [p for p in parsed if "acme" in p or "loratool" in p]
    assert len(of_plugins) == len(set(of_plugins)) >= 2


def test_the_built_in_families_would_pass_what_is_asked_of_others():
    for one in load(",".join(entry_points_of_the_project())).architectures():
        one.validate_types()
        one.validate()


def test_an_unknown_family_or_format_lists_what_there_is():
    plugins = load("llama")
    with pytest.raises(UsageError) as caught:
        plugins.architecture("lama")
    assert "llama" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        plugins.format("pefd")
    assert "peft" in caught.value.hint


def test_a_plugin_can_bring_a_format(installs, tmp_path):
    source = """
        from loratool import Adapter, Origin, hookimpl

        class Mine:
            name, summary, single_file = "mine", "my own", True

            def detect(self, source):
                return "mine" in source.tensors

            def read(self, source, architectures):
                return Adapter({}, Origin("mine", source.path), consumed=("mine",), tensors=source.tensors)

            def write(self, adapter, architecture, options):
                raise NotImplementedError

        @hookimpl
        def register_formats():
            return [Mine()]
    """
    installs("acme", mine=source)
    plugins = load()
    assert {f.name for f in plugins.formats()} >= {"kohya", "mine", "peft"}
    save_file({"mine": torch.ones(3)}, tmp_path / "x.safetensors")
    assert loratool.inspect(tmp_path / "x.safetensors", plugins=plugins).totals["format"] == "mine"
