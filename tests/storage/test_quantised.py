"""Quantised checkpoints are read as what they stand for, whole or a few rows at a time; what is unclear is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from quantised_files import EXPERTS, FOLDERS, expected, read_all
from safetensors.torch import save_file
from tiny_files import write_json

from loratool.errors import FormatError, UnsupportedError
from loratool.storage.checkpoint import Checkpoint, open_base
from loratool.storage.load import Loader
from loratool.storage.quantised import made_of, summary, without_quantisation
from loratool.tensors import Inline, TensorRef

NF4 = bnb.get_4bit_type("nf4", device="cpu").double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folders("nf4")`: a checkpoint, written once."""
    root = tmp_path_factory.mktemp("quantised")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            FOLDERS[kind](root / kind)
        return root / kind

    return folder


def load(ref: TensorRef) -> torch.Tensor:
    with Loader() as loader:
        return loader(ref)


def stored_bytes(ref: TensorRef) -> int:
    return sum(piece.nbytes for piece in {*ref.pieces})


def written(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {"model_type": "llama", **config})
    return folder


def nf4_tensors(
    weight: torch.Tensor, name: str = "x.weight", *, nested: bool = False, **changes: Any
) -> dict[str, torch.Tensor]:
    """A weight as bitsandbytes saves it, with `changes` to its quant_state (None: left out)."""
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    beside = state.as_dict(packed=True)
    key = next(key for key in beside if "quant_state" in key)
    if changes:
        said = {**json.loads(bytes(beside[key].tolist())), **changes}
        text = json.dumps({k: v for k, v in said.items() if v is not None})
        beside[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return {name: codes, **{f"{name}.{key}": value for key, value in beside.items()}}


# -- what the libraries write ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_checkpoint_is_read_as_its_own_library_reads_it(kind: str, folders: Callable[[str], Path]):
    opened = open_base(str(folders(kind)))
    wanted = expected(folders(kind))
    assert opened.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        found = load(opened.tensors[name])
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name
        assert opened.tensors[name].info == (name, tuple(tensor.shape), opened.tensors[name].dtype)


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_row_can_be_read_alone_and_from_its_own_bytes(kind: str, folders: Callable[[str], Path]):
    opened = open_base(str(folders(kind)))
    assert opened.quantised
    for name in list(opened.quantised)[:7]:
        ref = opened.tensors[name]
        flat = TensorRef(name, (prod(ref.shape[:-1]), ref.shape[-1]), ref.dtype, ref.pieces, ref.view)
        whole = load(flat)
        rows = flat.shape[0]
        for start, stop in [(0, 1), (1, 2), (3, 7), (rows // 3, rows // 3 + 9), (rows - 1, rows), (5, rows - 5)]:
            part = flat.rows(start, stop)
            assert part.shape == (stop - start, flat.shape[1])
            assert torch.equal(load(part), whole[start:stop]), (name, start, stop)
            again = part.rows(0, part.shape[0] // 2 + 1).rows(0, 1)
            assert torch.equal(load(again), whole[start : start + 1])
            assert pickle.loads(pickle.dumps(part)) == part
        if kind != "mxfp4":
            few, fixed = stored_bytes(flat.rows(4, 6)), 4 * 256 + 4 * 64 * len(flat.pieces)
            assert few < 2 * stored_bytes(flat) * 2 / rows + fixed


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_stored_tensor_is_in_a_logical_one_or_has_a_fate(kind: str, folders: Callable[[str], Path]):
    opened = open_base(str(folders(kind)))
    used = {piece for ref in opened.tensors.values() for piece in ref.pieces}
    assert opened.stored.keys() == read_all(folders(kind)).keys()
    for name, ref in opened.stored.items():
        assert (name in opened.spent) != (set(ref.pieces) <= used), name
    assert opened.spent.keys() <= opened.stored.keys()


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_rows_together_read_every_byte(kind: str, folders: Callable[[str], Path]):
    opened = open_base(str(folders(kind)))
    name = next(iter(opened.quantised))
    ref = opened.tensors[name]
    read: dict[int, int] = {}
    for start in range(ref.shape[0]):
        for piece in ref.rows(start, start + 1).pieces:
            assert not isinstance(piece, Inline)
            read.update(dict.fromkeys(range(piece.offset, piece.offset + piece.nbytes), 1))
    wanted = {n for piece in ref.pieces for n in range(piece.offset, piece.offset + piece.nbytes)}  # type: ignore[union-attr]
    assert read.keys() == wanted


def test_what_a_weight_is_made_of(folders: Callable[[str], Path]):
    opened, name = open_base(str(folders("nf4-nested"))), "model.layers.0.self_attn.q_proj.weight"
    parts = {name, *(f"{name}.{part}" for part in ("absmax", "nested_absmax", "nested_quant_map"))}
    assert made_of(opened, [name, "lm_head.weight"]) == parts
    assert summary(opened.quantised) == "14 weights in nf4, double quantised"
    opened = open_base(str(folders("mxfp4")))
    name = "model.layers.1.mlp.experts.down_proj"
    assert made_of(opened, [name]) == {f"{name}_blocks", f"{name}_scales"}


def test_the_shards_are_those_of_a_16_bit_checkpoint(folders: Callable[[str], Path]):
    opened = open_base(str(folders("nf4-nested")))
    (shard,) = opened.shards
    assert shard.header.raw == b""
    assert {ref.name: ref for ref in shard.header.tensors} == dict(opened.tensors)
    assert {ref.dtype for ref in shard.header.tensors} == {"BF16"}
    assert opened.quantised["model.layers.0.self_attn.q_proj.weight"] == "nf4, double quantised"
    assert "lm_head.weight" not in opened.quantised
    assert "quantization_config" in (opened.config or {})


def test_a_checkpoint_that_is_not_quantised_stays_as_it_is(tmp_path: Path):
    opened = open_base(str(written(tmp_path, {"a.weight": torch.ones(2, 3), "a.layer_scale": torch.ones(2)})))
    assert opened.shards[0].header.raw
    assert not opened.quantised
    assert not opened.stored
    assert not opened.spent


def test_scales_may_lie_in_another_shard(tmp_path: Path):
    tensors = nf4_tensors(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)))
    names = {"one.safetensors": ["x.weight"], "two.safetensors": [n for n in tensors if n != "x.weight"]}
    for file, mine in names.items():
        more = {"one.safetensors": {"y.weight": torch.ones(3)}, "two.safetensors": {}}[file]
        save_file({n: tensors[n] for n in mine} | more, tmp_path / file)
    weight_map = {n: file for file, mine in names.items() for n in mine} | {"y.weight": "one.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    opened = open_base(str(tmp_path))
    assert [shard.name for shard in opened.shards] == ["one.safetensors"]
    assert opened.index["weight_map"] == {"x.weight": "one.safetensors", "y.weight": "one.safetensors"}
    assert load(opened.tensors["x.weight"]).shape == (6, 64)


def test_a_conv1d_is_turned_back(tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).bfloat16().save_pretrained(tmp_path / "plain")
    live = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
        dtype=torch.bfloat16,
    )
    live.save_pretrained(tmp_path / "quantised")
    opened, plain = open_base(str(tmp_path / "quantised")), open_base(str(tmp_path / "plain"))
    for name in opened.quantised:
        found, wanted = load(opened.tensors[name]).float(), load(plain.tensors[name]).float()
        assert found.shape == wanted.shape
        assert (found - wanted).norm() < 0.15 * wanted.norm(), name
        assert torch.equal(load(opened.tensors[name].rows(3, 5)).float(), found[3:5])


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (5, 63), (9, 65), (64, 3), (2, 64), (1, 130)])
def test_nf4_of_any_shape_can_be_read_row_by_row(shape: tuple[int, int], tmp_path: Path):
    tensors = nf4_tensors(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
    codes = tensors["x.weight"].flatten()
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: prod(shape)].long()
    scales = tensors["x.weight.absmax"].double().repeat_interleave(64)[: prod(shape)]
    wanted = (NF4[nibbles] * scales).float().view(shape)
    ref = open_base(str(written(tmp_path, tensors))).tensors["x.weight"]
    assert ref.dtype == "F32"
    assert torch.equal(load(ref), wanted)
    for row in range(shape[0]):
        assert torch.equal(load(ref.rows(row, row + 1)), wanted[row : row + 1])


def test_a_stack_of_experts_in_nf4(tmp_path: Path):
    stack = torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(1))
    ref = open_base(str(written(tmp_path, nf4_tensors(stack, "experts.up_proj")))).tensors["experts.up_proj"]
    whole = load(ref)
    assert whole.shape == (3, 7, 9)
    assert (whole - stack).abs().max() < 0.5
    for expert in range(3):
        assert torch.equal(load(ref.item(expert).rows(2, 5)), whole[expert, 2:5])


def test_nested_groups_are_found_from_the_middle_of_a_weight(tmp_path: Path):
    weight = torch.randn(70, 500, generator=torch.Generator().manual_seed(1))  # 547 blocks, 3 groups of 256
    tensors = nf4_tensors(weight, nested=True)
    ref = open_base(str(written(tmp_path, tensors))).tensors["x.weight"]
    whole = load(ref)
    assert (whole - weight).abs().max() < 1
    for start in range(0, 70, 7):
        part = ref.rows(start, start + 7)
        assert torch.equal(load(part), whole[start : start + 7])
        assert stored_bytes(part) < 7 * 250 + 32 + 57 + 2 * 4 + 4 * 256


FP8_SHAPES = [
    ((300, 200), (3, 2), (128, 128)),
    ((128, 129), (1, 2), (128, 128)),
    ((130, 1), (2, 1), (128, 128)),
    ((9, 7), (9, 1), (1, 7)),
    ((9, 7), (1, 1), (9, 7)),
    ((9, 7), (1, 7), (9, 1)),
    ((9, 7), (9,), (1, 7)),
    ((9, 7), (), (9, 7)),
    ((9, 7), (1,), (9, 7)),
    ((3, 300, 200), (3, 3, 2), (128, 128)),
    ((3, 9, 7), (3, 9, 1), (1, 7)),
    ((3, 9, 7), (3, 1, 1), (9, 7)),
    ((3, 9, 7), (3,), (9, 7)),
    ((3, 9, 7), (3, 1, 7), (9, 1)),
]


@pytest.mark.parametrize(("shape", "grid", "tile"), FP8_SHAPES, ids=str)
def test_fp8_scales_of_any_shape(shape: tuple[int, ...], grid: tuple[int, ...], tile: tuple[int, int], tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=generator)
    count, (rows, columns) = prod(shape[:-2]), shape[-2:]
    tiles = scales.view(count, -(-rows // tile[0]), -(-columns // tile[1])).double()
    spread = tiles.repeat_interleave(tile[0], 1)[:, :rows].repeat_interleave(tile[1], 2)[:, :, :columns]
    wanted = (codes.double() * spread.view(shape)).float().bfloat16()
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = written(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales}, quantization_config=settings)
    ref = open_base(str(folder)).tensors["x.weight"]
    assert ref.dtype == "BF16"
    assert torch.equal(load(ref), wanted)
    for start in range(0, shape[0], 50):
        assert torch.equal(load(ref.rows(start, min(start + 50, shape[0]))), wanted[start : start + 50])
    if len(shape) == 3:
        for expert in range(3):
            slab = ref.item(expert)
            assert torch.equal(load(slab), wanted[expert])
            assert torch.equal(load(slab.rows(2, 5)), wanted[expert, 2:5])
            assert torch.equal(load(slab.rows(1, 8).rows(2, 4)), wanted[expert, 3:5])
        flat = TensorRef("x", (3 * rows, columns), ref.dtype, ref.pieces, ref.view)
        for start, stop in [(rows - 1, rows + 1), (rows, 2 * rows), (2, 3 * rows - 2), (rows + 3, 2 * rows + 1)]:
            part = flat.rows(start, stop)
            assert torch.equal(load(part), wanted.flatten(0, 1)[start:stop])
            assert torch.equal(load(part.rows(1, part.shape[0])), wanted.flatten(0, 1)[start + 1 : stop])


def test_experts_of_a_stack_in_mxfp4(folders: Callable[[str], Path]):
    opened = open_base(str(folders("mxfp4")))
    ref = opened.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    whole = load(ref)
    assert ref.shape == (EXPERTS, 64, 192)
    for expert in range(EXPERTS):
        slab = ref.item(expert)
        assert stored_bytes(slab) * EXPERTS == stored_bytes(ref)
        assert torch.equal(load(slab), whole[expert])
        assert torch.equal(load(slab.rows(30, 33)), whole[expert, 30:33])
        assert torch.equal(load(slab.transposed()), whole[expert].T)
        assert torch.equal(load(slab.transposed().rows(5, 9)), whole[expert].T[5:9])
        assert torch.equal(load(slab.columns((range(0, 192, 2),))), whole[expert][:, ::2])
        assert torch.equal(load(slab.columns((range(0, 192, 2),)).rows(8, 40)), whole[expert][8:40, ::2])


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8-blocks"])
def test_rows_in_any_order_columns_and_transposes(kind: str, folders: Callable[[str], Path]):
    ref = open_base(str(folders(kind))).tensors["model.layers.0.mlp.gate_proj.weight"]
    whole = load(ref)
    order = [*range(100, 110), *range(3, 9), *range(50, 60, 2)]
    taken = ref.take((range(100, 110), range(3, 9), range(50, 60, 2)))
    assert torch.equal(load(taken), whole[order])
    assert torch.equal(load(taken.rows(8, 18)), whole[order[8:18]])
    blocks = ref.take((range(100, 110), range(3, 9)))
    assert torch.equal(load(blocks.rows(8, 12)), whole[order[8:12]])
    assert stored_bytes(blocks) < stored_bytes(ref) / 4
    assert torch.equal(load(ref.transposed()), whole.T)
    assert torch.equal(load(ref.columns((range(3, 40),)).rows(7, 9)), whole[7:9, 3:40])
    into = torch.empty(4, whole.shape[1], dtype=torch.bfloat16)
    with Loader() as loader:
        assert loader(ref.rows(9, 13), into) is into
    assert torch.equal(into, whole[9:13])
    assert load(ref.rows(4, 4)).shape == (0, whole.shape[1])


# -- what shows --------------------------------------------------------------------------------------------------------


def test_a_scale_that_is_no_number_shows(tmp_path: Path):
    tensors = nf4_tensors(torch.ones(4, 64))
    tensors["x.weight.absmax"][2] = float("nan")
    found = load(open_base(str(written(tmp_path, tensors))).tensors["x.weight"])
    assert found.isnan().any(1).tolist() == [False, False, True, False]


def test_rows_of_zeros_are_zeros(tmp_path: Path):
    weight = torch.ones(4, 64)
    weight[1] = 0
    found = load(open_base(str(written(tmp_path, nf4_tensors(weight)))).tensors["x.weight"])
    assert torch.equal(found, weight)


def refused(folder: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        open_base(str(folder))
    return caught.value


QUANT_STATES = {
    "no JSON": b"{",
    "no object": b"[]",
    "twice": b'{"blocksize": 64, "blocksize": 64}',
    "not UTF-8": b"\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("text", QUANT_STATES.values(), ids=list(QUANT_STATES))
def test_a_quant_state_that_is_not_one_is_refused_by_name(text: bytes, tmp_path: Path):
    tensors = nf4_tensors(torch.ones(4, 64))
    tensors["x.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    assert "x.weight.quant_state.bitsandbytes__nf4" in str(refused(written(tmp_path, tensors)))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": None},
        {"shape": [4, 64.0]},
        {"shape": [4, -64]},
        {"shape": [0, 64]},
        {"shape": "4"},
        {"shape": [4, True]},
        {"blocksize": 48},
        {"blocksize": "64"},
        {"blocksize": 64.0},
        {"dtype": "float8"},
        {"dtype": ["float32"]},
        {"quant_type": "fp4"},
        {"nested_offset": 0.5},
        {"nested_blocksize": 256},
        {"nested_offset": True, "nested_blocksize": 256},
        {"nested_offset": 0.5, "nested_blocksize": 0},
    ],
    ids=str,
)
def test_a_quant_state_that_says_something_else_is_refused_by_name(changes: dict[str, Any], tmp_path: Path):
    error = refused(written(tmp_path, nf4_tensors(torch.ones(4, 64), **changes)))
    assert "x.weight.quant_state.bitsandbytes__nf4" in str(error)


@pytest.mark.parametrize("changes", [{"shape": [4, 65]}, {"shape": [2, 64]}, {"blocksize": 32}], ids=str)
def test_sizes_that_do_not_fit_the_quant_state_are_refused_by_name(changes: dict[str, Any], tmp_path: Path):
    assert "x.weight" in str(refused(written(tmp_path, nf4_tensors(torch.ones(4, 64), **changes))))


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state"])
def test_a_part_that_is_missing_is_refused_by_name(part: str, tmp_path: Path):
    tensors = nf4_tensors(torch.ones(4, 64), nested=True)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"x.weight.{part}")}
    error = refused(written(tmp_path, kept))
    assert "'x.weight'" in str(error)
    assert part in str(error)


def test_codes_that_are_missing_are_refused_by_name(tmp_path: Path):
    tensors = nf4_tensors(torch.ones(4, 64))
    del tensors["x.weight"]
    assert "'x.weight'" in str(refused(written(tmp_path, tensors)))


def test_a_nested_part_that_the_quant_state_does_not_mention_is_refused(tmp_path: Path):
    tensors = nf4_tensors(torch.ones(4, 64)) | {"x.weight.nested_absmax": torch.ones(1)}
    assert "nested_absmax" in str(refused(written(tmp_path, tensors)))


def test_int8_needs_its_scales_and_plain_rows(tmp_path: Path):
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    codes, scales = torch.ones(3, 4, dtype=torch.int8), torch.ones(3)
    lone = written(tmp_path / "lone", {"x.weight": codes}, quantization_config=settings)
    assert "'x.weight'" in str(refused(lone))
    orphan = written(tmp_path / "orphan", {"x.SCB": scales}, quantization_config=settings)
    assert "'x.SCB'" in str(refused(orphan))
    wrong = written(tmp_path / "wrong", {"x.weight": codes, "x.SCB": torch.ones(4)}, quantization_config=settings)
    assert "'x.SCB'" in str(refused(wrong))
    turing = {"x.weight": codes, "x.SCB": scales, "x.weight_format": torch.tensor(2, dtype=torch.uint8)}
    assert "old GPU layout" in str(refused(written(tmp_path / "turing", turing, quantization_config=settings)))


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"x.weight": (300, 200)}, "without a scale"),
        ({"x.weight": (300, 200), "x.weight_scale_inv": (2, 2)}, "do not fit"),
        ({"x.weight": (300, 200), "x.weight_scale_inv": (150, 100)}, "do not fit"),
        ({"x.weight": (3, 300, 200), "x.weight_scale_inv": (2, 3, 2)}, "do not fit"),
        ({"x.weight": (300, 200), "x.weight_scale_inv": (3, 2), "x.weight_scale": (1,)}, "and"),
    ],
)
def test_fp8_scales_that_do_not_fit_are_refused_by_name(
    tensors: dict[str, tuple[int, ...]], named: str, tmp_path: Path
):
    made = {n: torch.ones(s).to(torch.float8_e4m3fn) if n == "x.weight" else torch.ones(s) for n, s in tensors.items()}
    error = refused(written(tmp_path, made, quantization_config={"quant_method": "fp8"}))
    assert "'x.weight'" in str(error)
    assert named in str(error)


def test_mxfp4_needs_its_scales(tmp_path: Path):
    blocks = torch.ones(2, 4, 3, 16, dtype=torch.uint8)
    assert "'e.down_proj_blocks'" in str(refused(written(tmp_path / "lone", {"e.down_proj_blocks": blocks})))
    wrong = {"e.down_proj_blocks": blocks, "e.down_proj_scales": torch.ones(2, 4, 2, dtype=torch.uint8)}
    assert "'e.down_proj_blocks'" in str(refused(written(tmp_path / "wrong", wrong)))
    twice = {**wrong, "e.down_proj_scales": torch.ones(2, 4, 3, dtype=torch.uint8), "e.down_proj": torch.ones(2, 96, 4)}
    assert "'e.down_proj'" in str(refused(written(tmp_path / "twice", twice)))


INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
FOREIGN = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq"},
    "hqq": {"quant_method": "hqq"},
    "eetq": {"quant_method": "eetq"},
    "aqlm": {"quant_method": "aqlm"},
    "quanto": {"quant_method": "quanto"},
    "an unnamed method": {"bits": 4},
    "pack-quantized": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "4-bit int": {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": {"group_0": {"weights": INT4}},
    },
    "sparse": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
}


@pytest.mark.parametrize("called", FOREIGN)
def test_other_encodings_are_refused_by_name_with_the_way_out(called: str, tmp_path: Path):
    folder = written(tmp_path, {"x.weight": torch.ones(2, 2)}, quantization_config=FOREIGN[called])
    with pytest.raises(UnsupportedError, match=called) as caught:
        open_base(str(folder))
    assert "16-bit" in caught.value.hint


@pytest.mark.parametrize("end", ["qweight", "weight_packed", "W_q", "codebooks", "weight_scale_2", "comfy_quant"])
def test_other_encodings_are_known_by_their_tensors_too(end: str, tmp_path: Path):
    with pytest.raises(UnsupportedError, match=f"x.{end}"):
        open_base(str(written(tmp_path, {f"x.{end}": torch.ones(2, 2, dtype=torch.int32)})))


def test_the_config_without_quantisation_is_the_same_less_that():
    settings = {"quant_method": "fp8"}
    config = {"a": 1, "quantization_config": settings, "text_config": {"b": 2, "quantization_config": settings}}
    assert without_quantisation(config) == {"a": 1, "text_config": {"b": 2}}
    assert without_quantisation({"a": 1}) == {"a": 1}


def test_the_settings_may_be_those_of_the_text_model(tmp_path: Path):
    text = {"dtype": "float16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
    tensors = {"x.weight": torch.ones(3, 3).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(2, 2)}
    opened: Checkpoint = open_base(str(written(tmp_path, tensors, text_config=text)))
    assert opened.tensors["x.weight"].dtype == "F16"
    assert opened.quantised == {"x.weight": "fp8, blocks of 2 x 2"}
