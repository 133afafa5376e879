"""Adapters of image tools merged into pipelines and into checkpoints of one file, against diffusers.

diffusers loads what is written, fuses the same adapter by its own loader, and converts checkpoints of one file by its
own functions; sums are those of a few lines in fp64.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import add, build, diffusers_names, factors, in_diffusers, kohya, models, single_file
from safetensors.torch import load_file, save_file

import loratool

pytestmark = pytest.mark.filterwarnings("ignore")
RANK, ALPHA = 3, 6.0
WORDS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net", "conv1", "proj_in", "add_q_proj", "proj_mlp", "q_proj", "fc1")
PREFIX = {
    "sd": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "xl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux": {"transformer": "transformer", "text_encoder": "text_encoder"},
}


class Case:
    """A pipeline on the disk, and an adapter for it in one file."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.pipe = build(kind, folder / "words")
        self.base = folder / "base"
        self.pipe.save_pretrained(self.base)
        self.states = {name: dict(model.state_dict()) for name, model in models(self.pipe).items()}
        self.pairs = {
            name: factors(getattr(self.pipe, name), WORDS, RANK, seed) for seed, name in enumerate(PREFIX[kind])
        }
        tensors: dict[str, torch.Tensor] = {}
        for name, prefix in PREFIX[kind].items():
            paths = {self.on_disk(name, path): pair for path, pair in self.pairs[name].items()}
            tensors |= in_diffusers(prefix, paths) if kind == "flux" else kohya(prefix, paths, ALPHA)
        self.adapter = folder / "adapter.safetensors"
        save_file(tensors, self.adapter)
        self.scaling = 1.0 if kind == "flux" else ALPHA / RANK
        self.expected = {n: add(state, self.pairs.get(n, {}), self.scaling) for n, state in self.states.items()}
        self.file = folder / "single.safetensors"
        self.single = {name: weight.contiguous().clone() for name, weight in single_file(self.pipe).items()}
        save_file(self.single, self.file, {"format": "pt"})

    @staticmethod
    def on_disk(component: str, path: str) -> str:
        """CLIP's modules in memory may lack what their names in files have."""
        clip = component.startswith("text_encoder") and path.startswith("encoder.layers")
        return f"text_model.{path}" if clip else path

    def loaded(self, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        """What diffusers loads from a folder."""
        pipe = type(self.pipe).from_pretrained(folder, local_files_only=True, safety_checker=None)
        return {name: dict(model.state_dict()) for name, model in models(pipe).items()}

    def converted(self, file: Path) -> dict[str, dict[str, torch.Tensor]]:
        """What diffusers makes of a checkpoint of one file, under the names of its models in memory."""
        found = {}
        for name, state in diffusers_names(self.pipe, load_file(file)).items():
            bare = {n.removeprefix("text_model."): w for n, w in state.items()}
            wanted = self.states[name]
            found[name] = {n: bare[n.removeprefix("text_model.")] for n in wanted}
        return found


@pytest.fixture(scope="module", params=["sd", "xl", "flux"])
def case(request: Any, tmp_path_factory: Any) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def assert_close(found: dict[str, Any], expected: dict[str, Any], components: Any = None) -> None:
    for component in components or expected:
        assert set(found[component]) == set(expected[component])
        for name, weight in expected[component].items():
            torch.testing.assert_close(found[component][name], weight, rtol=1e-5, atol=1e-5, msg=f"{component} {name}")


def as_in_the_cache(folder: Path, repository: Path) -> Path:
    """Lay a folder out as huggingface_hub does: snapshots/<commit>/unet/config.json -> ../../../blobs/<digest>."""
    commit, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    blobs.mkdir(parents=True)
    for n, file in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        (blobs / str(n)).write_bytes(file.read_bytes())
        link = commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(n), link.parent))
    return commit


def test_the_checkpoint_of_one_file_is_what_diffusers_reads(case):
    assert_close(case.converted(case.file), case.states, diffusers_names(case.pipe, dict(case.single)))


def test_a_pipeline_becomes_what_diffusers_makes_of_it(case, tmp_path):
    loratool.merge(case.base, [case.adapter], tmp_path / "out", verify=True)
    merged = case.loaded(tmp_path / "out")
    assert_close(merged, case.expected)
    pipe = build(case.kind, tmp_path / "words")
    pipe.load_lora_weights(case.adapter)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = {name: dict(model.state_dict()) for name, model in models(pipe).items()}
    # of text encoders diffusers 0.42 with transformers 5 loses q, k and v without a word: they are in `expected` alone
    assert_close(merged, fused, [name for name in fused if not name.startswith("text_encoder")])


def test_what_no_adapter_is_for_goes_along_byte_for_byte(case, tmp_path):
    loratool.merge(case.base, [case.adapter], tmp_path / "out", dtype="bfloat16")
    files = {p.relative_to(case.base) for p in case.base.rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()} - {
        Path("README.md"),
        Path("loratool.report.json"),
    }
    cache = as_in_the_cache(case.base, tmp_path / "models--org--name")
    loratool.merge(cache, [case.adapter], tmp_path / "from-cache", dtype="bfloat16")
    assert files <= {p.relative_to(tmp_path / "from-cache") for p in (tmp_path / "from-cache").rglob("*")}
    changed = {p for p in files if (case.base / p).read_bytes() != (tmp_path / "out" / p).read_bytes()}
    assert all(p.parts[0] in case.states for p in changed)
    assert not any(p.parts[0] == "vae" for p in changed)


def test_one_file_becomes_what_the_pipeline_becomes(case, tmp_path):
    exclude = "text_encoder:**" if case.kind == "flux" else ()
    loratool.merge(case.file, [case.adapter], tmp_path / "out.safetensors", verify=True, exclude=exclude)
    components = diffusers_names(case.pipe, dict(case.single))
    assert_close(case.converted(tmp_path / "out.safetensors"), case.expected, components)
    merged = load_file(tmp_path / "out.safetensors")
    assert list(merged) == list(load_file(case.file))
    for name, weight in case.single.items():
        if name.startswith(("first_stage_model.", "vae.", "betas")):
            assert torch.equal(merged[name], weight)


# -- what is no plain factor ------------------------------------------------------------------------------------------


def originals(kind: str) -> dict[str, str]:
    """Some tensors of one file, one of each kind of difficulty, and the modules in whose places they are."""
    start = "model.diffusion_model."
    if kind == "flux":
        return {
            "double_blocks.0.img_attn.qkv": f"{start}double_blocks.0.img_attn.qkv",
            "single_blocks.1.linear1": f"{start}single_blocks.1.linear1",
            "final_layer.adaLN_modulation.1": f"{start}final_layer.adaLN_modulation.1",
        }
    return {"input_blocks.1.0.in_layers.2": f"{start}input_blocks.1.0.in_layers.2", "out.0": f"{start}out.0"}


def test_whole_differences_of_weights_biases_and_norms_reach_both_kinds_of_base(case, tmp_path):
    """ComfyUI adds `.diff` and `.diff_b` to the tensors of its own names; diffusers says where those are."""
    generator = torch.Generator().manual_seed(5)
    tensors, wanted = {}, dict(case.single)
    for module, name in originals(case.kind).items():
        for leaf, ending in (("weight", "diff"), ("bias", "diff_b")):
            weight = case.single[f"{name}.{leaf}"]
            tensors[f"diffusion_model.{module}.{ending}"] = torch.randn(weight.shape, generator=generator)
            wanted[f"{name}.{leaf}"] = weight + tensors[f"diffusion_model.{module}.{ending}"]
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.merge(case.file, [tmp_path / "a.safetensors"], tmp_path / "one.safetensors", verify=True)
    merged = load_file(tmp_path / "one.safetensors")
    for name, weight in wanted.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-6, msg=name)
    loratool.merge(case.base, [tmp_path / "a.safetensors"], tmp_path / "pipe", verify=True)
    save_file({n: w.contiguous() for n, w in wanted.items()}, tmp_path / "wanted.safetensors")
    denoiser = "transformer" if case.kind == "flux" else "unet"
    assert_close(case.loaded(tmp_path / "pipe"), case.converted(tmp_path / "wanted.safetensors"), [denoiser])


def test_a_projection_that_open_clip_transposes_is_turned(tmp_path):
    case = Case("xl", tmp_path)
    pairs = factors(case.pipe.text_encoder_2, ("text_projection",), 2, 9)
    save_file(kohya("lora_te2", pairs, 2.0), tmp_path / "a.safetensors")
    loratool.merge(case.file, [tmp_path / "a.safetensors"], tmp_path / "out.safetensors", verify=True)
    expected = add(case.states["text_encoder_2"], pairs, 1.0)
    assert_close(case.converted(tmp_path / "out.safetensors"), {"text_encoder_2": expected})


# -- variants, shards, names ------------------------------------------------------------------------------------------


def test_variants_and_shards_of_a_pipeline_keep_their_names(case, tmp_path):
    case.pipe.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="80KB")
    loratool.merge(tmp_path / "base", [case.adapter], tmp_path / "out")
    names = {p.relative_to(tmp_path / "base") for p in (tmp_path / "base").rglob("*.safetensors*")}
    assert any("00002" in str(name) for name in names)
    assert names == {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.safetensors*")}
    pipe = type(case.pipe).from_pretrained(tmp_path / "out", variant="fp16", local_files_only=True, safety_checker=None)
    assert_close({name: dict(model.state_dict()) for name, model in models(pipe).items()}, case.expected)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_text_encoder_is_the_same_with_and_without_text_model(prefixed, tmp_path):
    case = Case("sd", tmp_path)
    file = case.base / "text_encoder/model.safetensors"
    bare = {name.removeprefix("text_model."): weight for name, weight in load_file(file).items()}
    save_file({f"text_model.{n}" if prefixed else n: w for n, w in bare.items()}, file, {"format": "pt"})
    loratool.merge(case.base, [case.adapter], tmp_path / "out", verify=True)
    assert_close(case.loaded(tmp_path / "out"), case.expected)


# -- back out of models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuned_is", "base_is", "to"),
    [("pipeline", "pipeline", "kohya"), ("pipeline", "file", "comfy"), ("file", "pipeline", "diffusers")],
)
def test_an_update_is_extracted_whichever_way_the_two_models_are_spelled(case, to, tuned_is, base_is, tmp_path):
    if case.kind == "xl" and tuned_is == base_is:
        pytest.skip("the text encoders of XL are large; the other pipelines have all pairs")
    both = {"pipeline": case.base, "file": case.file}
    tuned = tmp_path / ("tuned" if tuned_is == "pipeline" else "tuned.safetensors")
    here = "text_encoder:**" if case.kind == "flux" else ()
    loratool.merge(both[tuned_is], [case.adapter], tuned, exclude=here)
    loratool.extract(tuned, both[base_is], tmp_path / "out.safetensors", to=to, rank=RANK)
    loratool.merge(case.base, [tmp_path / "out.safetensors"], tmp_path / "again")
    components = diffusers_names(case.pipe, dict(case.single))
    merged = case.loaded(tmp_path / "again")
    for component in components:
        for name, weight in case.expected[component].items():
            torch.testing.assert_close(merged[component][name], weight, rtol=1e-3, atol=1e-3, msg=f"{component} {name}")


def test_a_component_alone_is_extracted_from_one_file(case, tmp_path):
    denoiser = "transformer" if case.kind == "flux" else "unet"
    loratool.merge(case.base / denoiser, [case.adapter], tmp_path / "tuned", target=f"{denoiser}:**")
    report = loratool.extract(tmp_path / "tuned", case.file, tmp_path / "out.safetensors", to="kohya", rank=RANK)
    assert case.kind == "flux" or any("text_encoder" in f.what for f in report.findings)
    loratool.merge(case.base, [tmp_path / "out.safetensors"], tmp_path / "again")
    merged = case.loaded(tmp_path / "again")[denoiser]
    for name, weight in case.expected[denoiser].items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-3, atol=1e-3, msg=name)


def test_a_merged_model_is_compared_with_its_base_however_it_is_spelled(case, tmp_path):
    exclude = "text_encoder:**" if case.kind == "flux" else ()
    loratool.merge(case.file, [case.adapter], tmp_path / "out.safetensors", exclude=exclude)
    changed = len(case.pairs["unet" if case.kind != "flux" else "transformer"])
    report = loratool.inspect(tmp_path / "out.safetensors", check=True, base=case.base)
    rows = {row["module"]: row["changed"] for row in report.rows}
    denoiser = [changed for module, changed in rows.items() if "text" not in module and "cond" not in module]
    assert sum(denoiser) == changed


def test_comfyuis_scaled_fp8_is_merged_into_the_numbers_that_it_stands_for(tmp_path):
    case = Case("flux", tmp_path)
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv"
    scale = torch.tensor(0.5)
    codes = (case.single[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    marker = {"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    stored = {**case.single, f"{name}.weight": codes, f"{name}.scale_weight": scale, **marker}
    save_file(stored, tmp_path / "fp8.safetensors")
    loratool.merge(
        tmp_path / "fp8.safetensors",
        [case.adapter],
        tmp_path / "out.safetensors",
        dtype="float32",
        target="transformer:**",
    )
    merged = load_file(tmp_path / "out.safetensors")
    parts = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    updates = [up @ down for down, up in (case.pairs["transformer"][part] for part in parts)]
    expected = codes.float() * scale + torch.cat(updates)
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-2, atol=1e-2)
    assert not set(merged) & {*marker, f"{name}.scale_weight"}
