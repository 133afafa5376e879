"""How units run: memory admission, order, errors, and the same bytes whatever the number of workers."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_files import factors, snapshot, tensors_of_llama, write_adapter, write_base, write_sharded

import loratool
from loratool import engine
from loratool.engine import Resources
from loratool.errors import InputError, LoratoolError, StorageError, UsageError
from loratool.plan import CopiedFile, Facts, JsonFile, OutFile, Plan, Report, Settled
from loratool.tensors import TensorRef


@dataclass
class Watch:
    """What units that share it saw of each other."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    running: dict[str, int] = field(default_factory=dict)
    seen: list[dict[str, int]] = field(default_factory=list)
    started: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sleeper:
    """A unit that holds `scratch` bytes for a moment."""

    key: str
    scratch: int
    watch: Watch
    fails: bool = False
    work: int = 1
    outs: tuple[Any, ...] = ()

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        return (TensorRef("bytes", (self.work,), "U8"),)

    def run(self, load: Any, emit: Any) -> Facts:
        with self.watch.lock:
            self.watch.running[self.key] = self.scratch
            self.watch.started.append(self.key)
            self.watch.seen.append(dict(self.watch.running))
        time.sleep(0.002)
        with self.watch.lock:
            del self.watch.running[self.key]
        if self.fails:
            raise InputError(f"{self.key} failed")
        return {"key": self.key}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 120))
def test_the_scratch_of_running_units_stays_within_the_budget(sizes: list[int], workers: int, budget: int) -> None:
    watch = Watch()
    units = [Sleeper(f"u{n}", size, watch) for n, size in enumerate(sizes)]
    facts = engine.run(units, Resources("cpu", workers, budget), None, None)
    assert list(facts) == [u.key for u in units]
    for together in watch.seen:
        assert len(together) <= workers
        assert sum(together.values()) <= budget or len(together) == 1


def test_small_units_do_run_together() -> None:
    watch = Watch()
    engine.run([Sleeper(f"u{n}", 10, watch) for n in range(12)], Resources("cpu", 4, 100), None, None)
    assert max(len(together) for together in watch.seen) > 1


def test_units_start_in_the_order_of_the_plan() -> None:
    watch = Watch()
    engine.run([Sleeper(f"u{n}", 60 + n, watch) for n in range(8)], Resources("cpu", 4, 100), None, None)
    assert watch.started == [f"u{n}" for n in range(8)]


def test_the_first_error_stops_the_rest_and_leaves_nothing_running() -> None:
    watch = Watch()
    units = [Sleeper(f"u{n}", 60, watch, fails=n == 2) for n in range(50)]
    with pytest.raises(InputError, match="u2 failed"):
        engine.run(units, Resources("cpu", 4, 100), None, None)
    assert len(watch.started) < 10
    assert watch.running == {}


def test_an_error_in_a_unit_removes_the_staging_folder(tmp_path: Path) -> None:
    units = (Sleeper("good", 1, Watch()), Sleeper("bad", 1, Watch(), fails=True))
    plan = Plan(units, Report("merge"), lambda facts, spooled: Settled(Report("merge")))
    with pytest.raises(InputError, match="bad failed"):
        engine.execute(plan, tmp_path / "out", Resources("cpu", 1), force=False, progress=None)
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_settling_removes_the_staging_folder(tmp_path: Path) -> None:
    def settle(facts: Any, spooled: Any) -> Settled:
        raise InputError("refused at the end")

    plan = Plan((Sleeper("good", 1, Watch()),), Report("merge"), settle)
    with pytest.raises(InputError, match="refused at the end"):
        engine.execute(plan, tmp_path / "out", Resources("cpu", 1), force=False, progress=None)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_the_whole_work() -> None:
    calls: list[tuple[int, int]] = []
    units = [Sleeper(f"u{n}", 1, Watch(), work=n + 1) for n in range(5)]
    engine.run(units, Resources("cpu", 2), None, lambda done, total: calls.append((done, total)))
    assert [total for _, total in calls] == [15] * 5
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (15, 15)


def test_the_callers_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    engine.run([Sleeper("u", 1, Watch())], Resources("cpu", 2), None, None)
    assert torch.get_num_threads() == before


@dataclass(frozen=True)
class Asking:
    """A unit that calls `ask(load, emit)`, and says what it answers."""

    ask: Any
    key: str = "asking"
    scratch: int = 0
    reads: tuple[TensorRef, ...] = ()
    outs: tuple[Any, ...] = ()

    def run(self, load: Any, emit: Any) -> Facts:
        return {"answer": self.ask(load, emit)}


def test_units_run_without_gradients() -> None:
    unit = Asking(lambda load, emit: torch.is_grad_enabled())
    assert engine.run([unit], Resources("cpu", 1), None, None) == {"asking": {"answer": False}}
    assert torch.is_grad_enabled()


def test_the_garbage_collector_is_spared_the_plan_while_units_run_and_only_then() -> None:
    unit = Asking(lambda load, emit: (gc.isenabled(), gc.get_freeze_count() > 0))
    assert engine.run([unit], Resources("cpu", 1), None, None) == {"asking": {"answer": (True, True)}}
    assert gc.get_freeze_count() == 0


def test_two_units_of_one_name_are_refused() -> None:
    units = [Sleeper(key, 1, Watch()) for key in ("one", "two", "one")]
    with pytest.raises(LoratoolError, match="'one'"):
        engine.run(units, Resources("cpu", 1), None, None)


@pytest.mark.parametrize("count", [0, 2])
def test_a_single_file_that_is_not_one_file_is_refused(tmp_path: Path, count: int) -> None:
    files: tuple[OutFile, ...] = tuple(JsonFile(f"{n}.json", {}) for n in range(count))
    plan = Plan((), Report("convert"), lambda *_: Settled(Report("convert"), files), single_file=True)
    with pytest.raises(LoratoolError, match="1.json" if count else "none"):
        engine.execute(plan, tmp_path / "out.safetensors", Resources("cpu"), force=False, progress=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["time", "replaced", "removed"])
def test_an_input_that_changes_during_the_run_is_noticed(tmp_path: Path, change: str) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_text("old")

    def meddle(load: Any, emit: Any) -> None:
        before = source.stat()
        if change == "time":
            os.utime(source, ns=(0, before.st_mtime_ns + 1))
        else:
            source.rename(tmp_path / "moved")
        if change == "replaced":  # same size, same time
            source.write_text("new")
            os.utime(source, ns=(0, before.st_mtime_ns))

    report = Report("merge")
    plan = Plan((Asking(meddle),), report, lambda *_: Settled(report), (CopiedFile(source.name, str(source)),))
    with pytest.raises(StorageError, match=r"tokenizer\.json"):
        engine.execute(plan, tmp_path / "outs" / "out", Resources("cpu", 1), force=False, progress=None)
    assert not (tmp_path / "outs").exists()


def test_a_comparison_notices_an_input_that_changes_meanwhile(tmp_path: Path) -> None:
    first, second = write_adapter(tmp_path / "first"), write_adapter(tmp_path / "second")

    def meddle(done: int, total: int) -> None:
        os.utime(second / "adapter_model.safetensors", ns=(0, done))

    with pytest.raises(StorageError, match="second"):
        loratool.compare(first, second, progress=meddle)


def test_the_digest_knows_device_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan((Sleeper("u", 1, Watch()),), Report("merge"), lambda *_: Settled(Report("merge")))

    def digest(device: str) -> str:
        return engine.digest(plan, Resources(device), {})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert digest("auto") == digest("cuda") == digest("cuda:1") != digest("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = digest("auto")
    assert before == digest("cpu")
    monkeypatch.setattr(engine, "version", lambda name: "0.0")
    assert digest("auto") != before


def test_an_interrupt_leaves_at_once_and_the_worker_that_is_left_ends_at_its_next_reading(tmp_path: Path) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()
    stopped: list[BaseException] = []

    def ask(load: Any, emit: Any) -> None:
        begun.set()
        go.wait(30)
        try:
            emit(None, 0, torch.zeros(1))
        except BaseException as error:
            stopped.append(error)
            ended.set()
            raise

    def interrupt(done: int, total: int) -> None:
        begun.wait(30)
        raise KeyboardInterrupt

    report = Report("merge")
    units = (Asking(lambda *_: None, "quick"), Asking(ask))
    plan = Plan(units, report, lambda *_: Settled(report))
    with pytest.raises(KeyboardInterrupt):
        engine.execute(plan, tmp_path / "out", Resources("cpu", 2), force=False, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert not ended.is_set()
    go.set()
    assert ended.wait(30)
    assert not isinstance(stopped[0], Exception)  # which a unit could take for an error of its own


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99", "mps", "", "cpu:x"])
def test_a_device_that_is_not_there_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError) as caught:
        Resources(device).chosen_device()
    assert "--device" in caught.value.hint


# -- the same bytes ------------------------------------------------------------------------------------------------


def merged(tmp_path: Path, name: str, workers: int) -> Path:
    out = tmp_path / name
    adapters = [tmp_path / "adapter", tmp_path / "other"]
    loratool.merge(tmp_path / "base", adapters, out, weights=[0.7, 1.0], resources=Resources("cpu", workers))
    return out


def test_a_merge_has_the_same_bytes_with_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.operations import panels

    monkeypatch.setattr(panels, "PANEL", 4096)  # so that one weight is cut into several units
    monkeypatch.setattr(panels, "TILE", 1024)
    write_sharded(tmp_path / "base", wide_llama())
    write_adapter(tmp_path / "adapter", factors(1, shapes=WIDE))
    write_adapter(tmp_path / "other", factors(2, shapes=WIDE))
    outputs = [without_report(snapshot(merged(tmp_path, f"out{n}", n))) for n in (1, 2, 4)]
    assert outputs[0] == outputs[1] == outputs[2]


WIDE = {"model.layers.0.self_attn.q_proj": (200, 40), "model.layers.0.self_attn.k_proj": (136, 40)}


def wide_llama(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in WIDE.items()}


def without_report(files: dict[str, bytes]) -> dict[str, bytes]:
    """The report names the output folder, which differs on purpose."""
    return {name: content for name, content in files.items() if name != "loratool.report.json"}


def test_a_resize_has_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    outputs = []
    for n in (1, 2, 4):
        loratool.resize(adapter, tmp_path / f"out{n}", energy=0.8, resources=Resources("cpu", n))
        outputs.append(without_report(snapshot(tmp_path / f"out{n}")))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, a fine-tune of it, and the update of each layer that changed."""
    base, tuned = tensors_of_llama(), tensors_of_llama()
    generator = torch.Generator().manual_seed(5)
    for name in base:
        if "proj" in name:
            tuned[name] = base[name] + 0.01 * torch.randn(base[name].shape, generator=generator)
    updates = {name: tuned[name].double() - base[name].double() for name in base if "proj" in name}
    return write_base(tmp_path / "base", base), write_base(tmp_path / "tuned", tuned), updates


def test_an_extraction_has_the_same_bytes_with_any_number_of_workers(
    tmp_path: Path, pair: tuple[Path, Path, dict[str, torch.Tensor]]
) -> None:
    base, tuned, _ = pair
    outputs = []
    for n in (1, 2, 4):
        loratool.extract(tuned, base, tmp_path / f"out{n}", rank=3, resources=Resources("cpu", n))
        outputs.append(without_report(snapshot(tmp_path / f"out{n}")))
    assert outputs[0] == outputs[1] == outputs[2]


def updates_of(folder: Path) -> dict[str, torch.Tensor]:
    """B @ A of every module of a PEFT folder whose scale is 1, in fp64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, down in tensors.items():
        if name.endswith("lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")]
            found[name.removeprefix("base_model.model.").replace(".lora_A", "")] = up.double() @ down.double()
    return found


def test_an_extraction_in_little_memory_agrees_with_one_that_holds_everything(
    tmp_path: Path, pair: tuple[Path, Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.operations import extract

    base, tuned, true = pair
    monkeypatch.setattr(extract, "PANEL", 64)  # panels are never under 64 rows: the weights are one panel each ...
    loratool.extract(tuned, base, tmp_path / "held", rank=3)
    loratool.extract(tuned, base, tmp_path / "streamed", rank=3, resources=Resources("cpu", 1, 1))
    held, streamed = updates_of(tmp_path / "held"), updates_of(tmp_path / "streamed")
    assert held.keys() == streamed.keys() == true.keys()
    for name, update in held.items():
        U, S, Vh = torch.linalg.svd(true[name])
        best = (U[:, :3] * S[:3]) @ Vh[:3]
        for other in (update, streamed[name]):
            assert float((other - best).norm() / best.norm()) < 1e-5


def test_an_extraction_in_several_panels_agrees_with_the_true_svd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.operations import extract

    monkeypatch.setattr(extract, "PANEL", 4096)  # ... so this one has weights of several panels
    generator = torch.Generator().manual_seed(6)
    base = wide_llama()
    true = {
        n: torch.randn(t.shape[0], 2, generator=generator) @ torch.randn(2, t.shape[1], generator=generator)
        for n, t in base.items()
    }
    tuned = {n: t + 0.1 * true[n] for n, t in base.items()}
    write_base(tmp_path / "base", base)
    write_base(tmp_path / "tuned", tuned)
    loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2, resources=Resources("cpu", 2, 1))
    for name, update in updates_of(tmp_path / "out").items():
        wanted = tuned[name].double() - base[name].double()
        assert float((update - wanted).norm() / wanted.norm()) < 1e-5
