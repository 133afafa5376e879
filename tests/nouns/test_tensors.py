"""References: rows are the bytes of those rows, panels cover the tensor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.tensors import Inline, Span, TensorRef, inline_scalar

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
    import torch

    ref = inline_scalar("alpha", 1.5)
    assert (ref.shape, ref.dtype, ref.nbytes) == ((), "F32", 4)
    assert torch.frombuffer(bytearray(resolved(ref)), dtype=torch.float32).item() == 1.5
