"""The same verbs on a GPU: equal to the CPU's results within the rounding. On a real one where there is one.

Everywhere else on a make-believe one (tests/accelerator.py), which refuses what a GPU refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator import Accelerator, accelerator
from safetensors.torch import load_file
from tiny_files import HIDDEN, INNER, KV, factors, snapshot, tensors_of_llama, write_adapter, write_base

import loratool
from loratool.algebra import batched
from loratool.engine import Resources
from loratool.storage.load import Loader
from loratool.storage.safetensors import read_header

REAL = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
SHAPES = {
    f"model.layers.{n}.{m}": shape
    for n in range(2)
    for m, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }.items()
}


@pytest.fixture(params=["make-believe", REAL])
def gpu(request: pytest.FixtureRequest) -> Iterator[Accelerator | None]:
    """The make-believe one, or None where it is real; `Resources("cuda")` is it."""
    if request.param == "cuda":
        yield None
    else:
        with accelerator() as device:
            yield device
            assert device.calls, "nothing was done on it"
            assert device.held == 0


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", tensors_of_llama(dtype=torch.bfloat16))


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    return write_adapter(folder, {k: v.to(dtype) for k, v in factors(rank=5, shapes=SHAPES).items()}, r=5)


def dora(folder: Path) -> Path:
    tensors = factors(rank=5, shapes=SHAPES)
    for module, (out, _) in SHAPES.items():
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = torch.rand(out) + 0.5
    return write_adapter(folder, tensors, r=5, use_dora=True)


ADAPTERS = {"lora": plain, "bf16 lora": lambda folder: plain(folder, torch.bfloat16), "dora": dora}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """The products of an adapter's factors, in fp64."""
    tensors = {k: v.double() for k, v in weights(folder).items()}
    return {k: up @ tensors[k.replace("lora_B", "lora_A")] for k, up in tensors.items() if "lora_B" in k}


def best(update: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(update.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merge_agrees_with_the_cpu_to_one_rounding(kind: str, gpu: Any, base: Path, tmp_path: Path) -> None:
    adapter = ADAPTERS[kind](tmp_path / "adapter")
    for device in ("cpu", "cuda"):
        loratool.merge(base, [adapter], tmp_path / device, dtype="float32", resources=Resources(device))
    on_cpu, on_gpu = weights(tmp_path / "cpu"), weights(tmp_path / "cuda")
    assert on_cpu.keys() == on_gpu.keys()
    for name, weight in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], weight)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_resize_gives_the_best_of_a_rank_in_batches(kind, gpu, tmp_path, monkeypatch) -> None:
    adapter = ADAPTERS[kind](tmp_path / "adapter")
    together: list[int] = []
    one = batched.compress
    monkeypatch.setattr(batched, "compress", lambda ups, *rest: together.append(len(ups)) or one(ups, *rest))
    loratool.resize(adapter, tmp_path / "out", rank=3, resources=Resources("cuda"))
    assert sorted(together) == [2, 2, 4]
    found = updates(tmp_path / "out")
    scaling = 8 / 5
    for name, update in updates(adapter).items():
        error = float((found[name] - best(scaling * update, 3)).norm() / update.norm())
        assert error < (1e-2 if kind == "bf16 lora" else 1e-5)


@pytest.mark.parametrize("quality", ["balanced", "exact"])
@pytest.mark.parametrize("memory", [2 << 30, 1])  # the second: in panels
def test_extract_gives_the_best_of_a_rank(quality: str, memory: int, gpu: Any, tmp_path: Path) -> None:
    (one, two), side = (tensors_of_llama(seed, dtype=torch.bfloat16, layers=1) for seed in (0, 1)), 260
    generator = torch.Generator().manual_seed(2)
    name = "model.layers.0.self_attn.q_proj.weight"
    left, right = torch.randn(side, 6, generator=generator), torch.randn(6, side, generator=generator)
    one[name] = torch.randn(side, side, generator=generator)
    two = {**one, name: one[name] + left @ right}  # large enough for the block Krylov basis
    three = "model.layers.0.mlp.down_proj.weight"
    two[three] = two[three] + 0.1
    tuned, base = write_base(tmp_path / "tuned", two), write_base(tmp_path / "base", one)
    options: Any = {"quality": quality, "rank": 4, "resources": Resources("cuda", memory=memory)}
    report = loratool.extract(tuned, base, tmp_path / "out", **options)
    assert report.totals["changed"] == 2
    for key, found in updates(tmp_path / "out").items():
        module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        difference = two[f"{module}.weight"].double() - one[f"{module}.weight"].double()
        optimum = float((difference - best(difference, 4)).norm())
        error = float((difference - found).norm())
        assert error <= 1.005 * optimum + 1e-5 * float(difference.norm())


@pytest.mark.parametrize("verb", ["resize", "extract", "merge"])
def test_the_same_bytes_with_any_number_of_workers(verb: str, gpu: Any, base: Path, tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter")
    loratool.merge(base, [adapter], tmp_path / "tuned", dtype="float32", resources=Resources("cpu"))
    arguments: Any = {
        "resize": (loratool.resize, (adapter,), {"rank": 2}),
        "extract": (loratool.extract, (tmp_path / "tuned", base), {"rank": 2}),
        "merge": (loratool.merge, (base, [adapter]), {}),
    }
    call, sources, options = arguments[verb]
    for workers in (1, 4):
        call(*sources, tmp_path / str(workers), **options, resources=Resources("cuda", workers))
    one, four = (
        {k: v for k, v in snapshot(tmp_path / n).items() if k.endswith((".safetensors", "_config.json"))}
        for n in ("1", "4")
    )
    assert one == four


def test_of_a_full_gpu_every_piece_ends_on_the_cpu(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = plain(tmp_path / "adapter")
    load = Loader.__call__

    def full(self: Loader, *arguments: Any) -> torch.Tensor:
        found = load(self, *arguments)
        if not found.is_cpu:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(Loader, "__call__", full)
    report = loratool.resize(adapter, tmp_path / "out", rank=3, resources=Resources("cuda"))
    (finding,) = report.findings
    assert "8 of 8 pieces were done on the CPU" in finding.what
    for name, update in updates(adapter).items():
        torch.testing.assert_close(updates(tmp_path / "out")[name], best(8 / 5 * update, 3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("verb", ["resize", "extract"])
def test_with_ever_less_memory_the_result_stays(verb: str, base: Path, tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter")
    loratool.merge(base, [adapter], tmp_path / "tuned", dtype="float32", resources=Resources("cpu"))
    sources = (adapter,) if verb == "resize" else (tmp_path / "tuned", base)
    said: Counter[str] = Counter()
    for memory in (1e9, 16_000, 12_000, 8_000, 4_000, 100):
        with accelerator(memory) as device:
            out = tmp_path / f"out {memory}"
            report = getattr(loratool, verb)(*sources, out, rank=3, resources=Resources("cuda", 2))
        assert device.peak <= memory
        assert bool(device.refusals) == bool(report.findings)
        said.update(word for f in report.findings for word in ("smaller batches", "on the CPU") if word in f.what)
        for name, update in updates(adapter).items():
            torch.testing.assert_close(updates(out)[name], best(8 / 5 * update, 3), rtol=1e-3, atol=1e-5)
    assert said["on the CPU"]
    assert said["smaller batches"] or verb == "extract"


@pytest.mark.parametrize("device", [REAL])
def test_what_arrives_is_what_the_file_holds(device: str, tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(1000 + n, 257) for n in range(40)}
    folder = write_base(tmp_path / "base", tensors)
    with Loader(device) as load:  # faster than pinned memory is copied: none may be used again too early
        arrived = {ref.name: load(ref) for ref in read_header(str(folder / "model.safetensors")).tensors}
        for name, tensor in tensors.items():
            assert torch.equal(arrived[name].cpu(), tensor)
