"""What a merge does to the files of a checkpoint: headers, untouched bytes, index, config, companions, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_files import (
    DOWN1,
    K1,
    Q0,
    factors,
    peft_config,
    run_cli,
    tensors_of_llama,
    write_adapter,
    write_base,
    write_json,
    write_sharded,
)

import loratool
from loratool.errors import InputError, MismatchError

TOUCHED = {f"{module}.weight" for module in (Q0, K1, DOWN1)}


def true_merge(base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], scale: float = 2.0) -> dict[str, Any]:
    """The definition, in fp64."""
    merged = {name: tensor.double() for name, tensor in base.items()}
    for name, down in adapter.items():
        if name.endswith("lora_A.weight"):
            up = adapter[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            merged[weight] = merged[weight] + scale * (up.double() @ down.double())
    return merged


def header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def raw(path: Path, name: str) -> bytes:
    content, length = path.read_bytes(), len(header(path))
    low, high = json.loads(content[8:length])[name]["data_offsets"]
    return content[length + low : length + high]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A folder with base (sharded, bf16), adapter, and out: their merge."""
    tensors = tensors_of_llama(dtype=torch.bfloat16)
    base = write_sharded(tmp_path / "base", tensors, shards=3, torch_dtype="bfloat16")
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "README.md", "chat_template.jinja"):
        (base / name).write_text(name)
    (base / "optimizer.pt").write_bytes(b"x")
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out")
    return tmp_path


def test_headers_stay_byte_for_byte(done: Path) -> None:
    shards = sorted((done / "base").glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert header(done / "out" / shard.name) == header(shard)


def test_untouched_tensors_keep_their_bytes_and_touched_ones_do_not(done: Path) -> None:
    seen = set()
    for shard in (done / "base").glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                same = raw(done / "out" / shard.name, name) == raw(shard, name)
                assert same == (name not in TOUCHED), name
                seen.add(name)
    assert seen == set(tensors_of_llama())


def test_merged_values_are_the_definition_rounded_once(done: Path) -> None:
    true = true_merge(tensors_of_llama(dtype=torch.bfloat16), factors())
    merged = all_tensors(done / "out")
    for name in TOUCHED:
        once = true[name].to(torch.bfloat16)
        # a value that lies within fp32 noise of a rounding boundary may fall on its other side: at most one ulp, rarely
        different = merged[name] != once
        assert different.float().mean() < 0.01
        assert torch.allclose(merged[name].double(), true[name], rtol=2**-8, atol=1e-7)


def test_the_files_around_the_weights_go_along(done: Path) -> None:
    names = {p.name for p in (done / "out").iterdir()}
    shards = {f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    expected = {"config.json", "tokenizer.json", "generation_config.json", "LICENSE", "chat_template.jinja"}
    assert names == shards | expected | {"model.safetensors.index.json", "loratool.report.json", "README.md"}
    for name in ("tokenizer.json", "config.json", "model.safetensors.index.json"):
        assert (done / "out" / name).read_bytes() == (done / "base" / name).read_bytes()


def test_the_report_is_written_and_its_ledger_closes(done: Path) -> None:
    report = json.loads((done / "out" / "loratool.report.json").read_text())
    assert report["verb"] == "merge"
    counts = {source: sum(fates.values()) for source, fates in report["ledger"].items()}
    assert counts == {str(done / "base"): len(tensors_of_llama()), str(done / "adapter"): len(factors())}
    assert report["ledger"][str(done / "base")] == {"computed": 3, "copied": len(tensors_of_llama()) - 3}
    assert sorted(row["tensor"] for row in report["rows"]) == sorted(TOUCHED)
    for row in report["rows"]:
        name = f"base_model.model.{row['tensor'].removesuffix('.weight')}"
        delta = 2.0 * factors()[f"{name}.lora_B.weight"].double() @ factors()[f"{name}.lora_A.weight"].double()
        assert row["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)


def test_another_dtype_rewrites_index_and_config(tmp_path: Path) -> None:
    tensors = {**tensors_of_llama(dtype=torch.bfloat16), "model.position_ids": torch.arange(7)}
    base = write_sharded(tmp_path / "base", tensors, torch_dtype="bfloat16")
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out", dtype="float32")
    merged = all_tensors(tmp_path / "out")
    true = true_merge(tensors_of_llama(dtype=torch.bfloat16), factors())
    assert merged.pop("model.position_ids").equal(torch.arange(7))
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), true[name], rtol=1e-6, atol=1e-7)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values()) + 7 * 8
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((base / "config.json").read_text()), "torch_dtype": "float32"}


def test_the_new_spelling_of_the_configs_dtype_is_kept(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    write_json(base / "config.json", config)
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, "dtype": "bfloat16"}


def test_a_dtype_that_is_already_there_changes_no_header(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out", dtype="float32")
    assert header(tmp_path / "out" / "model.safetensors") == header(base / "model.safetensors")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_single_file_merges_into_a_single_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base") / "model.safetensors"
    out = tmp_path / "merged.safetensors"
    done = run_cli("merge", base, write_adapter(tmp_path / "adapter"), "-o", out)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged.safetensors"]
    true = true_merge(tensors_of_llama(), factors())
    for name, tensor in load_file(out).items():
        assert torch.allclose(tensor.double(), true[name], rtol=1e-6, atol=1e-7)


def test_the_order_of_adapters_changes_no_bit(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", factors(7))
    loratool.merge(base, [one, two], tmp_path / "a", weights=[0.3, 1.1])
    loratool.merge(base, [two, one], tmp_path / "b", weights=[1.1, 0.3])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("verb", ["merge", "resize", "convert"])
def test_modules_that_a_glob_leaves_out_are_skipped_in_the_ledger(tmp_path: Path, verb: str) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    if verb == "merge":
        report = loratool.merge(base, [adapter], tmp_path / "out", exclude=["q_proj"])
        assert report.ledger[str(base)] == {"computed": 2, "copied": len(tensors_of_llama()) - 2}
    elif verb == "resize":
        report = loratool.resize(adapter, tmp_path / "out", rank=2, exclude=["q_proj"])
    else:
        report = loratool.convert(adapter, tmp_path / "out", to="peft", exclude=["q_proj"])
    fate = "copied" if verb == "convert" else "computed"
    assert report.ledger[str(adapter)] == {fate: len(factors()) - 2, "skipped": 2}


def test_the_ledger_of_an_extraction_closes_over_both_models(tmp_path: Path) -> None:
    tensors = tensors_of_llama()
    base = write_base(tmp_path / "base", {**tensors, "model.rotary.inv_freq": torch.ones(3)})
    tuned = write_base(tmp_path / "tuned", {**tensors, f"{Q0}.weight": tensors[f"{Q0}.weight"] + 0.1})
    report = loratool.extract(tuned, base, tmp_path / "out", rank=1)
    counts = {source: sum(fates.values()) for source, fates in report.ledger.items()}
    assert counts == {str(base): len(tensors) + 1, str(tuned): len(tensors)}
    assert any("inv_freq" in finding.where for finding in report.findings)


def test_a_layer_that_changed_its_dtype_only_is_unchanged(tmp_path: Path) -> None:
    half = tensors_of_llama(dtype=torch.bfloat16)
    base = write_base(tmp_path / "base", half)
    tuned = {name: tensor.float() for name, tensor in half.items()}
    tuned[f"{Q0}.weight"] = tuned[f"{Q0}.weight"] + torch.ones(16, 1) @ torch.full((1, 16), 0.5)
    report = loratool.extract(write_base(tmp_path / "tuned", tuned), base, tmp_path / "out", rank=1)
    assert report.totals["changed"] == 1
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {
        f"base_model.model.{Q0}.lora_A.weight",
        f"base_model.model.{Q0}.lora_B.weight",
    }


def test_a_saved_copy_of_the_embedding_must_be_the_bases_own(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    shape = tensors_of_llama()["model.embed_tokens.weight"].shape
    name = "base_model.model.model.embed_tokens"
    tensors = {f"{name}.lora_embedding_A": torch.ones(4, shape[0]), f"{name}.lora_embedding_B": torch.ones(shape[1], 4)}
    same = {**tensors, f"{name}.base_layer.weight": tensors_of_llama()["model.embed_tokens.weight"]}
    loratool.merge(base, [write_adapter(tmp_path / "same", same)], tmp_path / "out")
    for n, copy in enumerate(
        (same[f"{name}.base_layer.weight"] + 1, torch.zeros(3, shape[1]), torch.zeros(shape[0], 1))
    ):
        other = write_adapter(tmp_path / f"other{n}", {**tensors, f"{name}.base_layer.weight": copy})
        with pytest.raises(MismatchError, match="another base weight"):
            loratool.merge(base, [other], tmp_path / f"out{n}")


def test_rows_of_a_tensor_without_elements_are_no_trouble(tmp_path: Path) -> None:
    tensors = {**tensors_of_llama(), "model.empty": torch.zeros(0, 5), "model.scalar": torch.tensor(3.0)}
    base = write_base(tmp_path / "base", tensors)
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out", dtype="float16")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["model.empty"].shape == (0, 5)
    assert merged["model.scalar"] == 3


def test_overflow_is_found_in_every_narrowing(tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in tensors_of_llama().items()}
    tensors["model.norm.weight"][0] = 1e300
    base = write_base(tmp_path / "base", tensors)
    with pytest.raises(InputError, match=r"model\.norm\.weight.*overflow"):
        loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out", dtype="float32")


# VmHWM and not ru_maxrss: the latter starts at the size of the process that forked, pytest with all it imported
MEMORY = """
import sys
from loratool.cli.main import main
try:
    main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print("PEAK", status.partition("VmHWM:")[2].split()[0])
"""


def test_a_merge_never_holds_the_model(tmp_path: Path) -> None:
    import subprocess
    import sys

    from tiny_files import environment

    base, rows = tmp_path / "base", 6144
    base.mkdir()
    shapes = {}
    for shard in range(4):  # 4 shards of 2 x 75 MB: 600 MB
        modules = [f"model.layers.{shard}.self_attn.{m}_proj" for m in "qo"]
        shapes |= dict.fromkeys(modules, (rows, rows))
        tensors = {f"{m}.weight": torch.full((rows, rows), 0.5, dtype=torch.bfloat16) for m in modules}
        save_file(tensors, base / f"model-{shard}.safetensors")
        del tensors
    weight_map = {f"{m}.weight": f"model-{m.split('.')[2]}.safetensors" for m in shapes}
    write_json(base / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(base / "config.json", {"model_type": "llama"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors(shapes=shapes), adapter / "adapter_model.safetensors")
    write_json(adapter / "adapter_config.json", peft_config())
    command = [sys.executable, "-c", MEMORY, "merge", base, adapter, "-o", tmp_path / "out", "--workers", "2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rpartition("PEAK ")[2]) / 1024
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) / 1e6
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(base)
    assert size > 600
    assert peak < 500  # MiB, of which torch itself takes about 230
