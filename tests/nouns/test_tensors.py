"""References: rows are the bytes of those rows, panels cover the tensor."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.storage.load import Loader
from loratool.tensors import Inline, Span, TensorRef, inline_scalar, joined, padded, woven, zeros

FILE = bytes(range(256)) * 40


def resolved(ref):
    """The bytes of a reference, with FILE as every file."""
    return b"".join(p.data if isinstance(p, Inline) else FILE[p.offset : p.offset + p.nbytes] for p in ref.pieces)


@st.composite
def refs(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dtype, size = draw(st.sampled_from([("U8", 1), ("BF16", 2), ("F32", 4)]))
    total = size
    for n in shape:
        total *= n
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=4)))
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
        if draw(st.booleans()):
            pieces.append(Span("file", draw(st.integers(0, 4000)), stop - start))
        else:
            pieces.append(Inline(draw(st.binary(min_size=stop - start, max_size=stop - start))))
    return TensorRef("x", shape, dtype, tuple(pieces))


@given(refs(), st.data())
def test_rows_are_the_bytes_of_those_rows(ref, data):
    start = data.draw(st.integers(0, ref.shape[0]))
    stop = data.draw(st.integers(start, ref.shape[0]))
    row = ref.nbytes // ref.shape[0]
    part = ref.rows(start, stop)
    assert part.shape == (stop - start, *ref.shape[1:])
    assert part.dtype == ref.dtype
    assert resolved(part) == resolved(ref)[start * row : stop * row]
    assert sum(p.nbytes for p in part.pieces) == part.nbytes


@given(refs(), st.data())
def test_rows_of_rows_are_rows(ref, data):
    a = data.draw(st.integers(0, ref.shape[0]))
    b = data.draw(st.integers(a, ref.shape[0]))
    c = data.draw(st.integers(0, b - a))
    d = data.draw(st.integers(c, b - a))
    assert resolved(ref.rows(a, b).rows(c, d)) == resolved(ref.rows(a + c, a + d))


@given(st.integers(1, 5000), st.integers(1, 4096), st.sampled_from(["U8", "F16", "F32"]), st.integers(1, 1 << 22))
def test_panels_cover_every_row_once_in_multiples_of_64_without_thin_tails(rows, columns, dtype, nbytes):
    panels = TensorRef("x", (rows, columns), dtype).panels(nbytes)
    assert [a for a, _ in panels] == [0, *(b for _, b in panels[:-1])]
    assert panels[-1][1] == rows
    heights = [b - a for a, b in panels]
    assert all(h > 0 for h in heights)
    assert all(h % 64 == 0 for h in heights[:-1])
    assert len(panels) == 1 or heights[-1] >= 16
    size = TensorRef("x", (1, columns), dtype).nbytes
    assert all(h * size <= max(nbytes, 64 * size) + 15 * size for h in heights)


@given(st.integers(1, 5000), st.integers(1, 512))
def test_panels_depend_on_shape_and_dtype_alone(rows, columns):
    one = TensorRef("x", (rows, columns), "F32", (Span("a", 0, rows * columns * 4),))
    two = TensorRef("y", (rows, columns), "F32", (Span("b", 64, rows * columns * 4),))
    assert one.panels(1 << 16) == two.panels(1 << 16)


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0)])
def test_a_tensor_without_rows_or_bytes_has_no_panels(shape):
    assert TensorRef("x", shape, "F32").panels(1 << 20) == []


def test_a_scalar_holds_its_number():
    ref = inline_scalar("alpha", 1.5)
    assert (ref.shape, ref.dtype, ref.nbytes) == ((), "F32", 4)
    assert torch.frombuffer(bytearray(resolved(ref)), dtype=torch.float32).item() == 1.5


def matrix(rows, columns, start=0):
    """A reference and its values: no two elements are alike."""
    values = torch.arange(start, start + rows * columns, dtype=torch.int16).reshape(rows, columns)
    return TensorRef("m", (rows, columns), "I16", (Inline(values.numpy().tobytes()),)), values


@st.composite
def ranges(draw, size):
    """Some rows out of so many: in any order, with steps, none of them empty."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, size - 1))
        found.append(range(start, draw(st.integers(start + 1, size)), draw(st.integers(1, 3))))
    return found


def picked(found):
    return [n for r in found for n in r]


@st.composite
def views(draw, depth=4):
    """A reference rearranged again and again, and the same done to its values by torch."""
    ref, values = matrix(draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    for step in range(draw(st.integers(0, depth))):
        rows, columns = ref.shape
        kind = draw(st.sampled_from(["take", "rows", "columns", "transposed", "joined", "woven", "padded", "zeros"]))
        if kind == "take":
            chosen = draw(ranges(rows))
            ref, values = ref.take(chosen), values[picked(chosen)]
        elif kind == "rows":
            start = draw(st.integers(0, rows - 1))
            stop = draw(st.integers(start + 1, rows))
            ref, values = ref.rows(start, stop), values[start:stop]
        elif kind == "columns":
            chosen = draw(ranges(columns))
            ref, values = ref.columns(chosen), values[:, picked(chosen)]
        elif kind == "transposed":
            ref, values = ref.transposed(), values.T
        elif kind == "joined":
            other, more = matrix(draw(st.integers(1, 4)), columns, 1000 * (step + 1))
            ref, values = joined("j", [ref, other, ref]), torch.cat([values, more, values])
        elif kind == "woven":
            other, more = matrix(rows, columns, 1000 * (step + 1))
            ref, values = woven("w", [ref, other]), torch.stack([values, more], dim=2).reshape(rows, -1)
        elif kind == "padded":
            before, behind = draw(st.integers(0, 2)), draw(st.integers(0, 2))
            ref = padded(ref, before + columns + behind, before)
            values = torch.cat([values.new_zeros(rows, before), values, values.new_zeros(rows, behind)], dim=1)
        else:
            ref = joined("z", [ref, zeros("", (2, columns), "I16")])
            values = torch.cat([values, values.new_zeros(2, columns)])
    return ref, values


@given(views())
def test_a_rearranged_reference_is_read_as_torch_would_rearrange_it(pair):
    ref, values = pair
    assert ref.shape == values.shape
    assert ref.nbytes == 2 * prod(values.shape)
    with Loader() as load:
        assert torch.equal(load(ref), values)
        into = torch.empty(values.shape, dtype=torch.int16)
        assert load(ref, into) is into
        assert torch.equal(into, values)


@given(st.data())
def test_rows_and_columns_of_a_plain_matrix_are_those_of_torch(data):
    ref, values = matrix(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    down, across = data.draw(ranges(ref.shape[0])), data.draw(ranges(ref.shape[1]))
    taken = ref.take(down)
    assert taken.view is None  # a choice of rows needs no rearranging
    with Loader() as load:
        assert torch.equal(load(taken), values[picked(down)])
        assert torch.equal(load(ref.take(down).columns(across)), values[picked(down)][:, picked(across)])
        assert torch.equal(load(ref.columns(across).take(down)), values[picked(down)][:, picked(across)])


@given(views(), st.data())
def test_tiles_of_a_rearranged_reference_add_up_to_it(pair, data):
    ref, values = pair
    cuts = sorted({0, len(values), *data.draw(st.lists(st.integers(0, len(values)), max_size=3))})
    with Loader() as load:
        tiles = [load(ref.rows(a, b)) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(tiles), values)


def test_a_tile_of_joined_matrices_reads_those_alone_that_it_lies_in():
    parts = [TensorRef("p", (4, 6), "F32", (Span(str(n), 0, 96),)) for n in range(4)]
    stacked = joined("all", [part.transposed() for part in parts])  # (24, 4)
    tile = stacked.rows(7, 12)
    assert {piece.path for piece in tile.pieces} == {"1"}
    assert {piece.path for piece in stacked.rows(5, 7).pieces} == {"0", "1"}


def test_equal_bytes_of_two_dtypes_are_two_tensors_to_a_loader():
    data = Inline(torch.ones(3, 2, dtype=torch.float16).numpy().tobytes())
    half, bfloat = (TensorRef("x", (3, 2), dtype, (data,)).transposed() for dtype in ("F16", "BF16"))
    with Loader() as load:
        assert load(half).dtype == torch.float16
        assert load(bfloat).dtype == torch.bfloat16
