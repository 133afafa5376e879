"""Quantised weights: stored codes and scales -> values, and values -> codes and scales. Plain tensors in and out.

Arithmetic is fp32, as in the libraries whose files these are, so that what a model computed with comes out bit for bit.

    nf4, fp4   table[code] x absmax of 64 neighbours of the flattened tensor    Dettmers et al., QLoRA (2023)
    int8       code x absmax of the row / 127                                   Dettmers et al., LLM.int8() (2022)
    fp8        E4M3 value x scale of the tile                                   DeepSeek-V3 (2024), section 3.3
    mxfp4      E2M1 value x 2^(scale - 127) of 32 neighbours                    OCP Microscaling Formats 1.0 (2023)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from loratool.encodings import Encoding, FourBit, Nested, Scaled

#: The quantiles of a normal distribution that nf4's codes stand for (QLoRA, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # bitsandbytes' own order of bits, in twelfths
TABLES = {
    "nf4": NF4,
    "fp4": tuple(sign * value for sign in (1 / 12, -1 / 12) for value in _FP4),
    "mxfp4": tuple(sign * value for sign in (1, -1) for value in _E2M1),
}
_INT8_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it
_POWERS = (torch.float8_e8m0fnu, torch.uint8)  # dtypes of scales that hold nothing but powers of two
_SLACK = 1 + 2**-7  # what rounding to 16 bits may add to the largest value under a scale; it is far from the next code
_CELLS = 64  # of equal width from -1 to 1: less than the distance of two middles
_TINY = 1e-38  # what bitsandbytes divides a block of zeros by


def decode(
    encoding: Encoding, stored: Sequence[torch.Tensor], count: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return `count` values, (count,), of stored tensors as the encoding names them; fp32 inside, rounded once."""
    if isinstance(encoding, FourBit):
        absmax = stored[1].float()
        if encoding.nested:
            absmax = dequantise_absmax(stored[1], stored[2].float(), stored[3].float(), encoding.nested)
        values = dequantise_4bit(stored[0], absmax, encoding.name, encoding.block)
        return values[encoding.skip : encoding.skip + count].to(dtype)
    if isinstance(encoding, Scaled):
        return dequantise_tiles(stored[0], stored[1], encoding).flatten().to(dtype)
    wanted = encoding.columns
    first, last = wanted.start // 32, -(-wanted.stop // 32)
    values = dequantise_mxfp4(stored[0][:, 16 * first : 16 * last], stored[1][:, first:last])  # (E x out, columns)
    values = values[:, wanted.start - 32 * first : wanted.stop - 32 * first].to(dtype)
    return values.reshape(-1, encoding.matrix[0], len(wanted)).transpose(1, 2).flatten()


# -- stored -> values --------------------------------------------------------------------------------------------------


def dequantise_4bit(codes: torch.Tensor, absmax: torch.Tensor, name: str, block: int) -> torch.Tensor:
    """Return fp32 (2 x bytes,) of packed codes U8 (bytes,) that begin with a block; absmax fp32 (blocks,)."""
    return _times_blocks(_unpacked(codes, name, high_first=True).flatten(), absmax, block)


def dequantise_absmax(codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, nested: Nested) -> torch.Tensor:
    """Return absmax fp32 (blocks,) from its codes U8 (blocks,), their absmax (groups,) and the table (256,)."""
    group = (torch.arange(len(codes), device=codes.device) + nested.skip) // nested.block
    return table[codes.int()] * absmax[group] + nested.offset


def dequantise_tiles(values: torch.Tensor, scales: torch.Tensor, encoding: Scaled) -> torch.Tensor:
    """Return fp32 (rows, columns) of int8 or fp8 values of that shape; scales (rows of tiles, columns of tiles)."""
    values = _float8(values) if values.dtype.is_floating_point else values.float()
    rows, columns = min(encoding.matrix[0], len(values)), values.shape[1]
    matrices = values.view(-1, rows, columns)  # (E, rows, columns)
    per_tile = _as_scales(scales).view(len(matrices), -1, scales.shape[1])  # (E, tile rows, tile columns)
    height = encoding.tile[0]
    spread = per_tile.repeat_interleave(height, dim=1)[:, encoding.skip : encoding.skip + rows]
    width = encoding.tile[1]
    whole = columns // width
    matrices[..., : whole * width].view(*matrices.shape[:2], whole, width).mul_(spread[..., :whole, None])
    matrices[..., whole * width :].mul_(spread[..., whole:])
    return values.mul_(_INT8_STEP) if encoding.name == "int8" else values


def dequantise_mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return fp32 (..., 32 x G) of packed codes U8 (..., 16 x G) and scales U8 (..., G). A scale of 255 is NaN."""
    values = _unpacked(codes, "mxfp4", high_first=False).view(*scales.shape, 32)
    return values.mul_(_as_scales(scales)[..., None]).flatten(-2)


def _unpacked(codes: torch.Tensor, name: str, *, high_first: bool) -> torch.Tensor:
    """Return what packed codes U8 (...) stand for: fp32 (..., 2)."""
    pairs = _pairs(name, high_first).to(codes.device)
    return pairs.index_select(0, codes.flatten().int()).view(torch.float32).view(*codes.shape, 2)


@cache
def _pairs(name: str, high_first: bool) -> torch.Tensor:
    """Return the two values that each byte stands for, fp32, side by side in one int64 (256,): looked up at once."""
    table = torch.tensor(TABLES[name], dtype=torch.float32)
    high, low = table.repeat_interleave(16), table.repeat(16)
    return torch.stack([high, low] if high_first else [low, high], dim=1).view(torch.int64).flatten()


def _float8(codes: torch.Tensor) -> torch.Tensor:
    """Return fp8 of either kind as fp32, bit for bit what `float()` gives: on CPUs that goes number by number.

    E5M2 is the upper half of an fp16. The bits of E4M3, moved up, are an fp16 256 times smaller; the largest is NaN.
    """
    if codes.device.type != "cpu":
        return codes.float()
    bits = codes.contiguous().view(torch.uint8).to(torch.int16)
    if codes.dtype == torch.float8_e5m2:
        return (bits << 8).view(torch.float16).float()
    magnitude = bits & 0x7F
    values = (magnitude << 7 | (bits & 0x80) << 8).view(torch.float16).float().mul_(256)
    if bits.numel() and int(magnitude.max()) == 0x7F:
        values.masked_fill_(magnitude == 0x7F, torch.nan)
    return values


def _times_blocks(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply a vector by its blocks' scales, in place; the last block may be partial."""
    whole = len(values) // block
    values[: whole * block].view(-1, block).mul_(scales[:whole, None])
    values[whole * block :].mul_(scales[whole:])
    return values


def _as_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return scales of any dtype as fp32. Plain bytes are E8M0: powers of two from 2^-127 on, and 255 is NaN."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def _stored_scales(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return fp32 scales in the dtype of a file."""
    return scales.to(torch.float8_e8m0fnu).view(torch.uint8) if dtype == torch.uint8 else scales.to(dtype)


# -- values -> stored --------------------------------------------------------------------------------------------------


def requantise_fp8(
    values: torch.Tensor,
    tile: tuple[int, int],
    scales: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    power_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp8 (..., rows, columns) and scales (..., tile rows, tile columns) of values; tile (1, columns) is a row.

    Where the base's own `scales` are given, they stay wherever the values still fit under them: values that nobody
    changed come back as they were. A new scale maps the largest value of its tile to the largest fp8 number, and is
    rounded to the dtype of the given ones (fp32 without), or up to a power of two. Codes are rounded to nearest, ties
    to even: the error of E4M3 is at most 2^-4 of a value, or 2^-10 of a scale where that is more. NaN and infinity stay
    visible.
    """
    values = values.float()
    limit = torch.finfo(dtype).max
    largest = _tile_amax(values, tile)
    fresh = (largest / limit).clamp(min=torch.finfo(torch.float32).tiny)
    fresh = torch.where(largest > 0, fresh, torch.where(largest == 0, torch.ones_like(fresh), largest))
    kind = torch.float32 if scales is None else scales.dtype
    fresh = _power_above(fresh) if power_of_two or kind in _POWERS else fresh
    fresh = _as_scales(_stored_scales(fresh, kind))
    if scales is not None:
        own = _as_scales(scales)
        fresh = torch.where((largest <= limit * _SLACK * own) & (own > 0), own, fresh)
    rows, columns = values.shape[-2:]
    spread = fresh.repeat_interleave(tile[0], dim=-2)[..., :rows, :]
    spread = spread.repeat_interleave(tile[1], dim=-1)[..., :columns]
    codes = (values / spread).clamp(-limit, limit).to(dtype)
    return codes, _stored_scales(fresh, kind)


def encode_like(
    encoding: Encoding, values: torch.Tensor, stored: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales, and what they stand for, of new values (rows, columns) of one matrix, fp32.

    `stored` are the codes and scales that the base has for these rows: scales stay where the values fit under them.
    """
    if isinstance(encoding, Scaled) and encoding.name == "fp8":
        scales = stored[1].view(-1, stored[1].shape[-1])
        codes, fresh = requantise_fp8(values, encoding.tile, scales, dtype=stored[0].dtype)
        return codes, fresh, dequantise_tiles(codes, fresh, encoding)
    codes, fresh = requantise_mxfp4(values.T.contiguous())  # what is stored is the transpose
    return codes, fresh, dequantise_mxfp4(codes, fresh).T


def requantise_mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes U8 (..., n / 2) and scales U8 (..., n / 32) of values (..., n); their last axis is `in`.

    The scale of a group is the smallest power of two under which no value exceeds 6, the largest E2M1 number, so that
    nothing saturates; codes are rounded to nearest, ties to even. What MXFP4 can hold comes back as it was. The error
    is at most 1 in units of the scale, a third of the group's largest value at worst.
    """
    groups = values.float().reshape(*values.shape[:-1], -1, 32)
    largest = groups.abs().amax(-1)
    mantissa, exponent = torch.frexp(largest)  # mantissa in [1/2, 1), and 6 = 3/4 x 2^3
    exponent = (exponent - torch.where(mantissa > 0.75, 2, 3)).clamp(-127, 127)
    exponent = torch.where(largest > 0, exponent, -127)
    sound = torch.isfinite(largest)
    scaled = torch.ldexp(groups, -exponent[..., None])
    codes = torch.bucketize(scaled.abs(), _e2m1_bounds().to(values.device)).to(torch.uint8)
    codes |= torch.signbit(scaled).to(torch.uint8) << 3
    codes = codes.flatten(-2)
    scales = torch.where(sound, exponent + 127, 255).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def _tile_amax(values: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Return the largest magnitude in each tile of (..., rows, columns): (..., tile rows, tile columns)."""
    rows, columns = values.shape[-2:]
    grid = -(-rows // tile[0]), -(-columns // tile[1])
    padding = (0, grid[1] * tile[1] - columns, 0, grid[0] * tile[0] - rows)
    padded = torch.nn.functional.pad(values.abs(), padding)
    return padded.reshape(*values.shape[:-2], grid[0], tile[0], grid[1], tile[1]).amax(dim=(-3, -1))


def _power_above(numbers: torch.Tensor) -> torch.Tensor:
    """Return the smallest powers of two that are not below positive numbers; NaN and infinity stay."""
    mantissa, exponent = torch.frexp(numbers)
    powers = torch.ldexp(torch.ones_like(numbers), exponent - (mantissa == 0.5).int())
    return torch.where(torch.isfinite(numbers), powers, numbers)


@cache
def _e2m1_bounds() -> torch.Tensor:
    """Return the largest magnitudes that are rounded to each E2M1 number but the last: fp32 (7,), ties to even."""
    table = torch.tensor(_E2M1)
    middle = (table[:-1] + table[1:]) / 2
    up = torch.arange(7) % 2 == 1  # a tie between an odd code and the next belongs to the next
    return torch.where(up, torch.nextafter(middle, torch.zeros(7)), middle)


# -- what training with a quantised base saw ---------------------------------------------------------------------------


def quantise_nf4(
    values: torch.Tensor, block: int = 64, *, nested: bool = False, absmax: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what nf4 makes of values, in their shape and dtype: dequant(quant(W)) as bitsandbytes does it on a CPU.

    `nested` quantises the blocks' absmax, too, which needs all of the tensor at once. For a part of one that begins
    with a block, give instead the part's share of double_quantised(block_absmax(W)) as `absmax`, fp32 (blocks,).
    """
    flat = values.flatten().float()
    own = block_absmax(flat, block)
    whole = len(flat) // block
    scaled = flat.clone()
    scaled[: whole * block].view(-1, block).mul_(1 / own[:whole, None].clamp(min=_TINY))
    scaled[whole * block :].div_(own[whole:].clamp(min=_TINY))
    nearest = _nearest_nf4(scaled.nan_to_num_(1.0).clamp_(-1, 1))
    if absmax is None:
        absmax = double_quantised(own) if nested else own
    return _times_blocks(nearest, absmax, block).view(values.shape).to(values.dtype)


def _nearest_nf4(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest of nf4's numbers to fp32 values from -1 to 1, the smaller of two: a third of bucketize's time.

    The line is cut into cells in each of which at most one middle between two of the numbers lies.
    """
    low, high, middle = (column.to(values.device) for column in _nf4_cells())
    cells = values.add(1).mul_(_CELLS / 2).int()
    above = values > middle.index_select(0, cells)
    return torch.where(above, high.index_select(0, cells), low.index_select(0, cells))


@cache
def _nf4_cells() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return of each cell from -1 on what stands below its middle, what above it, and the middle: fp32 (cells + 1,)."""
    table = torch.tensor(NF4, dtype=torch.float32)
    middles = (table[:-1] + table[1:]) / 2
    places = ((middles + 1) * (_CELLS / 2)).long()
    below = torch.bucketize(torch.arange(_CELLS + 1), places)  # the number of middles in the cells before
    middle = torch.full((_CELLS + 1,), 2.0)
    middle[places] = middles
    return table[below], table[(below + 1).clamp(max=15)], middle


def block_absmax(values: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Return the largest magnitude in each block of the flattened tensor: fp32 (blocks,)."""
    flat = values.flatten().float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block))
    return padded.view(-1, block).abs().amax(1)


def double_quantised(absmax: torch.Tensor) -> torch.Tensor:
    """Return what double quantisation makes of a tensor's absmax, fp32 (blocks,): 8-bit codes around its mean."""
    mean = absmax.mean()
    centred = absmax - mean
    largest = block_absmax(centred, 256)
    table = dynamic_table().to(absmax.device)
    inverse = torch.where(largest > 0, 1 / largest, 0)
    scaled = _times_blocks(centred.clone(), inverse, 256).clamp_(-1, 1)
    codes = _dynamic_codes().to(absmax.device)[((scaled + 1) * 0.5 * 65535 + 0.5).int()]
    return _times_blocks(table[codes.int()], largest, 256) + mean


@cache
def dynamic_table() -> torch.Tensor:
    """Return the 256 numbers of the signed dynamic code, fp32, ascending (Dettmers, 8-bit approximations, 2015).

    A decade 10^(n - 6) to 10^(n - 7) is cut into 2^n equal steps, whose middles stand for them; and there are 0 and 1.
    """
    numbers = [torch.tensor([0.0, 1.0])]
    for n in range(7):
        edges = torch.linspace(0.1, 1, 2**n + 1, dtype=torch.float32)
        middles = 10.0 ** (n - 6) * ((edges[:-1] + edges[1:]) / 2)
        numbers += [middles, -middles]
    return torch.cat(numbers).sort().values


@cache
def _dynamic_codes() -> torch.Tensor:
    """Return the nearest code to each of 65536 equidistant numbers from -1 to 1: bitsandbytes' short cut on CPUs."""
    table = dynamic_table()
    numbers = torch.arange(65536, dtype=torch.float32) * 2 / 65535 - 1
    return torch.bucketize(numbers, 0.5 * (table[:-1] + table[1:]), out_int32=True)
