"""What PEFT (0.21.2) merges silently wrong and loratool refuses, with exit code 3 and nothing written; facts 1 to 6.

Each test has PEFT's number and the right one, and asserts PEFT's deviation: it fails when PEFT changes. The right one
is scaling * B @ A in fp64, of the tensors in the file.
"""

from __future__ import annotations

import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import peft
import pytest
import torch
from tiny_files import refusal
from traps import LIVE, Q0, heard, merged_by_peft, read, rewritten, state

import loratool

Make = Callable[..., Any]
MODULES = [f"model.layers.{n}.self_attn.{m}" for n in (0, 1) for m in ("q_proj", "v_proj")]
SCALING = 8 / 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Case(NamedTuple):
    base: Path
    adapter: Path
    before: dict[str, torch.Tensor]
    fresh: Callable[[], Any]  # the base model anew
    true: float  # the norm of all updates

    def by_peft(self, folder: Path) -> float:
        """The norm of what PEFT moves."""
        return self.moved(merged_by_peft(self.fresh(), folder))

    def moved(self, after: dict[str, torch.Tensor]) -> float:
        return sum(float((after[n].double() - t.double()).norm() ** 2) for n, t in self.before.items()) ** 0.5


def update(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    A, B = (tensors[f"{LIVE}{module}.lora_{f}.weight"].double() for f in "AB")
    return SCALING * B @ A


@pytest.fixture
def case(saved: Make, adapter_folder: Make, tiny: Make) -> Case:
    model, base = saved("llama")
    before = state(model)
    _, adapter = adapter_folder(model, target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8)
    tensors = read(adapter)
    true = sum(float(update(tensors, m).norm() ** 2) for m in MODULES) ** 0.5
    found = Case(base, adapter, before, lambda: tiny("llama"), true)
    assert found.by_peft(adapter) == pytest.approx(true, rel=1e-5)
    return found


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()}


def as_kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    halves = {"lora_A": "lora_down", "lora_B": "lora_up"}
    found = {}
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix(LIVE).partition(".lora_")
        found[f"lora_te_{module.replace('.', '_')}.{halves['lora_' + rest[0]]}.weight"] = tensor
    return found


def first_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.0" in name}


@pytest.mark.parametrize("spell", [renamed, as_kohya])
def test_fact_1_when_all_keys_are_renamed_peft_moves_nothing(case: Case, spell: Any, tmp_path: Path) -> None:
    folder = rewritten(case.adapter, tmp_path / "renamed", spell(read(case.adapter)))
    with heard() as said:
        assert case.by_peft(folder) == 0  # case.true is right
    assert any("missing adapter keys" in text for text in said)  # a warning, and a merged model
    told = refusal(case.base, [folder], tmp_path / "out", format="peft")
    assert ("attention.q_proj" if spell is renamed else "lora_te_model_layers_0_self_attn_q_proj") in told
    refusal(case.base, [folder], tmp_path / "out")


@pytest.mark.parametrize("kept", ["one layer", "one kind", "one half"])
def test_fact_1_when_half_of_the_keys_are_missing_peft_merges_the_rest(case: Case, kept: str, tmp_path: Path) -> None:
    tensors = read(case.adapter)
    some = {
        "one layer": first_layer(tensors),
        "one kind": {n: t for n, t in tensors.items() if "v_proj" not in n},
        "one half": {n: t for n, t in tensors.items() if "lora_B" not in n or "layers.0" in n},
    }[kept]
    folder = rewritten(case.adapter, tmp_path / "half", some)
    assert 0.5 * case.true < case.by_peft(folder) < 0.9 * case.true  # case.true is right
    told = refusal(case.base, [folder], tmp_path / "out")
    assert {"one layer": MODULES[2], "one kind": MODULES[1], "one half": f"{MODULES[2]}: half a pair"}[kept] in told


@pytest.mark.parametrize("spell", [renamed, first_layer])
def test_fact_2_peft_merges_random_numbers_where_keys_are_missing(case: Case, spell: Any, tmp_path: Path) -> None:
    folder = rewritten(case.adapter, tmp_path / "x", spell(read(case.adapter)), init_lora_weights=False)
    torch.manual_seed(0)
    assert case.by_peft(folder) > 1.5 * case.true  # noise: B begins as A does
    refusal(case.base, [folder], tmp_path / "out")


def test_fact_3_peft_drops_factors_of_a_layer_that_the_config_does_not_name(case: Case, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.k_proj"
    more = {
        f"{LIVE}{key}.lora_A.weight": torch.full((4, 32), 0.1),
        f"{LIVE}{key}.lora_B.weight": torch.full((16, 4), 0.1),
    }
    folder = rewritten(case.adapter, tmp_path / "more", {**read(case.adapter), **more})
    with heard() as said:
        theirs = merged_by_peft(case.fresh(), folder)
    assert torch.equal(theirs[f"{key}.weight"], case.before[f"{key}.weight"])
    assert not any("key" in text for text in said)  # not even a warning
    report = loratool.merge(case.base, [folder], tmp_path / "out")  # what is in the file is used
    got = read(tmp_path / "out")
    for module in (*MODULES, key):
        right = case.before[f"{module}.weight"] + update(read(folder), module)
        torch.testing.assert_close(got[f"{module}.weight"].double(), right, rtol=0, atol=1e-7)
    assert report.ledger[str(folder)] == {"computed": len(read(folder))}


def test_fact_4_peft_merges_what_is_not_finite(case: Case, tmp_path: Path) -> None:
    name = f"{LIVE}{Q0}.lora_B.weight"
    tensors = read(case.adapter)
    for value in (float("nan"), float("inf")):
        spoiled = tensors[name].clone()
        spoiled[3, 2] = value
        folder = rewritten(case.adapter, tmp_path / f"{value}", {**tensors, name: spoiled})
        assert not merged_by_peft(case.fresh(), folder)[f"{Q0}.weight"].isfinite().all()
        told = refusal(case.base, [folder], tmp_path / "out")
        assert name in told
        assert "NaN or infinity" in told
    half = {n: (t * 1e6).half() for n, t in tensors.items()}  # overflowed when it was saved
    folder = rewritten(case.adapter, tmp_path / "half", half)
    assert not all(t.isfinite().all() for t in merged_by_peft(case.fresh(), folder).values())
    assert "NaN or infinity" in refusal(case.base, [folder], tmp_path / "out")
    folder = spelled(case.adapter, tmp_path / "alpha", '"lora_alpha": 8', '"lora_alpha": 1e999')
    assert not merged_by_peft(case.fresh(), folder)[f"{Q0}.weight"].isfinite().all()
    assert "1e999 overflows" in refusal(case.base, [folder], tmp_path / "out")


def spelled(source: Path, target: Path, old: str, new: str) -> Path:
    """A copy of an adapter whose config has other text in it."""
    rewritten(source, target)
    text = (target / "adapter_config.json").read_text()
    assert text.count(old) == 1
    (target / "adapter_config.json").write_text(text.replace(old, new))
    return target


def test_fact_5_peft_guesses_and_overlooks_in_configs(case: Case, tmp_path: Path) -> None:
    sixteen = rewritten(case.adapter, tmp_path / "sixteen", lora_alpha=16)
    assert case.by_peft(sixteen) == pytest.approx(2 * case.true, rel=1e-5)
    absent = rewritten(sixteen, tmp_path / "absent", lora_alpha=None)
    assert case.by_peft(absent) == pytest.approx(case.true, rel=1e-5)  # an alpha that got lost is 8; 2 x is right
    assert "--alpha" in refusal(case.base, [absent], tmp_path / "out")

    negative = rewritten(case.adapter, tmp_path / "negative", lora_alpha=-8)
    theirs = merged_by_peft(case.fresh(), negative)[f"{Q0}.weight"] - case.before[f"{Q0}.weight"]
    torch.testing.assert_close(theirs.double(), -update(read(negative), Q0), rtol=0, atol=1e-6)  # silently negated
    assert "must be positive" in refusal(case.base, [negative], tmp_path / "out")

    twice = spelled(case.adapter, tmp_path / "twice", '"lora_alpha": 8', '"lora_alpha": 8, "lora_alpha": 800')
    assert case.by_peft(twice) == pytest.approx(100 * case.true, rel=1e-5)  # the last one wins; nobody knows
    assert "duplicate key" in refusal(case.base, [twice], tmp_path / "out")

    for field in ("use_twist", "alora_twist"):
        unknown = rewritten(case.adapter, tmp_path / field, **{field: True})
        assert case.by_peft(unknown) == pytest.approx(case.true, rel=1e-5)  # left out with a warning
        assert field in refusal(case.base, [unknown], tmp_path / "out")
    for field in ("use_dora", "lora_bias"):  # fields that are known, of which the file has nothing
        untrue = rewritten(case.adapter, tmp_path / field, **{field: True})
        assert field in refusal(case.base, [untrue], tmp_path / "out")


def interrupted(seconds: float, work: Callable[[], object]) -> bool:
    """Whether this takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        work()
    except TimeoutError:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    return False


EVIL = "([a-z_.0-9]+)+!"
WORSE = "(?:[a-z_.0-9]+|[a-z]+){1,40}[A-Z]"


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_fact_6_an_evil_pattern_holds_peft_up(case: Case, field: str, tmp_path: Path) -> None:
    evil = rewritten(case.adapter, tmp_path / "evil", **{field: EVIL if "modules" in field else {EVIL: 4}})
    assert interrupted(1.0, lambda: peft.PeftModel.from_pretrained(case.fresh(), evil))  # more than 20 s
    start = time.process_time()
    loratool.merge(case.base, [evil], tmp_path / "out")
    assert case.moved(read(tmp_path / "out")) == pytest.approx(case.true, rel=1e-5)
    if "pattern" in field:
        worse = rewritten(case.adapter, tmp_path / "worse", **{field: {WORSE: 4}})
        assert "takes forever" in refusal(case.base, [worse], tmp_path / "none")
    assert time.process_time() - start < 8


def test_fact_6_configs_of_absurd_size_cost_nothing(case: Case, tmp_path: Path) -> None:
    names = [f"module_{n}" for n in range(30_000)]
    many = rewritten(case.adapter, tmp_path / "many", target_modules=["q_proj", "v_proj", *names])
    assert interrupted(1.0, lambda: peft.PeftModel.from_pretrained(case.fresh(), many))  # more than 60 s
    assert len(json.loads((many / "adapter_config.json").read_text())["target_modules"]) == 30_002
    start = time.process_time()
    loratool.merge(case.base, [many], tmp_path / "out")
    large = rewritten(case.adapter, tmp_path / "large", r=10**7)
    assert "rank 10000000" in refusal(case.base, [large], tmp_path / "none")
    assert time.process_time() - start < 8
