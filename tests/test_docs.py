"""The documentation cannot drift: generated help is current, and what the README says is run."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest_plugins = ["hub_fixtures"]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    every = re.findall(r"^```([^\n]*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [block for name, block in every if name == language]


def test_the_command_reference_is_what_the_commands_say():
    generated = runpy.run_path(str(ROOT / "docs/generate.py"))["page"]()
    assert generated == (ROOT / "docs/commands.md").read_text(), "run: python docs/generate.py"


def commands_in(page: str, language: str = "") -> list[str]:
    lines = [line for block in blocks(page, language) for line in block.splitlines()]
    return [line for line in lines if line.startswith("loratool ")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "demo-output"
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "demo", "-o", "demo-output", "--json"],
        cwd=folder.parent,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder


def run(command: str, folder: Path) -> str:
    words = shlex.split(command, comments=True)
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_the_readme_shows_the_true_output(demo):
    example = next(block for block in blocks("README.md", "") if block.startswith("$ "))
    command, _, shown = example.partition("\n")

    def lines(text: str) -> list[str]:  # less the two that depend on where the demo ran
        return [
            line.rstrip()
            for line in text.splitlines()
            if line.strip() and not line.startswith(("base model", "file bytes"))
        ]

    assert lines(run(command.removeprefix("$ "), demo)) == lines(shown)


def test_the_commands_of_the_readme_work_in_the_order_of_the_page(demo):
    commands = commands_in("README.md")
    assert len(commands) >= 8
    for command in commands:
        run(command, demo)


def test_the_commands_of_the_page_on_new_adapters_work(demo):
    for command in commands_in("docs/init.md"):
        run(command, demo)


def test_the_hub_commands_of_the_readme_work(demo, hub):
    hub.create("org/base", demo / "base")
    hub.create("org/adapter", demo / "lora")
    for command in commands_in("README.md", "sh"):
        run(command, demo)
    assert "model.safetensors" in hub.files("me/merged")
    assert "adapter_model.safetensors" in hub.files("me/lora", "refs/pr/1")


def test_the_python_of_the_readme_works(demo):
    for block in blocks("README.md", "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=demo, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_family_of_the_plugin_guide_works_and_is_short(tmp_path):
    source = blocks("docs/plugins.md", "python")[0]
    assert len(source.splitlines()) < 30
    (tmp_path / "toy.py").write_text(source)
    assert "model.blocks.{i}.attn.query" in run("loratool -p toy.py arch show toy", tmp_path)


def test_the_page_on_combining_shows_what_its_commands_print(tmp_path):
    shown = (ROOT / "docs/combine.md").read_text()
    printed = runpy.run_path(str(ROOT / "docs/generate.py"))["worked"](shown, tmp_path)

    def words(text: str) -> list[str | float]:
        """Words and numbers; bars and what a machine rounds in its own way are left out."""
        found: list[str | float] = []
        for word in re.sub(r"[▁▂▃▄▅▆▇█─]+", "", text).replace(",", " ").split():
            try:
                found.append(float(word))
            except ValueError:
                found.append(word)
        return found

    assert len(printed.splitlines()) == len(shown.splitlines()), "run: python docs/generate.py"
    for before, now in zip(shown.splitlines(), printed.splitlines(), strict=True):
        wanted = [pytest.approx(w, rel=0.02, abs=1e-6) if isinstance(w, float) else w for w in words(before)]
        assert words(now) == wanted


def test_links_between_pages_lead_somewhere():
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
    ):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
