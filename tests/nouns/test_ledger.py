"""The ledger: what is not read, copied or explained stops the job; what nothing makes does too."""

from dataclasses import dataclass

import pytest

from loratool import ledger
from loratool.errors import MismatchError
from loratool.plan import Input, Out, TensorFile
from loratool.tensors import Inline, Span, TensorRef


def tensor(name, start, rows=4, path="in"):
    return TensorRef(name, (rows, 2), "F32", (Span(path, start, rows * 8),))


A, B, C = tensor("a", 0), tensor("b", 32), tensor("c", 64)
ALL = {t.name: t for t in (A, B, C)}


@dataclass(frozen=True)
class Reader:
    reads: tuple
    outs: tuple = ()


def test_every_fate_is_counted():
    file = TensorFile("out", (B.renamed("b.renamed"),))
    summary = ledger.close([Input("in", ALL, {"c": "skipped"})], [Reader((A,))], [file])
    assert summary == {"in": {"computed": 1, "copied": 1, "skipped": 1}}


@pytest.mark.parametrize("forgotten", ["a", "b", "c"])
def test_a_tensor_that_nothing_touches_is_an_error_that_names_it(forgotten):
    read = tuple(t for t in (A, B, C) if t.name != forgotten)
    with pytest.raises(MismatchError, match=f"accounts for {forgotten}$"):
        ledger.close([Input("in", ALL)], [Reader(read)], [])


def test_a_tensor_read_in_part_is_not_read():
    panels = [Reader((A.rows(0, 2),)), Reader((A.rows(3, 4),))]
    with pytest.raises(MismatchError, match="accounts for a"):
        ledger.close([Input("in", {"a": A})], panels, [])
    ledger.close([Input("in", {"a": A})], [*panels, Reader((A.rows(2, 3),))], [])


def test_equal_names_in_two_inputs_are_two_tensors():
    other = tensor("a", 0, path="other")
    with pytest.raises(MismatchError, match="other"):
        ledger.close([Input("in", {"a": A}), Input("other", {"a": other})], [Reader((A,))], [])


def test_inline_bytes_are_followed_too():
    alpha = TensorRef("alpha", (), "F32", (Inline(bytes(4)),))
    with pytest.raises(MismatchError, match="alpha"):
        ledger.close([Input("in", {"alpha": alpha})], [], [])
    assert ledger.close([Input("in", {"alpha": alpha})], [], [TensorFile("out", (alpha,))]) == {"in": {"copied": 1}}


def test_inline_bytes_that_are_read_in_parts_are_read_when_all_parts_are():
    whole = TensorRef("a", (4, 2), "F32", (Inline(bytes(range(32))),))
    panels = [Reader((whole.rows(0, 3).rows(1, 3),)), Reader((whole.rows(3, 4),))]
    with pytest.raises(MismatchError, match="accounts for a"):
        ledger.close([Input("in", {"a": whole})], panels, [])
    ledger.close([Input("in", {"a": whole})], [*panels, Reader((whole.rows(0, 1),))], [])


def test_an_output_that_nothing_makes_is_an_error():
    blank = TensorFile("out", (TensorRef("new", (4, 2), "F32"),))
    with pytest.raises(MismatchError, match="nothing makes new"):
        ledger.close([], [], [blank])
    ledger.close([], [Reader((), (Out("out", "new", (4, 2), "F32"),))], [blank])


def test_a_flag_can_give_the_rest_a_fate():
    assert ledger.close([Input("in", ALL, otherwise="dropped")], [], []) == {"in": {"dropped": 3}}
