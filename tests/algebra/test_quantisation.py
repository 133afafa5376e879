"""Codes and scales -> values and back, against bitsandbytes, transformers, and the formats' definitions in fp64."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from loratool.algebra import quantisation as q
from loratool.encodings import FourBit, Nested, Scaled, Transposed4Bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def random_bytes(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(torch.uint8)


def as_bitsandbytes(values: torch.Tensor, kind: str, block: int, *, nested: bool) -> tuple[torch.Tensor, object]:
    codes, state = bnb.quantize_4bit(values.flatten(), quant_type=kind, blocksize=block, compress_statistics=nested)
    return codes, state


def its_values(codes: torch.Tensor, state: object, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' values in one row: with more its AVX-512 kernel takes wrong scales where rows cut blocks."""
    state.shape, state.dtype = torch.Size([1, 2 * codes.numel()]), dtype  # type: ignore[attr-defined]
    return bnb.dequantize_4bit(codes, state).flatten()


# -- nf4 and fp4 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_tables_are_bitsandbytes_own(kind: str):
    assert torch.equal(bnb.get_4bit_type(kind, device="cpu"), torch.tensor(q.TABLES[kind]))


def test_the_dynamic_code_is_bitsandbytes_own():
    assert torch.equal(bnb.create_dynamic_map(), q.dynamic_table())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("count", [2, 62, 64, 66, 640, 5000])
def test_4bit_values_are_bitsandbytes_own(kind: str, count: int, dtype: torch.dtype):
    codes, state = as_bitsandbytes(normal(count), kind, 64, nested=False)
    ours = q.dequantise_4bit(codes.flatten(), state.absmax, kind, 64)
    assert torch.equal(ours.to(dtype), its_values(codes, state, dtype))


@pytest.mark.parametrize("blocks", [1, 3, 256, 257, 1000])
def test_doubly_quantised_scales_are_bitsandbytes_own(blocks: int):
    codes, state = as_bitsandbytes(normal(blocks * 64), "nf4", 64, nested=True)
    nested = Nested(256, state.offset.item())
    absmax = q.dequantise_absmax(state.absmax, state.state2.absmax, state.state2.code, nested)
    assert torch.equal(absmax, bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset)
    stored = [codes.flatten(), state.absmax, state.state2.absmax, state.state2.code]
    ours = q.decode(FourBit("nf4", 64, nested), stored, blocks * 64)
    assert torch.equal(ours, its_values(codes, state, torch.float32))


def test_an_odd_number_of_4bit_values_leaves_half_a_byte_over():
    codes, absmax = random_bytes(33), torch.tensor([0.5, 2.0])
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:65].long()
    expected = torch.tensor(q.NF4, dtype=torch.float64)[nibbles] * absmax.double().repeat_interleave(64)[:65]
    ours = q.decode(FourBit("nf4", 64), [codes, absmax], 65)
    assert ours.shape == (65,)
    assert torch.equal(ours, expected.float())


def test_a_block_of_zeros_stays_zero():
    values = torch.cat([torch.zeros(64), normal(64)])
    codes, state = as_bitsandbytes(values, "nf4", 64, nested=False)
    assert state.absmax[0] == 0
    assert not q.dequantise_4bit(codes.flatten(), state.absmax, "nf4", 64)[:64].any()


def test_a_scale_that_is_no_number_shows():
    codes = torch.full((64,), 0x77, dtype=torch.uint8)  # zeros: 0 x NaN is NaN
    values = q.dequantise_4bit(codes, torch.tensor([float("nan"), 1.0]), "nf4", 64)
    assert values[:64].isnan().all()
    assert not values[64:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (64, 64), (33, 130), (300, 258)])
@pytest.mark.parametrize("block", [64, 256])
def test_nf4_of_a_weight_is_what_bitsandbytes_makes_of_it(
    shape: tuple[int, int], nested: bool, block: int, dtype: torch.dtype
):
    weight = normal(*shape, dtype=dtype)
    codes, state = as_bitsandbytes(weight, "nf4", block, nested=nested)
    ours = q.quantise_nf4(weight, block, nested=nested)
    assert ours.dtype == dtype
    assert torch.equal(ours.flatten(), its_values(codes, state, dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_of_zeros_is_zeros(nested: bool):
    weight = torch.zeros(3, 50)
    assert not q.quantise_nf4(weight, nested=nested).any()


def test_nf4_takes_the_nearest_number_and_of_two_the_smaller():
    table = torch.tensor(q.NF4, dtype=torch.float32)
    middles = (table[:-1] + table[1:]) / 2
    beside = [torch.nextafter(x, torch.tensor(side)) for x in (middles, table) for side in (-2.0, 2.0)]
    values = torch.cat([middles, table, *beside, torch.linspace(-1, 1, 50_001)]).clamp(-1, 1)
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    blocks = torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1)  # the scale of every block is 1
    nearest = (blocks.double()[..., None] - table.double()).abs().argmin(-1)  # the first of two, which is the smaller
    found = q.quantise_nf4(blocks)
    exact = (blocks[..., None] != middles).all(-1)  # middles are rounded: on them nothing is nearest in fp64
    assert torch.equal(found[exact], table[nearest][exact])
    at = torch.isin(blocks, middles)
    assert torch.equal(found[at], table[torch.searchsorted(middles, blocks[at])])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nf4_does_not_hide_what_is_not_finite(bad: float):
    weight = normal(2, 64)
    weight[1, 5] = bad
    found = q.quantise_nf4(weight)
    assert not torch.isfinite(found[1]).all()
    assert torch.equal(found[0], q.quantise_nf4(weight[:1])[0])


def test_nf4_of_part_of_a_weight_is_that_part_of_nf4():
    weight = normal(48, 96)  # a row is one and a half blocks
    scales = q.double_quantised(q.block_absmax(weight))
    part = q.quantise_nf4(weight[16:32], absmax=scales[24:48])
    assert torch.equal(part, q.quantise_nf4(weight, nested=True)[16:32])


# -- int8 --------------------------------------------------------------------------------------------------------------


def test_int8_values_are_bitsandbytes_own():
    codes, scales, _ = bnb.int8_vectorwise_quant(normal(17, 50).half())
    ours = q.decode(Scaled("int8", (17, 50), (1, 50)), [codes, scales[:, None]], 17 * 50)
    assert torch.equal(ours.view(17, 50), bnb.int8_vectorwise_dequant(codes, scales))


# -- fp8 ---------------------------------------------------------------------------------------------------------------


def fp8_by_definition(codes: torch.Tensor, scales: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    rows, columns = codes.shape
    expected = codes.double()
    for row in range(rows):
        for column in range(columns):
            expected[row, column] *= scales[row // tile[0], column // tile[1]].double()
    return expected.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [(4, 8), (16, 24), (1, 24)])
def test_fp8_values_are_transformers_own(tile: tuple[int, int], dtype: torch.dtype):
    codes = normal(16, 24, dtype=torch.float32).mul(1000).to(torch.float8_e4m3fn)
    scales = normal(16 // tile[0], 24 // tile[1], seed=1).abs()
    ours = q.decode(Scaled("fp8", (16, 24), tile), [codes, scales], 16 * 24)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
    assert torch.equal(ours.view(16, 24).to(dtype), theirs)


@pytest.mark.parametrize("shape", [(5, 7), (8, 9), (9, 8), (3, 2)])
def test_fp8_blocks_may_be_cut_off_at_the_edges(shape: tuple[int, int]):
    codes = normal(*shape).mul(1000).to(torch.float8_e4m3fn)
    scales = normal(-(-shape[0] // 4), -(-shape[1] // 4), seed=1).abs()
    ours = q.decode(Scaled("fp8", shape, (4, 4)), [codes, scales], codes.numel())
    assert torch.equal(ours.view(shape), fp8_by_definition(codes, scales, (4, 4)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_code_is_what_torch_makes_of_it(dtype: torch.dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)
    ours = q.decode(Scaled("fp8", (16, 16), (16, 16)), [codes, torch.ones(1, 1)], 256)
    torch.testing.assert_close(ours.view(16, 16), codes.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit()[:127], codes.float().signbit().flatten()[:127])
    assert ours[128].signbit()  # -0


def test_fp8_scales_may_be_powers_of_two_in_bytes():
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0, 127], [254, 255]], dtype=torch.uint8)
    for stored in (scales, scales.view(torch.float8_e8m0fnu)):
        ours = q.decode(Scaled("fp8", (4, 4), (2, 2)), [codes, stored], 16).view(4, 4)
        assert ours[0].tolist() == [2.0**-127, 2.0**-127, 1.0, 1.0]
        assert ours[3, 0] == 2.0**127
        assert ours[3, 2:].isnan().all()


def test_an_fp8_scale_or_code_that_is_no_number_shows():
    codes = torch.zeros(2, 4).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[1, 3] = 0x7F
    values = q.decode(Scaled("fp8", (2, 4), (1, 4)), [codes, torch.tensor([[float("nan")], [1.0]])], 8).view(2, 4)
    assert values.isnan().tolist() == [[True] * 4, [False] * 3 + [True]]


FP8_TILES = [((16, 24), (4, 8)), ((5, 7), (4, 4)), ((16, 24), (1, 24)), ((5, 7), (5, 7))]


@pytest.mark.parametrize(("shape", "tile"), FP8_TILES)
def test_fp8_values_that_nobody_changed_are_requantised_to_themselves(shape: tuple[int, int], tile: tuple[int, int]):
    codes, scales = q.requantise_fp8(normal(*shape), tile)
    layout = Scaled("fp8", shape, tile)
    for dtype in DTYPES:
        values = q.decode(layout, [codes, scales], codes.numel()).view(shape).to(dtype)
        again, same = q.requantise_fp8(values, tile, scales)
        assert torch.equal(same, scales)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(("shape", "tile"), FP8_TILES)
def test_fp8_rounds_to_the_nearest_code(shape: tuple[int, int], tile: tuple[int, int]):
    values = normal(*shape, seed=3)
    codes, scales = q.requantise_fp8(values, tile)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[~every.isnan()]
    spread = scales.double().repeat_interleave(tile[0], 0)[: shape[0]].repeat_interleave(tile[1], 1)[:, : shape[1]]
    best = (values.double()[..., None] - every * spread[..., None]).abs().amin(-1)
    error = (values.double() - codes.double() * spread).abs()
    assert (error <= best * (1 + 1e-6) + 1e-12).all()
    assert (error <= torch.maximum(values.double().abs() / 16, spread / 1024) * (1 + 1e-6)).all()
    for high in range(0, shape[0], tile[0]):
        for wide in range(0, shape[1], tile[1]):
            assert codes[high : high + tile[0], wide : wide + tile[1]].float().abs().max() == 448


def test_an_fp8_scale_grows_only_where_values_outgrow_it():
    values = normal(4, 8)
    _, scales = q.requantise_fp8(values, (2, 4))
    values[0, 0] = 5.0
    codes, after = q.requantise_fp8(values, (2, 4), scales)
    assert after[0, 0] == pytest.approx(5 / 448)
    assert torch.equal(after.flatten()[1:], scales.flatten()[1:])
    assert codes[0, 0].float() == 448


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu, torch.uint8], ids=str)
def test_new_fp8_scales_have_the_dtype_of_the_old_ones(dtype: torch.dtype):
    old = torch.ones(1, 1).to(torch.float8_e8m0fnu).view(torch.uint8) if dtype == torch.uint8 else torch.ones(1, 1)
    values = normal(4, 4) * 1e6
    codes, scales = q.requantise_fp8(values, (4, 4), old.to(dtype))
    assert scales.dtype == dtype
    back = q.decode(Scaled("fp8", (4, 4), (4, 4)), [codes, scales], 16).view(4, 4)
    bound = torch.maximum(values.abs() / 16, values.abs().max() / 448 / 256)
    assert ((back - values).abs() <= bound).all()


def test_powers_of_two_are_rounded_up():
    values = torch.tensor([[448.0 * 4, 1], [448.0 * 4.1, 1]])
    _, scales = q.requantise_fp8(values, (1, 2), power_of_two=True)
    assert scales.flatten().tolist() == [4, 8]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fp8_does_not_hide_what_is_not_finite(bad: float):
    values = torch.tensor([[1.0, bad], [1.0, 2.0]])
    codes, scales = q.requantise_fp8(values, (1, 2))
    back = q.decode(Scaled("fp8", (2, 2), (1, 2)), [codes, scales], 4).view(2, 2)
    assert not back[0, 1].isfinite()
    assert back[1].tolist() == [1, 2]


def test_fp8_of_zeros_is_zeros():
    codes, scales = q.requantise_fp8(torch.zeros(3, 4), (2, 2))
    assert scales.isfinite().all()
    assert not codes.float().any()
    assert not q.requantise_fp8(torch.zeros(1, 2), (1, 2), torch.zeros(1, 1))[0].float().any()


# -- MXFP4 -------------------------------------------------------------------------------------------------------------


def test_mxfp4_values_are_transformers_own():
    codes, scales = random_bytes(2, 6, 3, 16), random_bytes(2, 6, 3, seed=1, low=100, high=140)
    theirs = convert_moe_packed_tensors(codes, scales)
    layout = Transposed4Bit("mxfp4", (6, 96), range(96))
    ours = q.decode(layout, [codes.view(12, 48), scales.view(12, 3)], theirs.numel())
    assert torch.equal(ours.view(theirs.shape).bfloat16(), theirs)


def test_columns_of_mxfp4_need_not_begin_or_end_a_group():
    codes, scales = random_bytes(2, 5, 3, 16), random_bytes(2, 5, 3, seed=1, low=100, high=140)
    whole = convert_moe_packed_tensors(codes, scales).float()
    for columns in (range(1), range(31, 33), range(40, 96), range(95, 96)):
        layout = Transposed4Bit("mxfp4", (5, 96), columns)
        ours = q.decode(layout, [codes.view(10, 48), scales.view(10, 3)], 2 * 5 * len(columns))
        assert torch.equal(ours.view(2, len(columns), 5), whole[:, columns.start : columns.stop])


def test_the_extremes_of_mxfp4_scales():
    codes = torch.full((4, 16), 0x21, dtype=torch.uint8)  # 0.5 first, then 1
    values = q.dequantise_mxfp4(codes, torch.tensor([[0], [1], [254], [255]], dtype=torch.uint8))
    assert values[:, :2].tolist()[:3] == [[2.0**-128, 2.0**-127], [2.0**-127, 2.0**-126], [2.0**126, 2.0**127]]
    assert values[3].isnan().all()
    assert torch.equal(values[:3].bfloat16().float(), values[:3])


def by_definition(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
    values = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0).double()
    return values * torch.pow(2.0, scales.double() - 127).repeat_interleave(32, -1)


@given(st.integers(0, 10_000), st.integers(0, 254))
def test_mxfp4_values_that_nobody_changed_are_requantised_to_themselves(seed: int, scale: int):
    codes, scales = random_bytes(3, 32, seed=seed), torch.full((3, 2), scale, dtype=torch.uint8)
    codes[0] &= 0x33  # small codes: the scale that was used is not the smallest that could have been
    values = q.dequantise_mxfp4(codes, scales)
    if values.isfinite().all():
        again = q.dequantise_mxfp4(*q.requantise_mxfp4(values))
        assert torch.equal(again.view(torch.int32), values.view(torch.int32))  # signs of zeros, too


@given(st.integers(0, 10_000), st.integers(-100, 100))
def test_mxfp4_rounds_to_the_nearest_code(seed: int, exponent: int):
    values = normal(4, 64, seed=seed) * 2.0**exponent
    codes, scales = q.requantise_mxfp4(values)
    unit = torch.pow(2.0, scales.double() - 127).repeat_interleave(32, -1)
    every = torch.cat([E2M1, -E2M1])
    best = (values.double()[..., None] - every * unit[..., None]).abs().amin(-1)
    error = (values.double() - by_definition(codes, scales)).abs()
    largest = values.double().view(4, 2, 32).abs().amax(-1).repeat_interleave(32, -1)
    assert torch.equal(error, best)
    assert (error <= largest / 3).all()
    assert (largest <= 6 * unit).all()


def test_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    values = torch.cat([ties, -ties, torch.zeros(16)])
    codes, scales = q.requantise_mxfp4(values)
    assert scales.tolist() == [127]
    assert by_definition(codes, scales)[:8].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert by_definition(codes, scales)[8:16].tolist() == [0, -1, -1, -2, -2, -4, -4, -6]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_mxfp4_does_not_hide_what_is_not_finite(bad: float):
    values = torch.ones(64)
    values[5] = bad
    codes, scales = q.requantise_mxfp4(values)
    assert scales.tolist() == [255, 125]
    back = q.dequantise_mxfp4(codes, scales)
    assert back[:32].isnan().all()
    assert torch.equal(back[32:], torch.ones(32))


def test_mxfp4_of_zeros_and_of_the_largest_numbers():
    values = torch.zeros(64)
    values[32:] = torch.finfo(torch.float32).max
    back = q.dequantise_mxfp4(*q.requantise_mxfp4(values))
    assert not back[:32].any()
    assert back[32:].isinf().all()  # 2^128, to which it is rounded, is no fp32 number
    assert q.dequantise_mxfp4(*q.requantise_mxfp4(torch.full((32,), 2.0**127))).tolist() == [2.0**127] * 32
