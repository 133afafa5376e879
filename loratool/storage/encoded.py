"""Finding quantised weights among the tensors of a checkpoint, one function an encoding: names, shapes, small bytes.

Each yields what it found as logical tensors. What is incomplete, damaged or unusual is refused by the tensor's name:
a scale that is misread would give a model that looks whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from loratool import strictjson
from loratool.encodings import FourBit, Nested, Scaled, Transposed4Bit
from loratool.errors import FormatError, UnsupportedError
from loratool.storage import remote
from loratool.tensors import Inline, TensorRef, quantised

Tensors = Mapping[str, TensorRef]

_FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_STATE = ".quant_state.bitsandbytes__"
_STATE_CAP = 1 << 16  # bytes
#: What bitsandbytes keeps beside a 4-bit weight.
_FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Layers that transformers writes as (in, out), but turns round before bitsandbytes quantises them.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
#: Scales of quantised activations, which a 16-bit layer does not have.
_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "scale_input")
_MARKER = "scaled_fp8"
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


class Found(NamedTuple):
    """A weight as it is meant: the encoding's name, the stored tensor whose place it takes, and all that it is made of.

    `fates` are those of stored tensors that are not part of it: read here, or of no use to a 16-bit weight.
    """

    ref: TensorRef
    encoding: str
    holder: str
    parts: tuple[str, ...]
    fates: Mapping[str, str] = {}


def refuse(name: str, problem: str, where: str) -> NoReturn:
    """Raise FormatError for a quantised tensor that cannot be read."""
    raise FormatError(f"{name!r}: {problem}", where=where, hint="the checkpoint is damaged or incomplete")


def config_dtype(config: Mapping[str, Any], otherwise: str) -> str:
    """Return the float dtype that a model's config names, or `otherwise`."""
    text = config.get("text_config")
    for one in (config, text if isinstance(text, dict) else {}):
        named = str(one.get("dtype") or one.get("torch_dtype") or "")
        if named in _FLOATS:
            return _FLOATS[named]
    return otherwise


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


def four_bit(tensors: Tensors, config: Mapping[str, Any], where: str) -> Iterator[Found]:
    """Find nf4 and fp4 weights: `x.weight` packed, beside it absmax, quant_map and a quant_state in JSON.

    A stack of experts is named without `.weight`.
    """
    turned = config.get("model_type") in _CONV1D_MODELS
    ends = [(part, part if part.startswith(_STATE) else f".weight{part}") for part in _FOUR_BIT_PARTS]
    owners = [n.removesuffix(part) for n in tensors for part, end in ends if n.endswith(end)]
    for name in dict.fromkeys(owners):
        states = [f"{name}{_STATE}{kind}" for kind in ("nf4", "fp4") if f"{name}{_STATE}{kind}" in tensors]
        for needed in (name, f"{name}.absmax", f"{name}.quant_map"):
            if needed not in tensors:
                refuse(name, f"the quantised weight has no {needed.removeprefix(name + '.')!r}", where)
        if len(states) != 1:
            refuse(name, f"the quantised weight has {len(states)} quant_state tensors, not one", where)
        kind = states[0].removeprefix(name + _STATE)
        state = _quant_state(tensors[states[0]], kind, where)
        found = _four_bit(name, kind, state, tensors, where)
        fates = dict.fromkeys((states[0], f"{name}.quant_map"), "read")
        spare = [n for end in _FOUR_BIT_PARTS if (n := name + end) in tensors and n not in (*found.parts, *fates)]
        if spare:
            refuse(spare[0], "the weight's quant_state does not mention it", where)
        yield found._replace(ref=found.ref.transposed() if turned else found.ref, fates=fates)


def _four_bit(name: str, kind: str, state: Mapping[str, Any], tensors: Tensors, where: str) -> Found:
    """Put a 4-bit weight together; every size must be what shape and block size ask for."""
    shape, block = tuple(state["shape"]), state["blocksize"]
    blocks = _ceil(prod(shape), block)
    packed, absmax = tensors[name], tensors[f"{name}.absmax"]
    if packed.nbytes != _ceil(prod(shape), 2):
        refuse(name, f"{packed.nbytes:,} bytes cannot be the {kind} codes of shape {list(shape)}", where)
    codes = replace(packed, shape=(packed.nbytes,), dtype="U8")  # kept in any dtype: bnb_4bit_quant_storage
    _vector(tensors[f"{name}.quant_map"], 16, ("F32", "F16", "BF16"), where)  # its numbers are fixed by the kind
    parts = [name, f"{name}.absmax"]
    if "nested_offset" not in state:
        nested, stored = None, [codes, _vector(absmax, blocks, ("F32", "F16", "BF16"), where)]
    else:
        nested = Nested(state["nested_blocksize"], state["nested_offset"])
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
        missing = [part for part in parts if part not in tensors]
        if missing:
            refuse(name, f"the doubly quantised weight has no {missing[0].removeprefix(name + '.')!r}", where)
        groups = _vector(tensors[parts[2]], _ceil(blocks, nested.block), ("F32",), where)
        table = _vector(tensors[parts[3]], 256, ("F32",), where)
        stored = [codes, _vector(absmax, blocks, ("U8",), where), groups, table]
    encoding = FourBit(kind, block, nested)
    ref = quantised(name, shape, _FLOATS[state["dtype"]], stored, encoding)
    return Found(ref, f"{kind}, double quantised" if nested else kind, name, tuple(parts))


def _quant_state(ref: TensorRef, kind: str, where: str) -> dict[str, Any]:
    """Read bitsandbytes' description of a weight, and check what is relied on."""
    if ref.dtype != "U8" or ref.nbytes > _STATE_CAP:
        refuse(ref.name, "no quant_state", where)
    state = strictjson.parse(_read(ref), f"{where}: {ref.name!r}")
    shape, block, dtype = state.get("shape"), state.get("blocksize"), state.get("dtype")
    sound = state.get("quant_type") == kind and type(block) is int and block in _BLOCKS
    sound = sound and isinstance(dtype, str) and dtype in _FLOATS
    sound = sound and isinstance(shape, list) and 0 < len(shape) <= 4 and all(type(n) is int and n > 0 for n in shape)
    if "nested_offset" in state or "nested_blocksize" in state:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        sound = sound and type(size) is int and size > 0 and type(offset) in (int, float)
    if not sound:
        refuse(ref.name, "the quant_state does not say type, dtype, block size and shape as bitsandbytes does", where)
    return state


def int8(tensors: Tensors, config: Mapping[str, Any], where: str) -> Iterator[Found]:
    """Find int8 weights: `x.weight` (out, in), and the absmax of its rows in `x.SCB`."""
    for scale in [name for name in tensors if name.endswith(".SCB")]:
        module = scale.removesuffix(".SCB")
        name, layout = f"{module}.weight", f"{module}.weight_format"
        ref = tensors.get(name)
        if ref is None or ref.dtype != "I8" or len(ref.shape) != 2:
            refuse(scale, f"beside it is no int8 matrix {name!r}", where)
        if layout in tensors and any(_read(tensors[layout])):
            refuse(layout, "the weight is stored in tiles of an old GPU layout, not row by row", where)
        rows, columns = ref.shape
        scales = replace(_vector(tensors[scale], rows, ("F32",), where), shape=(rows, 1))
        encoding = Scaled("int8", (rows, columns), (1, columns))
        made = quantised(name, ref.shape, config_dtype(config, "F16"), [ref, scales], encoding)
        made = made.transposed() if config.get("model_type") in _CONV1D_MODELS else made
        yield Found(made, "int8", name, (name, scale), {layout: "read"} if layout in tensors else {})


# -- fp8 ---------------------------------------------------------------------------------------------------------------


def fp8(
    tensors: Tensors, config: Mapping[str, Any], where: str, blocks: Collection[tuple[int, int]]
) -> Iterator[Found]:
    """Find fp8 weights with a scale of their own: `X` and `X_scale_inv` or `X_scale`, matrices or stacks of them.

    ComfyUI calls the scale of `x.weight` `x.scale_weight`, and says so with a tensor `scaled_fp8`.

    `blocks` are the block sizes that the config names; the shape of the scales says whether they are one a block, a
    row, a column or a matrix. Both kinds of scale are factors, whatever they are called.
    """
    markers = [name for name in tensors if name.endswith(_MARKER)]
    for name, ref in tensors.items():
        module = name.removesuffix(".weight")
        ends = (f"{name}_scale_inv", f"{name}_scale", f"{module}.scale_weight")
        scales = [end for end in ends if end in tensors]
        if ref.dtype not in _FP8 or not scales:
            continue
        scale = tensors[scales[0]]
        if len(scales) > 1 or len(ref.shape) not in (2, 3) or not prod(ref.shape) or scale.dtype not in _SCALES:
            refuse(name, f"a weight of shape {list(ref.shape)} with {' and '.join(scales)} ({scale.dtype})", where)
        count, (rows, columns) = prod(ref.shape[:-2]), ref.shape[-2:]
        grid = _grid(scale, ref)
        tile = _tile((rows, columns), grid, blocks) if grid else None
        if grid is None or tile is None:
            refuse(name, f"scales of shape {list(scale.shape)} do not fit the weight's {list(ref.shape)}", where)
        stored = [
            replace(ref, shape=(count * rows, columns)),
            replace(scale, shape=(count * grid[0], grid[1])),
        ]
        made = quantised(name, ref.shape, config_dtype(config, "BF16"), stored, Scaled("fp8", (rows, columns), tile))
        spare = [other for end in _ACTIVATIONS for sep in "._" if (other := f"{module}{sep}{end}") in tensors]
        fates = dict.fromkeys(spare, _SPARE)
        fates |= {n: "says that the weights are scaled" for n in markers if name.startswith(n.removesuffix(_MARKER))}
        yield Found(made, f"fp8, {_called(tile, (rows, columns))}", name, (name, scales[0]), fates)


_SPARE = "scale of quantised activations"


def _grid(scale: TensorRef, ref: TensorRef) -> tuple[int, int] | None:
    """Return how many rows and columns of scales a matrix has, or None where the stacks differ."""
    count, rows = prod(ref.shape[:-2]), ref.shape[-2]
    if prod(scale.shape) == count:
        return 1, 1
    if len(scale.shape) == 1 and len(ref.shape) == 2 and scale.shape[0] == rows:
        return rows, 1
    if len(scale.shape) == len(ref.shape) and prod(scale.shape[:-2]) == count:
        return scale.shape[-2], scale.shape[-1]
    return None


def _tile(
    matrix: tuple[int, int], grid: tuple[int, int], blocks: Collection[tuple[int, int]]
) -> tuple[int, int] | None:
    """Return the tile of a scale. Blocks may be cut off at the edges, so they cannot be guessed from the grid."""
    fitting = {b for b in blocks if (_ceil(matrix[0], b[0]), _ceil(matrix[1], b[1])) == grid}
    whole = (matrix[0] if grid[0] == 1 else 1, matrix[1] if grid[1] == 1 else 1)
    if (_ceil(matrix[0], whole[0]), _ceil(matrix[1], whole[1])) == grid:
        return whole
    return fitting.pop() if len(fitting) == 1 else None


def _called(tile: tuple[int, int], matrix: tuple[int, int]) -> str:
    if tile == matrix:
        return "a scale a tensor"
    if tile[1] == matrix[1] and tile[0] == 1:
        return "a scale a row"
    return f"blocks of {tile[0]} x {tile[1]}"


# -- MXFP4 -------------------------------------------------------------------------------------------------------------


def mxfp4(tensors: Tensors, config: Mapping[str, Any], where: str) -> Iterator[Found]:
    """Find gpt-oss's experts: `X_blocks` (E, out, G, 16) and `X_scales` (E, out, G) mean X (E, in, out), in = 32 G."""
    for name, blocks in tensors.items():
        logical = name.removesuffix("_blocks")
        scales = tensors.get(f"{logical}_scales")
        if logical == name or blocks.dtype != "U8":
            continue
        if scales is None:
            refuse(name, f"the codes have no {logical.rpartition('.')[2]}_scales", where)
        if len(blocks.shape) != 4 or blocks.shape[3] != 16 or scales.dtype not in ("U8", "F8_E8M0"):
            raise UnsupportedError(f"{name!r}: MXFP4 of shape {list(blocks.shape)} is not known", where=where)
        if scales.shape != blocks.shape[:3] or not prod(blocks.shape):
            refuse(name, f"scales of shape {list(scales.shape)} do not fit {list(blocks.shape)}", where)
        count, out, groups, _ = blocks.shape
        stored = [
            replace(blocks, shape=(count * out, groups * 16)),
            replace(scales, shape=(count * out, groups), dtype="U8"),
        ]
        encoding = Transposed4Bit("mxfp4", (out, 32 * groups), range(32 * groups))
        ref = quantised(logical, (count, 32 * groups, out), config_dtype(config, "BF16"), stored, encoding)
        yield Found(ref, "mxfp4", name, (name, f"{logical}_scales"))


# -- small things ------------------------------------------------------------------------------------------------------


def _vector(ref: TensorRef, count: int, kinds: tuple[str, ...], where: str) -> TensorRef:
    """Return a tensor of `count` numbers as a vector, or refuse it by name."""
    if prod(ref.shape) != count or ref.dtype not in kinds:
        refuse(ref.name, f"{list(ref.shape)} of {ref.dtype}, where {count} of {' or '.join(kinds)} belong", where)
    return replace(ref, shape=(count,))


def _read(ref: TensorRef) -> bytes:
    """Read the bytes of a small tensor."""
    data = b""
    for piece in ref.pieces:
        if isinstance(piece, Inline):
            data += piece.data
            continue
        data += remote.read(Path(piece.path), piece.offset, piece.offset + piece.nbytes)
    return data


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
