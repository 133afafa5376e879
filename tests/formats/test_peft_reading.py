"""Every spelling of a PEFT adapter is read to the same thing, and scalings are PEFT's own."""

import contextlib
import itertools
import json
import re
import time
import warnings

import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import loratool
from loratool.api import open_adapter
from loratool.errors import AmbiguityError, FormatError, InputError, LoratoolError, MismatchError

WRAPPER = "base_model.model."
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def merged_bytes(base, adapter, out, **options):
    loratool.merge(base, [adapter], out, **options)
    return (out / "model.safetensors").read_bytes()


def rewrite(folder, rename):
    path = folder / "adapter_model.safetensors"
    save_file({rename(n): t for n, t in load_file(path).items()}, path)


def by_module(adapter):
    return {t.path: d for t, (d,) in adapter.deltas.items()}


@pytest.fixture
def llama(saved, adapter_folder, tmp_path):
    """A base, an adapter for it, and the bytes of their merge."""
    model, base = saved("llama")
    live, folder = adapter_folder(model, target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6)
    return base, folder, merged_bytes(base, folder, tmp_path / "reference"), live


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n.removeprefix(WRAPPER),
        lambda n: WRAPPER + n,
        lambda n: n.replace(".weight", ".default.weight"),
        lambda n: n.replace(".weight", ".my-style.weight"),
        lambda n: n.removeprefix(WRAPPER).replace(".weight", ".default.weight"),
        lambda n: n.replace("base_model.model.model.", "base_model.model."),
    ],
    ids=["no wrapper", "two wrappers", "adapter name", "another adapter name", "name, no wrapper", "bare model"],
)
def test_every_spelling_of_the_keys_merges_to_the_same_bytes(rename, llama, tmp_path):
    base, folder, reference, _ = llama
    rewrite(folder, rename)
    assert merged_bytes(base, folder, tmp_path / "m") == reference


def test_a_mixture_of_wrapped_and_bare_names_is_refused(llama, tmp_path):
    base, folder, _, _ = llama
    rewrite(folder, lambda n: n.removeprefix(WRAPPER) if "layers.0" in n else n)
    with pytest.raises(InputError, match=r"base_model\.model"):
        loratool.merge(base, [folder], tmp_path / "m")


def test_two_adapters_in_one_file_are_refused(llama, tmp_path):
    base, folder, _, _ = llama
    rewrite(folder, lambda n: n.replace(".weight", ".one.weight" if "layers.0" in n else ".two.weight"))
    with pytest.raises(InputError, match="several adapters"):
        loratool.merge(base, [folder], tmp_path / "m")


def test_a_pickled_adapter_needs_the_users_word(llama, tmp_path):
    base, folder, reference, _ = llama
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match="pickle"):
        loratool.merge(base, [folder], tmp_path / "m")
    assert merged_bytes(base, folder, tmp_path / "m", allow_pickle=True) == reference


def test_a_named_adapter_is_found_in_its_subfolder(tiny, saved, tmp_path):
    _, base = saved("llama")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    live = peft.get_peft_model(tiny("llama"), config, adapter_name="style")
    live.save_pretrained(tmp_path / "outer")
    assert (tmp_path / "outer/style/adapter_model.safetensors").is_file()
    whole = merged_bytes(base, tmp_path / "outer", tmp_path / "a")
    assert whole == merged_bytes(base, tmp_path / "outer/style", tmp_path / "b")


def test_several_named_adapters_in_a_folder_are_listed_not_guessed(tiny, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    live = peft.get_peft_model(tiny("llama"), config, adapter_name="one")
    live.add_adapter("two", config)
    live.save_pretrained(tmp_path / "outer")
    with pytest.raises(InputError, match=r"one.*two"):
        loratool.inspect(tmp_path / "outer")


def test_the_weight_file_alone_finds_its_config_beside_it(llama, tmp_path):
    base, folder, reference, _ = llama
    assert merged_bytes(base, folder / "adapter_model.safetensors", tmp_path / "m") == reference


def test_a_file_without_any_config_needs_its_alpha(llama, tmp_path):
    base, folder, reference, _ = llama
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(InputError, match="lora_alpha"):
        loratool.merge(base, [lone], tmp_path / "m")
    assert any(f.level == "error" and "lora_alpha" in f.what for f in loratool.inspect(lone).findings)
    assert merged_bytes(base, lone, tmp_path / "m", alpha=6) == reference


def test_a_config_in_the_files_header_is_used(llama, tmp_path):
    base, folder, reference, _ = llama
    lone = tmp_path / "lone.safetensors"
    config = (folder / "adapter_config.json").read_text()
    save_file(load_file(folder / "adapter_model.safetensors"), lone, {"lora_adapter_metadata": config})
    assert merged_bytes(base, lone, tmp_path / "m") == reference


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"r": NaN',
        "{" * 100_000,
        '{"lora_dropout": NaN}',
        '{"lora_alpha": 1e999}',
        '{"a": "\\ud800"}',
        '"a"',
    ],
)
def test_a_damaged_config_in_the_header_is_an_error(text, llama, tmp_path):
    base, folder, _, _ = llama
    lone = tmp_path / "lone.safetensors"
    save_file(load_file(folder / "adapter_model.safetensors"), lone, {"lora_adapter_metadata": text})
    with pytest.raises(InputError, match="lora_adapter_metadata"):
        loratool.merge(base, [lone], tmp_path / "m")


def test_a_file_that_diffusers_saved_is_read_with_its_header(tiny, saved, run_model, tmp_path):
    _, base = saved("unet")
    unet = tiny("unet")
    torch.manual_seed(4)
    unet.add_adapter(
        peft.LoraConfig(target_modules=["to_q", "conv1"], r=4, lora_alpha=6, init_lora_weights=False), "style"
    )
    unet.save_lora_adapter(tmp_path / "saved", adapter_name="style")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    loratool.merge(base, [file], tmp_path / "m")
    merged = type(unet).from_pretrained(tmp_path / "m").eval()
    wanted = run_model("unet", unet.eval())
    assert not torch.allclose(wanted, run_model("unet", tiny("unet")), atol=1e-3)
    torch.testing.assert_close(run_model("unet", merged), wanted, rtol=1e-4, atol=1e-5)


PATTERNS = {
    "none": ({}, {}),
    "plain names": ({"k_proj": 2, "down_proj": 7}, {"q_proj": 1, "k_proj": 3.5}),
    "overlapping, first wins": (
        {"q_proj": 8, "layers.0.self_attn.q_proj": 2},
        {"self_attn.q_proj": 3, "q_proj": 5, r"layers\.1\.self_attn\.q_proj": 7},
    ),
    "overlapping, special first": ({"layers.0.self_attn.q_proj": 2, "q_proj": 8}, {}),
    "anchored": ({"^model.layers.1.self_attn.v_proj": 6}, {"^model.layers.0.self_attn.v_proj": 9, "^v_proj": 100}),
    "anchored, escaped": ({r"^model\.layers\.1\.self_attn\.v_proj": 6}, {r"^layers\.0\.self_attn\.v_proj": 100}),
    "regular expressions": ({r"layers\.\d+\.mlp\.(gate|up)_proj": 3}, {r".*\.1\..*o_proj": 11, "[qk]_proj": 13}),
    "suffix of a word does not count": ({"proj": 9, "_proj": 9}, {"j": 9}),
    "alternation leaks": ({"q_proj|k_proj": 5}, {"v_proj|o_proj": 7}),
    "a dot is any character": ({"self.attn.q_proj": 3}, {"mlp.up.proj": 9, "layers.0.self.attn.v_proj": 2}),
    "lookahead": ({r"(?!.*layers\.0).*q_proj": 5}, {}),
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_and_scalings_are_those_of_the_live_model(name, rslora, tiny, adapter_folder):
    ranks, alphas = PATTERNS[name]
    live, folder = adapter_folder(
        tiny("llama"), target_modules=LLAMA, r=4, lora_alpha=10, rank_pattern=ranks, alpha_pattern=alphas,
        use_rslora=rslora,
    )  # fmt: skip
    path = folder / "adapter_config.json"
    # PEFT sorts the patterns when it saves, so its own file can mean something else: put the live order back
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": ranks, "alpha_pattern": alphas}))
    wanted = {
        n: (m.r["default"], m.scaling["default"])
        for n, m in live.get_base_model().named_modules()
        if hasattr(m, "lora_A")
    }
    adapter = open_adapter(folder).require_sound()
    assert {p: (d.rank, d.scaling) for p, d in by_module(adapter).items()} == wanted


MODULES = [f"model.layers.{i}.{m}" for i in (0, 1, 10) for m in ("self_attn.q_proj", "mlp.up_proj")]
PIECES = ["q_proj", "up_proj", "self_attn", "mlp", r"layers\.1", "layers.1", "^model", "model", ".*", r"\d", "1", "."]
KEYS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).flatmap(
    lambda pieces: st.sampled_from([".".join(pieces), r"\.".join(pieces), "".join(pieces)])
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, st.integers(1, 64), max_size=5))
def test_any_alpha_pattern_is_matched_as_peft_matches_it(tmp_path_factory, alphas):
    folder = tmp_path_factory.mktemp("adapter")
    factors = {}
    for module in MODULES:
        factors[f"{WRAPPER}{module}.lora_A.weight"] = torch.ones(2, 4)
        factors[f"{WRAPPER}{module}.lora_B.weight"] = torch.ones(3, 2)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 99, "alpha_pattern": alphas}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    read = by_module(open_adapter(folder).require_sound())
    assert {m: read[m].scaling for m in MODULES} == {
        m: alphas.get(get_pattern_key(alphas.keys(), m), 99) / 2 for m in MODULES
    }


def test_a_rank_that_contradicts_the_config_is_an_error(llama, tmp_path):
    base, folder, _, _ = llama
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"q_proj": 3}}))
    with pytest.raises(InputError, match=r"q_proj: the config says rank 3, the tensors have rank 4"):
        loratool.merge(base, [folder], tmp_path / "m")


@pytest.mark.parametrize("alpha", [0, -1, None, "16", True])
def test_an_unusable_alpha_is_an_error(alpha, llama, tmp_path):
    base, folder, _, _ = llama
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": alpha}))
    with pytest.raises(InputError, match="lora_alpha"):
        loratool.merge(base, [folder], tmp_path / "m")


@pytest.mark.parametrize("value", [1, True, 0, False, None])
def test_rslora_is_on_where_peft_would_take_it_as_on(value, llama, tiny):
    _, folder, _, _ = llama
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": value}))
    live = peft.PeftModel.from_pretrained(tiny("llama"), folder)
    (wanted,) = {m.scaling["default"] for m in live.get_base_model().modules() if hasattr(m, "lora_A")}
    assert {d.scaling for d in by_module(open_adapter(folder).require_sound()).values()} == {wanted}


def test_converting_to_the_same_format_keeps_the_order_of_patterns(tiny, adapter_folder, tmp_path):
    ranks = {"q_proj": 8, "layers.0.self_attn.q_proj": 2}  # in sorted order the second would come first, and win
    live, folder = adapter_folder(tiny("llama"), target_modules=["q_proj"], r=4, rank_pattern=ranks)
    assert {m.r["default"] for m in live.get_base_model().modules() if hasattr(m, "lora_A")} == {8}
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": ranks}))
    loratool.convert(folder, tmp_path / "again", to="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "again")
    assert {m.r["default"] for m in again.get_base_model().modules() if hasattr(m, "lora_A")} == {8}
    loratool.convert(folder, tmp_path / "one.safetensors", to="peft")
    assert {d.rank for d in by_module(open_adapter(tmp_path / "one.safetensors").require_sound()).values()} == {8}


def test_embeddings_and_the_base_weight_that_peft_saves_along_are_read(saved, adapter_folder, tmp_path):
    model, base = saved("llama")
    _, folder = adapter_folder(model, target_modules=["embed_tokens", "q_proj"], r=3)
    tensors = load_file(folder / "adapter_model.safetensors")
    copy = f"{WRAPPER}model.embed_tokens.base_layer.weight"
    assert copy in tensors  # what PEFT does
    adapter = open_adapter(folder).require_sound()
    assert {t.path for t in adapter.base_copies} == {"model.embed_tokens"}
    delta = by_module(adapter)["model.embed_tokens"]
    assert delta.down.shape == (3, 64)
    assert delta.up.shape == (32, 3)
    tensors[copy] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="embed_tokens"):  # a resized or retrained embedding would be lost
        loratool.merge(base, [folder], tmp_path / "m")


def test_convolutions_keep_their_kernels(tiny, adapter_folder):
    _, folder = adapter_folder(tiny("unet"), target_modules=["conv1", "proj_in"], r=3)
    deltas = by_module(open_adapter(folder, arch="stable-diffusion").require_sound())
    for path, module in tiny("unet").named_modules():
        if path.endswith(("conv1", "proj_in")):
            out, inside, *kernel = module.weight.shape
            assert deltas[path].down.shape == (3, inside, *kernel)
            assert deltas[path].up.shape == (out, 3, 1, 1)


def test_names_that_no_family_explains_are_kept_as_they_are(tmp_path):
    save_file(
        {f"{WRAPPER}strange.{i}.proj.lora_{f}.weight": torch.ones(2, 2) for i in (0, 1) for f in "AB"},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    report = loratool.inspect(tmp_path)
    assert report.totals["families"] == []
    assert [row["module"] for row in report.rows] == ["strange.0.proj", "strange.1.proj"]


def test_half_a_pair_is_named(llama, tmp_path):
    base, folder, _, _ = llama
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"{WRAPPER}model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(MismatchError, match=r"layers\.1\.self_attn\.q_proj: half a pair: lora_B") as refusal:
        loratool.merge(base, [folder], tmp_path / "m")
    assert "save or copy the adapter again" in refusal.value.hint


def test_names_that_two_families_read_differently_have_rivals(tmp_path):
    from loratool import Architecture, Linear, Match
    from loratool.formats.peft import Peft
    from loratool.storage import checkpoint

    save_file(
        {f"{WRAPPER}h.0.proj.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    families = tuple(
        Architecture(n, Match(), (Linear(f"{p}.h.{{i}}.proj"),), ("proj",), prefixes={"": (f"{p}.",)})
        for n, p in (("one", "a"), ("two", "b"))
    )
    source = checkpoint.open_adapter(str(tmp_path))
    read = Peft().read(source, families)
    assert (read.families, read.rivals) == (("one",), ("two",))
    assert {t.path for t in Peft().read(source, families[:1]).deltas} == {"a.h.0.proj"}


def test_every_refusal_is_a_loratool_error():
    assert issubclass(AmbiguityError, LoratoolError)
    assert issubclass(FormatError, InputError)


def adapter_with(folder, modules, **config):
    factors = {}
    for module in modules:
        factors[f"{WRAPPER}{module}.lora_A.weight"] = torch.ones(2, 2)
        factors[f"{WRAPPER}{module}.lora_B.weight"] = torch.ones(2, 2)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


SPELLINGS = [
    r"^model\.layers\.0\.q_proj",
    "q_proj",
    r".*\.q_proj",
    "^model.layers.[01].q_proj",
    r"layers\.\d{1,2}\.q_proj",
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(SPELLINGS)), 3)), ids=str)
def test_the_first_key_wins_however_the_keys_are_spelled(order, tmp_path):
    alphas = {SPELLINGS[n]: 2 * n + 4 for n in order}
    modules = ["model.layers.0.q_proj", "model.layers.11.q_proj"]
    adapter = open_adapter(adapter_with(tmp_path, modules, alpha_pattern=alphas)).require_sound()
    assert {m: by_module(adapter)[m].scaling for m in modules} == {
        m: alphas.get(get_pattern_key(alphas.keys(), m), 2) / 2 for m in modules
    }
    warned = {f.where for f in adapter.findings if "several keys" in f.what}
    assert warned == {m for m in modules if sum(get_pattern_key([k], m) == k for k in alphas) > 1}


def test_thousands_of_literal_keys_for_thousands_of_modules_cost_little(tmp_path):
    modules = [f"blocks.{n}.to_q{n % 40}" for n in range(4000)]
    alphas = {"^" + re.escape(m): n + 1 for n, m in enumerate(modules)} | {f"x{n}": 1 for n in range(4000)}
    adapter_with(tmp_path, modules, alpha_pattern=alphas)
    start = time.process_time()
    adapter = open_adapter(tmp_path).require_sound()
    assert time.process_time() - start < 2
    assert [by_module(adapter)[m].scaling for m in modules[::500]] == [(n + 1) / 2 for n in range(0, 4000, 500)]


def test_quick_regular_expressions_have_a_deadline_together(tmp_path, monkeypatch):
    monkeypatch.setattr("loratool.formats.peft_config._Pattern.budget", 0.2)
    modules = [f"blocks.{n}.to_q" for n in range(1000)]
    adapter_with(tmp_path, modules, alpha_pattern={f"y{n}.*": 4 for n in range(1000)})
    start = time.process_time()
    with pytest.raises(InputError, match=r"alpha_pattern: the pattern 'y.*takes forever"):
        open_adapter(tmp_path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key",
    [
        "(q_projX){e<=1}",
        "(q_projX){1<=e<=2}",
        "(q_projX){i,d}",
        "[[:alpha:]]_proj",
        "[_[:alpha:]]+proj",
        "(?i)Q_PROJ",  # a flag in the middle of PEFT's expression: an error in Python 3.11
        r"\m\w*proj",
        r"\p{L}_proj",
        "(?|q|k)_proj",
        r"\L<names>",
        "(?<n>q)_proj",
    ],
)
def test_a_key_that_pythons_re_reads_otherwise_is_refused_by_name(field, key, tmp_path):
    modules = ["model.q_proj", "model.k_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # re warns of [[
        with contextlib.suppress(re.error):  # PEFT fails, or takes it as matching nothing
            assert get_pattern_key([key], modules[0]) == modules[0]
    adapter = open_adapter(adapter_with(tmp_path, modules, **{field: {key: 2}}))
    (found,) = [f for f in adapter.findings if f.level == "error"]
    assert found.where == f"adapter_config.json: {field}"
    assert repr(key) in found.what


@pytest.mark.parametrize(
    "key", ["q_proj)|(k_proj", "(a{2})+|q_proj", r"\w{6}", r"\w{,6}", r".{1,}\.q_proj", "(?i:Q_PROJ)"]
)
def test_a_key_that_pythons_re_reads_alike_is_matched_as_peft_matches_it(key, tmp_path):
    modules = ["model.q_proj", "model.k_proj", "model.other"]
    adapter = open_adapter(adapter_with(tmp_path, modules, alpha_pattern={key: 8})).require_sound()
    wanted = {m: 4 if get_pattern_key([key], m) == key else 1 for m in modules}
    assert {m: by_module(adapter)[m].scaling for m in modules} == wanted
    assert 4 in wanted.values()


def save_pipeline_file(tiny, folder, *components, **layers):
    """What diffusers writes for a pipeline; the header has the configs of `components` only."""
    torch.manual_seed(6)
    config = peft.LoraConfig(
        target_modules=["to_q", "conv1"], r=4, lora_alpha=6, alpha_pattern={"conv1": 3}, init_lora_weights=False
    )
    unet = tiny("unet")
    unet.add_adapter(config)
    for name in components:
        layers[f"{name}_lora_adapter_metadata"] = unet.peft_config["default"].to_dict()
    layers.setdefault("unet_lora_layers", peft.get_peft_model_state_dict(unet))
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, **layers)
    return unet, folder / "pytorch_lora_weights.safetensors"


def test_a_file_of_a_diffusers_pipeline_with_one_component_is_read_with_its_header(tiny, saved, run_model, tmp_path):
    _, base = saved("unet")
    unet, file = save_pipeline_file(tiny, tmp_path / "saved", "unet")
    wanted = run_model("unet", unet.eval())
    assert not torch.allclose(wanted, run_model("unet", tiny("unet")), atol=1e-3)
    loratool.convert(file, tmp_path / "plain", to="peft", arch="stable-diffusion")
    for number, adapter in enumerate((file, tmp_path / "plain")):
        loratool.merge(base, [adapter], tmp_path / f"m{number}")
        merged = type(unet).from_pretrained(tmp_path / f"m{number}").eval()
        torch.testing.assert_close(run_model("unet", merged), wanted, rtol=1e-4, atol=1e-5)


def test_a_header_with_the_configs_of_several_components_says_the_strength_of_each(tiny, tmp_path):
    weights = {f"text_model.encoder.layers.0.self_attn.q_proj.lora_{f}.weight": torch.ones(4, 4) for f in "AB"}
    _, file = save_pipeline_file(tiny, tmp_path, "unet", "text_encoder", text_encoder_lora_layers=weights)
    adapter = open_adapter(file, arch="stable-diffusion").require_sound()
    found = {(t.component, t.path.rpartition(".")[2]): d.scaling for t, (d,) in adapter.deltas.items()}
    assert found == {("unet", "to_q"): 1.5, ("unet", "conv1"): 0.75, ("text_encoder", "q_proj"): 1.5}


def test_a_header_with_the_config_of_another_component_is_refused(tiny, tmp_path):
    _, file = save_pipeline_file(tiny, tmp_path, "unet")
    config = json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 6})
    save_file(load_file(file), tmp_path / "other.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(InputError, match=r"text_encoder\.\*, not for 'unet\."):
        open_adapter(tmp_path / "other.safetensors").require_sound()


@pytest.mark.parametrize("wrapper", ["", WRAPPER], ids=["diffusers", "PEFT"])
def test_only_names_without_peft_s_wrapper_are_those_of_a_diffusers_file(wrapper, tmp_path):
    """`transformer.` is how diffusers calls a component, and how many language models begin."""
    stem = f"{wrapper}transformer.nobody_knows.0.attn.to_q"
    factors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}
    save_file(factors, tmp_path / "one.safetensors")
    adapter = open_adapter(tmp_path / "one.safetensors", alpha=2)
    assert adapter.origin.format == ("peft" if wrapper else "diffusers")
    found = [f.what for f in adapter.findings if f.level == "error"]
    assert found == ([] if wrapper else ["no family has such a module"])
