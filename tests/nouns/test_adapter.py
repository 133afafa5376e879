"""Adapters: alpha without noise, selection by globs, nothing unaccounted for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.adapter import Adapter, Finding, LowRank, Origin, Target
from loratool.errors import MismatchError
from loratool.tensors import TensorRef


def low_rank(rank=4, scaling=1.0, name="x", out=6, inside=(5,)):
    return LowRank(
        TensorRef(name + ".A", (rank, *inside), "F32"),
        TensorRef(name + ".B", (out, rank, *(1 for _ in inside[1:])), "F32"),
        scaling,
    )


PATHS = [f"layers.{i}.{m}" for i in (0, 1, 10) for m in ("attn.q", "attn.k", "mlp.up")]


def an_adapter(**changes):
    deltas = {Target("unet", (p,)): (low_rank(name=p),) for p in PATHS}
    tensors = {r.name: r for ds in deltas.values() for d in ds for r in d.refs}
    return Adapter(**{"deltas": deltas, "origin": Origin("test", "somewhere"), "tensors": tensors, **changes})


@given(st.integers(1, 512), st.one_of(st.integers(1, 4096), st.floats(0.01, 1000).map(lambda x: round(x, 3))))
def test_alpha_is_the_number_that_a_person_wrote(rank, alpha):
    assert low_rank(rank, alpha / rank).alpha == alpha


@given(st.integers(1, 512), st.integers(1, 512))
def test_alpha_gives_back_the_scaling_of_rslora(rank, alpha):
    scaling = alpha / math.sqrt(rank)
    assert low_rank(rank, scaling).alpha / rank == pytest.approx(scaling, rel=1e-15)


def test_shapes_of_the_weight_follow_the_kind_of_layer():
    linear, conv = low_rank(), low_rank(inside=(5, 3, 3))
    assert linear.weight_shape(transposed=False) == (6, 5)
    assert linear.weight_shape(transposed=True) == (5, 6)
    assert conv.weight_shape(transposed=False) == (6, 5, 3, 3)
    assert conv.matrix_shape == (6, 45)


@pytest.mark.parametrize(
    ("target", "exclude", "kept"),
    [
        ((), (), PATHS),
        (("q",), (), [p for p in PATHS if p.endswith(".q")]),
        (("layers.1.**",), (), [p for p in PATHS if p.startswith("layers.1.")]),
        (("attn.*",), ("layers.{i}.attn.k",), [p for p in PATHS if p.endswith(".q")]),
        ((), ("mlp.(up|down)",), [p for p in PATHS if "mlp" not in p]),
        (("unet:**",), ("layers.10.**",), [p for p in PATHS if not p.startswith("layers.10.")]),
    ],
)
def test_globs_choose_modules_and_account_for_the_rest(target, exclude, kept):
    adapter = an_adapter().selected(target, exclude)
    assert {t.path for t in adapter.deltas} == set(kept)
    left_out = {
        ref.name for t, deltas in an_adapter().deltas.items() if t.path not in kept for d in deltas for ref in d.refs
    }
    assert set(adapter.skipped) == left_out
    assert adapter.explained == dict.fromkeys(left_out, "skipped")


@pytest.mark.parametrize(
    ("target", "exclude"), [(("nope",), ()), (("q", "nope"), ()), ((), ("nope",)), (("text:**",), ())]
)
def test_a_glob_that_hits_nothing_is_an_error_that_names_it(target, exclude):
    with pytest.raises(MismatchError, match=r"nope|text"):
        an_adapter().selected(target, exclude)


def test_leaving_nothing_is_an_error():
    with pytest.raises(MismatchError, match="no module is left"):
        an_adapter().selected((), ("**",))


def test_targets_are_in_natural_order():
    assert [t.path for t in an_adapter().targets] == [
        f"layers.{i}.{m}" for i in (0, 1, 10) for m in ("attn.k", "attn.q", "mlp.up")
    ]


def test_errors_stop_and_warnings_do_not():
    an_adapter(findings=(Finding("warning", "a", "b"),)).require_sound()
    errors = tuple(Finding("error", f"module.{n}", "is broken") for n in range(30))
    with pytest.raises(MismatchError, match=r"30 parts.*\n(.*\n)*.*module\.0, module\.1 and 28 more: is broken"):
        an_adapter(findings=errors).require_sound()


element = st.sampled_from(["blocks", "3", "attn", "to_q", "mlp", "0"])


@given(st.lists(st.lists(element, min_size=1, max_size=4).map(".".join), min_size=1, max_size=4, unique=True))
def test_a_path_of_several_parts_names_each_whole(parts):
    path = Target("", tuple(f"first.{part}" for part in parts)).path
    before, choice, after = path.partition("(")
    read = [before + part for part in after.rstrip(")").split("|")] if choice else [path]
    assert read == [f"first.{part}" for part in parts]


def test_the_path_of_a_fused_weight_selects_its_parts_and_no_others():
    parts = ("b.3.attn.to_q", "b.3.attn.to_k", "b.3.mlp")
    adapter = an_adapter(deltas={Target("", (p,)): (low_rank(name=p),) for p in (*parts, "b.3.attn.to_v", "b.4.mlp")})
    assert {t.parts[0] for t in adapter.selected([Target("", parts).path]).deltas} == set(parts)
