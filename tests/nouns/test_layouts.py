"""Layouts of fused weights: every row has one part, sizes must add up, and rows of rows are rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import MismatchError
from loratool.layouts import blocks, concat, count, interleave_heads, stack, stride, within

SIZE = st.integers(1, 5)
WIDTHS = st.lists(SIZE, min_size=1, max_size=4)
RANGES = st.lists(st.builds(range, st.integers(0, 9), st.integers(0, 12), SIZE), max_size=4)


def numbers(rows):
    """The row numbers that ranges select, in order."""
    return [n for r in rows for n in r]


def labels(layout, out, config=None):
    """Which part each row belongs to."""
    owners = [[] for _ in range(out)]
    for part, rows in enumerate(layout.rows(out, config or {})):
        for row in numbers(rows):
            owners[row].append(part)
    assert all(len(owner) == 1 for owner in owners)  # the parts are disjoint and cover everything
    return [owner[0] for owner in owners]


@given(WIDTHS)
def test_concat_puts_one_part_after_another(widths):
    expected = [part for part, width in enumerate(widths) for _ in range(width)]
    assert labels(concat(*widths), sum(widths)) == expected


@given(SIZE, SIZE)
def test_equal_parts_need_no_sizes(parts, width):
    assert labels(concat(parts=parts), parts * width) == [n // width for n in range(parts * width)]


@given(SIZE, WIDTHS)
def test_interleaved_heads_repeat_all_parts_in_every_group(groups, widths):
    group = [part for part, width in enumerate(widths) for _ in range(width)]
    assert labels(interleave_heads(groups, *widths), groups * sum(widths)) == group * groups


@given(SIZE, SIZE, SIZE)
def test_blocks_repeat_equal_parts(n, parts, width):
    group = [part for part in range(parts) for _ in range(width)]
    assert labels(blocks(n, parts), n * parts * width) == group * n


@given(SIZE, SIZE)
def test_strides_alternate(parts, times):
    assert labels(stride(parts), parts * times) == [n % parts for n in range(parts * times)]


@given(SIZE, SIZE)
def test_stacks_have_as_many_slabs_as_fit(height, slabs):
    assert labels(stack(height), height * slabs) == [n // height for n in range(height * slabs)]


@given(SIZE, WIDTHS)
def test_rows_of_a_part_come_in_order(groups, widths):
    for rows, width in zip(interleave_heads(groups, *widths).rows(groups * sum(widths), {}), widths, strict=True):
        assert numbers(rows) == sorted(numbers(rows))
        assert count(rows) == groups * width


def test_a_layout_of_grouped_queries_by_hand():
    """Two groups of two queries, one key and one value, of one row each (Falcon 40B's layout in small)."""
    config = {"num_kv_heads": 2, "num_attention_heads": 4, "hidden_size": 4}
    dim = "hidden_size/num_attention_heads"
    layout = interleave_heads("num_kv_heads", f"num_attention_heads/num_kv_heads*({dim})", dim, dim)
    assert [numbers(rows) for rows in layout.rows(8, config)] == [[0, 1, 4, 5], [2, 6], [3, 7]]


def test_out_is_the_rows_at_hand_even_where_the_config_has_a_key_of_that_name():
    assert labels(concat("out/2", "out/2"), 4, {"out": 100}) == [0, 0, 1, 1]


@given(SIZE, WIDTHS, st.integers(0, 200))
def test_rows_that_do_not_add_up_are_refused(groups, widths, out):
    if groups * sum(widths) != out:
        with pytest.raises(MismatchError, match=f"are not {out} rows"):
            interleave_heads(groups, *widths).rows(out, {})


@pytest.mark.parametrize(
    ("layout", "out", "config", "words"),
    [
        (concat(parts=3), 32, {}, "out / 3: 32 does not divide by 3"),
        (blocks(4, parts=3), 18, {}, "out / 12: 18 does not divide by 12"),
        (stride(2), 7, {}, "out / 2: 7 does not divide by 2"),
        (concat("width/heads"), 8, {"width": 8, "heads": 3}, "width / heads: 8 does not divide by 3"),
        (concat("width/heads"), 8, {"width": 8}, "the config has no heads"),
        (concat("width/heads"), 8, {"width": 8, "heads": 0}, "width / heads: 8 does not divide by 0"),
        (concat("width"), 8, {"width": "8"}, "'8'"),
        (concat("width"), 1, {"width": True}, "True"),
        (concat("width"), 8, {"width": 8.0}, "8.0"),
        (concat("width", "out-width"), 8, {"width": 8}, r"8 \+ 0 rows are not 8 rows"),
        (concat("width", "out-width"), 8, {"width": 12}, r"12 \+ -4 rows are not 8 rows"),
        (interleave_heads("heads", "out/heads"), 8, {"heads": -2}, r"-2 groups of -4 rows are not 8 rows"),
        (stack("height"), 8, {"height": 3}, "are not 8 rows"),
        (stack("height"), 8, {"height": 16}, "are not 8 rows"),
        (stack("height"), 8, {"height": 0}, "are not 8 rows"),
        (stack("height"), 8, {"height": -8}, "are not 8 rows"),
        (concat(), 8, {}, "are not 8 rows"),
    ],
    ids=str,
)
def test_sizes_that_do_not_work_out_are_refused_by_name(layout, out, config, words):
    with pytest.raises(MismatchError, match=words):
        layout.rows(out, config)


@given(RANGES)
def test_count_is_the_number_of_rows(rows):
    assert count(rows) == len(numbers(rows))


@given(st.data())
def test_rows_of_rows_are_rows_of_the_whole_weight(data):
    outer = data.draw(RANGES)
    size = len(numbers(outer))
    bound = st.integers(0, size)
    inner = data.draw(st.lists(st.builds(range, bound, bound, SIZE), max_size=4))
    assert numbers(within(outer, inner)) == [numbers(outer)[row] for row in numbers(inner)]


@given(SIZE, WIDTHS, st.data())
def test_a_part_within_all_rows_is_the_part(groups, widths, data):
    out = groups * sum(widths)
    for rows in interleave_heads(groups, *widths).rows(out, {}):
        assert numbers(within([range(out)], rows)) == numbers(rows)
        assert numbers(within(rows, [range(count(rows))])) == numbers(rows)
    at = data.draw(st.integers(0, out))
    assert numbers(within([range(at), range(at, out)], [range(out)])) == list(range(out))
