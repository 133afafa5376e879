"""Units that are alike, done together: how batches are composed, that results stay, and what happens if memory ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_files import factors, snapshot, write_adapter

import loratool
from loratool import engine
from loratool.algebra import batched, lowrank
from loratool.engine import Resources
from loratool.plan import Facts, batches
from loratool.storage.load import Loader
from loratool.tensors import Span, TensorRef

TOGETHER = Resources("cpu", 2, batches=True)


@dataclass(frozen=True)
class Counted:
    """A unit that says in how large a batch it was done; batches above `most` do not fit, and 0 only fits the CPU."""

    key: str
    alike: int | None = 0
    scratch: int = 1
    most: int = 64
    reads: tuple[TensorRef, ...] = ()
    outs: tuple[Any, ...] = ()

    def run(self, load: Any, emit: Any) -> Facts:
        if not self.most and not load(TensorRef("t", (0,), "F32")).is_cpu:
            raise torch.OutOfMemoryError
        return {"together": 1}

    def run_together(self, units: Any, load: Any, emit: Any) -> list[Facts]:
        if len(units) > self.most:
            raise torch.OutOfMemoryError
        return [{"together": len(units)} for _ in units]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, 1, 2]), st.integers(0, 60)), max_size=40), st.integers(0, 500))
def test_batches_hold_what_is_alike_and_fits(kinds: list[tuple[int | None, int]], memory: int) -> None:
    units = [Counted(str(n), alike, scratch) for n, (alike, scratch) in enumerate(kinds)]
    found: list[Any] = batches(units, memory)
    assert sorted((u for batch in found for u in batch), key=lambda u: int(u.key)) == units
    assert [int(batch[0].key) for batch in found] == sorted(int(batch[0].key) for batch in found)
    for batch in found:
        assert len({u.alike for u in batch}) == 1
        assert len(batch) == 1 or (batch[0].alike is not None and 4 * sum(u.scratch for u in batch) <= memory)


def test_on_a_cpu_every_unit_is_done_alone() -> None:
    units = [Counted(str(n)) for n in range(9)]
    assert engine.run(units, Resources("cpu"), None, None) == {u.key: {"together": 1} for u in units}
    assert engine.run(units, TOGETHER, None, None) == {u.key: {"together": 9} for u in units}


def test_a_batch_that_was_interrupted_is_done_again_as_a_whole() -> None:
    units = [Counted(str(n), n % 2) for n in range(10)]
    done = {u.key: {"together": 0} for u in units if u.alike} | {"0": {"together": 0}}
    recorded: dict[str, Facts] = {}
    stage: Any = SimpleNamespace(done=done, record=recorded.__setitem__)
    facts = engine.run(units, TOGETHER, stage, None)
    assert facts == {u.key: {"together": 0 if u.alike else 5} for u in units}
    assert recorded == {u.key: {"together": 5} for u in units if not u.alike}


def test_what_does_not_fit_is_halved_until_it_does() -> None:
    units = [Counted(str(n), most=3) for n in range(10)]
    facts = engine.run(units, TOGETHER, None, None)
    assert [f["together"] for f in facts.values()] == 2 * [2, 2, 3, 3, 3]
    assert {f["short_of_memory"] for f in facts.values()} == {"in smaller batches"}


# ---- resize


SHAPES = {f"model.layers.{n}.{m}": s for n in range(4) for m, s in {"a": (16, 24), "b": (24, 16), "c": (3, 16)}.items()}


def adapter_of(folder: Path, dtype: torch.dtype) -> Path:
    """Twelve modules of three shapes; one is singular, one zero, and one kind has more ranks than rows."""
    tensors = factors(rank=5, shapes=SHAPES)
    tensors["base_model.model.model.layers.1.a.lora_B.weight"][:, 3] = 0.0
    tensors["base_model.model.model.layers.2.b.lora_A.weight"][1] = tensors[
        "base_model.model.model.layers.2.b.lora_A.weight"
    ][0]
    tensors["base_model.model.model.layers.3.a.lora_B.weight"].zero_()
    return write_adapter(folder, {k: v.to(dtype) for k, v in tensors.items()}, r=5, lora_alpha=5)


def products(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    ups = {k: t.double() for k, t in tensors.items() if ".lora_B." in k}
    return {k: up @ tensors[k.replace(".lora_B.", ".lora_A.")].double() for k, up in ups.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.8}])
def test_batches_are_the_best_of_their_rank_and_say_what_units_say(tmp_path, rule, dtype, monkeypatch) -> None:
    adapter = adapter_of(tmp_path / "adapter", dtype)
    together: list[int] = []
    one = batched.compress
    monkeypatch.setattr(batched, "compress", lambda ups, *rest: together.append(len(ups)) or one(ups, *rest))
    alone = loratool.resize(adapter, tmp_path / "alone", resources=Resources("cpu"), **rule)
    assert not together
    report = loratool.resize(adapter, tmp_path / "together", resources=TOGETHER, **rule)
    assert sorted(together) == [4, 4, 4]
    assert [row["rank"] for row in report.rows] == [row["rank"] for row in alone.rows]
    assert report.totals["error"] == pytest.approx(alone.totals["error"], rel=1e-9)
    found, originals = products(tmp_path / "together"), products(adapter)
    for row, (name, original) in zip(
        sorted(report.rows, key=lambda r: r["module"]), sorted(originals.items()), strict=True
    ):
        assert row["module"] in name
        U, S, Vh = torch.linalg.svd(original)
        best = (U[:, : row["rank"]] * S[: row["rank"]]) @ Vh[: row["rank"]]
        assert float((found[name] - best).norm()) <= (1e-6 if dtype == torch.float32 else 2e-2) * float(original.norm())


@pytest.mark.parametrize("memory", [2 << 30, 100_000])
def test_batches_are_the_same_bytes_with_any_number_of_workers(tmp_path: Path, memory: int) -> None:
    adapter = adapter_of(tmp_path / "adapter", torch.float32)
    for n in (1, 2, 5):
        loratool.resize(adapter, tmp_path / str(n), rank=2, resources=Resources("cpu", n, memory, batches=True))
    files = [{k: v for k, v in snapshot(tmp_path / str(n)).items() if "report" not in k} for n in (1, 2, 5)]
    assert files[0] == files[1] == files[2]


def test_of_nan_the_module_is_named_and_the_rest_of_the_batch_is_not(tmp_path: Path) -> None:
    tensors = factors(rank=5, shapes=SHAPES)
    tensors["base_model.model.model.layers.2.a.lora_B.weight"][0, 0] = float("nan")
    adapter = write_adapter(tmp_path / "adapter", tensors, r=5)
    with pytest.raises(loratool.errors.InputError, match=r"layers\.2\.a"):
        loratool.resize(adapter, tmp_path / "out", rank=2, resources=TOGETHER)


def test_stacked_products_are_decomposed_like_single_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    ups, downs = torch.randn(6, 40, 7, generator=generator), torch.randn(6, 7, 30, generator=generator)
    ups[1, :, 3], downs[2, 1], ups[3] = 0.0, downs[2, 0], 1e-7 * ups[3]
    ups[4, :, 6] = ups[4, :, 5] * (1 + 1e-9)
    for up, down, svd in zip(ups, downs, batched.compress(ups, downs), strict=True):
        product = up.double() @ down.double()
        exact = torch.linalg.svdvals(product)[:7]
        torch.testing.assert_close(svd.sigma[:7], exact, rtol=1e-9, atol=1e-13 * float(exact[0]))
        torch.testing.assert_close((svd.left * svd.sigma[: svd.left.shape[1]]) @ svd.right, product)
        for side in (svd.left.T @ svd.left, svd.right @ svd.right.T):
            torch.testing.assert_close(side, torch.eye(len(side), dtype=torch.float64))


@pytest.mark.parametrize(("fitting", "said"), [(1, "12 of 12 pieces were done in smaller batches"), (0, "on the CPU")])
def test_without_enough_memory_the_result_is_the_same_and_the_report_says_so(
    tmp_path, fitting, said, monkeypatch
) -> None:
    adapter = adapter_of(tmp_path / "adapter", torch.float32)
    loratool.resize(adapter, tmp_path / "enough", rank=2, resources=Resources("cpu"))
    first: set[str] = set()
    compress = lowrank.compress

    def full(ups: Any, *rest: Any) -> Any:
        raise torch.OutOfMemoryError

    def once(up: torch.Tensor, *rest: Any) -> Any:  # the second time it is the CPU's turn
        key = str(float(up.double().sum()))
        if not fitting and key not in first:
            first.add(key)
            raise torch.OutOfMemoryError
        return compress(up, *rest)

    monkeypatch.setattr(batched, "compress", full)
    monkeypatch.setattr(lowrank, "compress", once)
    report = loratool.resize(adapter, tmp_path / "short", rank=2, resources=TOGETHER)
    (finding,) = report.findings
    assert finding.level == "warning"
    assert said in finding.what
    for name, product in products(tmp_path / "enough").items():
        torch.testing.assert_close(products(tmp_path / "short")[name], product)


def test_what_a_gpu_gets_is_read_into_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(12.0)
    (tmp_path / "raw").write_bytes(values.numpy().tobytes())
    ref = TensorRef("t", (3, 4), "F32", (Span(str(tmp_path / "raw"), 0, 48),))
    pinned, moves, empty = [], [], torch.empty

    def allocate(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: moves.append((device.type, how)) or self)
    with Loader("cuda:1") as load:
        assert torch.equal(load(ref, into=empty(3, 4)), values.reshape(3, 4))
    assert pinned == [True]
    assert moves == [("cuda", {"non_blocking": True})]
