"""The same verbs on a GPU: equal to the CPU's results within the rounding. Skipped where there is none."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import write_adapter, write_base

import loratool
from loratool.engine import Resources

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def files(tmp_path):
    return write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")


def weights(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def run(verb, *arguments, device, **options):
    return getattr(loratool, verb)(*arguments, resources=Resources(device=device), **options)


def test_merge_agrees_with_the_cpu_to_one_rounding(files, tmp_path):
    base, adapter = files
    for device in ("cpu", "cuda"):
        run("merge", base, [adapter], tmp_path / device, device=device)
    on_cpu, on_gpu = weights(tmp_path / "cpu"), weights(tmp_path / "cuda")
    for name, weight in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], weight)


def test_resize_and_extract_report_the_same_errors(files, tmp_path):
    base, adapter = files
    run("merge", base, [adapter], tmp_path / "tuned", device="cpu")
    for verb, arguments in (("resize", (adapter,)), ("extract", (tmp_path / "tuned", base))):
        totals = [
            run(verb, *arguments, tmp_path / f"{verb}-{device}", rank=1, device=device).totals["retained"]
            for device in ("cpu", "cuda")
        ]
        assert totals[0] == pytest.approx(totals[1], rel=1e-4)
