"""Methods of combining as plugins: what a signature declares, a third-party distribution, and broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import SHAPES, factors, write_adapter

import loratool
from loratool import Bounds, method
from loratool.errors import PluginError, UsageError
from loratool.plugins import load

EXAMPLE = Path(__file__).parents[2] / "docs/examples/loratool-methods"
PEFTS = {"ties", "dare_linear", "dare_ties", "ties_svd", "dare_linear_svd", "dare_ties_svd"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with loratool-methods installed, as pip installs it for a user."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-build-isolation", "--no-deps", "--target", str(place), str(EXAMPLE)]
    subprocess.run(command, check=True, capture_output=True)
    return place


def run(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratool", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_the_built_in_methods_are_listed_with_their_options() -> None:
    methods = {m.name: m for m in load("").methods()}
    assert PEFTS | {"cat", "svd", "linear", "peft_linear_factors", "slerp", "average", "ema", "knots"} == set(methods)
    assert all(m.summary.endswith(".") for m in methods.values())
    density = methods["ties_svd"].options["density"]
    assert (density.kind, density.default, density.bounds) == (float, 0.5, Bounds(0, 1, True))
    assert methods["ties_svd"].options["sign"].choices == ("total", "frequency")
    assert {n for n, m in methods.items() if m.space == "dense"} == {n for n in PEFTS if n.endswith("svd")}


def test_a_third_partys_methods_are_listed_and_used(site: Path, tmp_path: Path) -> None:
    listed = {row["method"]: row for row in json.loads(run(site, "methods", "--json").stdout)}
    assert {"della", "iso_c", "cat"} <= set(listed)
    assert set(listed["della"]["options"]) == {"density", "epsilon", "seed"}
    folders = [write_adapter(tmp_path / str(s), factors(s)) for s in (1, 2)]
    done = run(site, "combine", *folders, "-o", tmp_path / "iso", "--method", "iso_c", "-w", 1, "-w", 0.5, "-q")
    assert done.returncode == 0, done.stderr
    inputs = [load_file(f / "adapter_model.safetensors") for f in folders]
    result = load_file(tmp_path / "iso/adapter_model.safetensors")
    for module in SHAPES:
        a, b = (f"base_model.model.{module}.lora_{half}.weight" for half in "AB")
        total = sum(w * 2.0 * t[b].double() @ t[a].double() for w, t in zip((1, 0.5), inputs, strict=True))
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        rank = min(8, *total.shape)
        torch.testing.assert_close(
            result[b].double() @ result[a].double(), S[:rank].mean() * U[:, :rank] @ Vh[:rank], rtol=1e-4, atol=1e-7
        )
    options = ["--method", "della", "-O", "density=0.6", "-O", "seed=3"]
    for out in ("x", "y"):
        done = run(site, "combine", *folders, "-o", tmp_path / out, *options, "-q")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "x/adapter_model.safetensors").read_bytes() == (
        tmp_path / "y/adapter_model.safetensors"
    ).read_bytes()
    done = run(site, "combine", *folders, "-o", tmp_path / "z", "--method", "della", "-O", "densty=0.6")
    assert done.returncode == 2
    assert "density" in done.stderr


def test_every_entry_dropped_by_magnitude_is_as_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """DELLA keeps an entry by its place in its row, and divides by that probability: the mean is the delta."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from loratool_methods import della

    delta = torch.tensor([[1.0, -2.0, 3.0, -4.0]]).repeat(20_000, 1)
    thin = della([loratool.Matrix(1.0, 1, delta)], density=0.5, epsilon=0.3, seed=1)
    kept = (thin != 0).float().mean(0)
    torch.testing.assert_close(kept, torch.tensor([0.2, 0.4, 0.6, 0.8]), rtol=0, atol=0.02)
    torch.testing.assert_close(thin.mean(0), delta[0], rtol=0.05, atol=0)


def test_types_of_options() -> None:
    @method("weights")
    def mine(
        shares: Any,
        *,
        count: int = 3,
        share: Annotated[float | None, "a share", Bounds(0, 1)] = None,
        flag: bool = False,
        word: Literal["a", "b"] = "a",
    ) -> list[float]:
        """Say something."""
        return [count, share, flag, word, *shares]

    # the annotations of a local function are texts that its module's names explain
    bound = mine.bind({"count": "4", "share": "0.25", "flag": "yes", "word": "b"})
    assert bound == {"count": 4, "share": 0.25, "flag": True, "word": "b"}
    assert mine.bind({}) == {"count": 3, "share": None, "flag": False, "word": "a"}
    for bad in ({"count": "4.5"}, {"share": "2"}, {"share": "nan"}, {"flag": "maybe"}, {"word": "c"}, {"cuont": 1}):
        with pytest.raises(UsageError):
            mine.bind(bad)


BROKEN = {
    "an option without a default": "@method('weights')\ndef bad(shares, *, x: int):\n    'Do.'",
    "an option without a type": "@method('weights')\ndef bad(shares, *, x=1):\n    'Do.'",
    "an option of a strange type": "@method('weights')\ndef bad(shares, *, x: list = ()):\n    'Do.'",
    "a space that is none": "@method('dence')\ndef bad(shares):\n    'Do.'",
    "no docstring": "@method('weights')\ndef bad(shares):\n    return []",
    "a function, not a method": "def bad(shares):\n    'Do.'",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_method_is_named(case: str, tmp_path: Path) -> None:
    source = "from loratool import hookimpl, method\n" + BROKEN[case]
    (tmp_path / "mine.py").write_text(f"{source}\n\n@hookimpl\ndef register_methods():\n    return [bad]\n")
    plugins = load("")
    plugins.add_file(tmp_path / "mine.py")
    with pytest.raises(PluginError):
        plugins.methods()


def test_a_plugins_method_takes_the_place_of_a_built_in_one_and_that_is_said(tmp_path: Path) -> None:
    source = (
        "from loratool import hookimpl, method\n@method('weights')\ndef cat(shares):\n    'Mine.'\n    return [2.0]"
    )
    (tmp_path / "mine.py").write_text(f"{source}\n\n@hookimpl\ndef register_methods():\n    return [cat]\n")
    plugins = load("")
    plugins.add_file(tmp_path / "mine.py")
    assert plugins.method("cat").summary == "Mine."
    assert any("replaces the built-in" in f.what for f in plugins.findings)
    folders = [write_adapter(tmp_path / str(s), factors(s)) for s in (1, 2)]
    with pytest.raises(UsageError, match="1 coefficients for 2 adapters"):
        loratool.combine(folders, tmp_path / "out", plugins=plugins)
    with pytest.raises(UsageError, match="no method is called 'cta'") as caught:
        plugins.method("cta")
    assert "did you mean cat" in caught.value.hint
