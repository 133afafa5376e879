"""Whether tensors that are copied as bytes are finite: by the bits of their exponents, without torch.

A number is NaN or infinite where its bits, less the sign, are at least those of infinity (of F8_E4M3: equal those of
NaN, for it has no infinity). Measured: 0.07 s of CPU for 200 MB of F16, 0.03 s of which is the reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loratool.errors import InputError
from loratool.plan import Input, OutFile, TensorFile
from loratool.storage.descriptor import Descriptor, reader
from loratool.storage.ranges import Ranges
from loratool.tensors import Inline, Span, TensorRef

_PANEL = 256 << 10  # bytes at a time: they stay in the cache
_BITS = {  # dtype -> (integers of its size, all bits but the sign, the first of these that is no number)
    "F8_E5M2": ("u1", 0x7F, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}


def require(files: Iterable[OutFile], inputs: Iterable[Input]) -> None:
    """Raise InputError where a tensor of a file that wants numbers is copied and is not finite.

    It names the tensors of the `inputs`, however the file calls them.
    """
    copied = (ref for file in files if isinstance(file, TensorFile) and file.finite for ref in file.tensors)
    leaves = {(leaf.pieces, leaf.dtype): leaf for ref in copied for leaf in _leaves(ref) if leaf.dtype in _BITS}
    opened: dict[str, Descriptor | Ranges] = {}
    wrong = [leaf for leaf in leaves.values() if not all(_finite(piece, leaf.dtype, opened) for piece in leaf.pieces)]
    if wrong:
        names = list(dict.fromkeys(_name_of(leaf, inputs) for leaf in wrong))
        more = f", ... and {len(names) - 6} more" if len(names) > 6 else ""
        path = next((p.path for p in wrong[0].pieces if isinstance(p, Span)), None)
        raise InputError(
            f"{', '.join(names[:6])}{more}: NaN or infinity in {len(names)} tensor{'s' * (len(names) > 1)}",
            where=path,
            hint="loratool inspect --check lists what is wrong; --exclude leaves modules out",
        )


def _leaves(ref: TensorRef) -> Iterator[TensorRef]:
    """Yield the stored tensors that a tensor is made of."""
    if ref.view is None:
        yield ref
    else:
        for of in ref.view.of:
            yield from _leaves(of)


def _name_of(leaf: TensorRef, inputs: Iterable[Input]) -> str:
    """Return what the source calls the bytes of a tensor."""
    for source in inputs:
        for name, ref in source.tensors.items():
            if any(_lies_in(piece, of) for piece in leaf.pieces for of in ref.pieces):
                return name
    return leaf.name


def _lies_in(piece: Span | Inline, other: Span | Inline) -> bool:
    if isinstance(piece, Span) and isinstance(other, Span):
        within = other.offset <= piece.offset and piece.offset + piece.nbytes <= other.offset + other.nbytes
        return piece.path == other.path and within
    return isinstance(piece, Inline) and isinstance(other, Inline) and piece.whole is other.whole


def _finite(piece: Span | Inline, dtype: str, opened: dict[str, Descriptor | Ranges]) -> bool:
    """Whether the numbers in a piece are all finite."""
    import numpy as np

    kind, unsigned, limit = _BITS[dtype]
    masked = np.empty(_PANEL // np.dtype(kind).itemsize, kind)
    for panel in _panels(piece, opened):
        bits = np.frombuffer(panel, kind)
        if np.bitwise_and(bits, masked.dtype.type(unsigned), out=masked[: bits.size]).max() >= limit:
            return False
    return True


def _panels(piece: Span | Inline, opened: dict[str, Descriptor | Ranges]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a piece in panels, which hold whole numbers."""
    if isinstance(piece, Inline):
        data = memoryview(piece.data)
        yield from (data[at : at + _PANEL] for at in range(0, piece.nbytes, _PANEL))
        return
    if piece.path not in opened:
        opened[piece.path] = reader(piece.path)
    panel = memoryview(bytearray(min(_PANEL, piece.nbytes)))
    for at in range(0, piece.nbytes, _PANEL):
        part = panel[: piece.nbytes - at]
        opened[piece.path].read_into(part, piece.offset + at)
        yield part
