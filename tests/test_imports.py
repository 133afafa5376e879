"""Light paths stay light: no torch, transformers or huggingface_hub for what needs no tensors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "huggingface_hub", "peft", "diffusers", "numpy", "accelerate")
SCRIPT = f"""
import sys
sys.argv = ["loratool", *sys.argv[1:]]
from loratool.cli.main import main
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
finally:
    heavy = sorted(m for m in {HEAVY!r} if m in sys.modules)
    print("HEAVY", heavy, file=sys.stderr)
"""


def heavy_modules(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("HEAVY"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("adapter")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(2, 8), f"{name}B.weight": torch.ones(8, 2)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


def test_importing_loratool_is_light():
    code = f"import sys, loratool; print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    assert heavy_modules(code) == "HEAVY []"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("merge", "--help"),
        ("arch", "list"),
        ("arch", "show", "llama"),
        ("formats",),
        ("methods",),
        ("plugins",),
    ],
    ids=" ".join,
)
def test_commands_about_the_installation_are_light(arguments):
    assert heavy_modules(SCRIPT, *arguments) == "HEAVY []"


def test_a_header_only_inspect_is_light(adapter):
    assert heavy_modules(SCRIPT, "inspect", adapter) == "HEAVY []"


def test_dry_runs_are_light(adapter, tmp_path):
    assert heavy_modules(SCRIPT, "resize", adapter, "-o", tmp_path / "out", "--rank", 1, "-n") == "HEAVY []"


def test_a_combine_dry_run_is_light(adapter, tmp_path):
    arguments = ("combine", adapter, adapter, "-o", tmp_path / "out", "--method", "ties_svd", "-n")
    assert heavy_modules(SCRIPT, *arguments) == "HEAVY []"


def test_dry_runs_of_merge_and_init_are_light(adapter, tmp_path):
    import torch
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert heavy_modules(SCRIPT, "merge", base, adapter, "-o", tmp_path / "out", "-n") == "HEAVY []"
    start = ("--init", "pissa", "--residual", tmp_path / "rest")
    assert heavy_modules(SCRIPT, "init", base, "-o", tmp_path / "out", *start, "-n") == "HEAVY []"


def test_a_conversion_that_only_renames_is_light(adapter, tmp_path):
    out = tmp_path / "out.safetensors"
    # the self-check reads the file back with the safetensors library, which imports numpy
    assert heavy_modules(SCRIPT, "convert", adapter, "-o", out, "--to", "kohya") in ("HEAVY []", "HEAVY ['numpy']")
    assert out.is_file()
