"""Fused weights whose parts are trained, stored or asked for apart: every verb gives the sums that fp64 gives.

The oracle is B @ A in fp64, put into the weight by the reshape that each family's modeling code uses. Factors and
weights are small multiples of powers of two, so merging in fp32 rounds nothing and results are compared bit for bit.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import run_main, snapshot

import loratool
import loratool.operations.extract
import loratool.operations.merge
from loratool import operations
from loratool.adapter import Weighted
from loratool.api import open_adapter
from loratool.operations import panels
from loratool.plan import Plan
from loratool.plugins import load
from loratool.storage import checkpoint
from loratool.storage.load import Loader
from loratool.tensors import Span

IN = 7  # input features: unlike every number of rows, so that swapped axes are noticed
LAYER = "model.layers.0"
#: Families of this file alone: names for the parts of weights whose families know of no other spelling.
PLUGIN = """
from loratool import Architecture, Fused, Linear, hookimpl, stride

ATTENTION = {"bloom": "transformer.h.{i}.self_attention.query_key_value", "gpt2": "transformer.h.{i}.attn.c_attn",
             "falcon": "transformer.h.{i}.self_attention.query_key_value", "codegen": "transformer.h.{i}.attn.qkv_proj"}
EXPERTS = "transformer.blocks.{i}.ffn.experts"

@hookimpl
def register_architectures():
    split = [
        Architecture(name=f"split-{name}", like=name,
                     aliases=(f"layers.{{i}}.(q_proj|k_proj|v_proj) = {fused}[(q|k|v)]",))
        for name, fused in ATTENTION.items()
    ]
    dbrx = Architecture(
        name="split-dbrx", like="dbrx", aliases=(f"{EXPERTS}.{{e}}.(w1|v1) = {EXPERTS}.mlp.(w1|v1)[{{e}}]",))
    oss = Architecture(
        name="split-oss", like="gpt-oss",
        aliases=("layers.{i}.expert.{e}.gate_up_proj = model.layers.{i}.mlp.experts.gate_up_proj[{e}]",))
    strided = Architecture(
        name="strided",
        layers=(Linear("layers.{i}.(gate_up|down)", group="mlp"),),
        fused=(Fused("layers.{i}.gate_up", parts=("gate", "up"), layout=stride(2)),),
        aliases=("layers.{i}.(gate|up) = layers.{i}.gate_up[(gate|up)]",))
    return [*split, dbrx, oss, strided]
"""


class Case(NamedTuple):
    """A fused weight: its module in the file and its rows, what its parts are called, and where they lie in it.

    `parts(w)` gives views of w (out, in) in the shape that the modeling code has them in, in the order of `names`.
    """

    arch: str
    config: dict[str, Any]
    fused: str
    out: int
    names: tuple[str, ...]
    parts: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    conv1d: bool = False  # stored (in, out)
    leaf: str = ".weight"

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.T if self.conv1d else matrix).contiguous()

    def apart(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts as matrices (rows, in)."""
        return {name: part.reshape(-1, IN) for name, part in zip(self.names, self.parts(matrix), strict=True)}


def heads(groups: int, queries: int, dim: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """[groups, (queries, k, v), dim], as in modeling_falcon (new decoder) and modeling_internlm2."""

    def parts(w):
        grouped = w.view(groups, queries + 2, dim, IN)
        return grouped[:, :-2], grouped[:, -2], grouped[:, -1]

    return parts


def qkv(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{part}_proj" for part in "qkv")


GQA = {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "concat-equal": Case(
        "baichuan", {"model_type": "baichuan", "vocab_size": 8}, f"{LAYER}.self_attn.W_pack", 18,
        qkv(f"{LAYER}.self_attn"), lambda w: w.chunk(3),
    ),
    "concat-gqa": Case(
        "phi3", {"model_type": "phi3", **GQA}, f"{LAYER}.self_attn.qkv_proj", 24,
        qkv(f"{LAYER}.self_attn"), lambda w: (w[:12], w[12:18], w[18:]),
    ),
    "concat-gate-up": Case(
        "phi3", {"model_type": "phi3", "intermediate_size": 10}, f"{LAYER}.mlp.gate_up_proj", 20,
        (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"), lambda w: w.chunk(2),
    ),
    "interleave-bloom": Case(  # view(batch, length, num_heads, 3, head_dim)
        "split-bloom", {"model_type": "bloom", "n_head": 2, "hidden_size": 6},
        "transformer.h.0.self_attention.query_key_value", 18, qkv("layers.0"),
        lambda w: tuple(w.view(2, 3, 3, IN).unbind(1)),
    ),
    "interleave-internlm2": Case(
        "internlm2", {"model_type": "internlm2", **GQA}, f"{LAYER}.attention.wqkv", 24,
        qkv(f"{LAYER}.self_attn"), heads(2, 2, 3),
    ),
    "interleave-falcon": Case(
        "split-falcon",
        {"model_type": "falcon", "hidden_size": 12, "num_attention_heads": 4, "num_kv_heads": 2,
         "new_decoder_architecture": True, "multi_query": True},
        "transformer.h.0.self_attention.query_key_value", 24, qkv("layers.0"), heads(2, 2, 3),
    ),
    "blocks": Case(  # qkv.reshape(..., 4, -1), then split into query, value, key
        "split-codegen", {"model_type": "codegen"}, "transformer.h.0.attn.qkv_proj", 24, qkv("layers.0"),
        lambda w: tuple(w.view(4, 3, 2, IN)[:, n] for n in (0, 2, 1)),
    ),
    "stride": Case(
        "strided", {}, "layers.0.gate_up", 10, ("layers.0.gate", "layers.0.up"), lambda w: (w[::2], w[1::2]),
    ),
    "stack": Case(  # w1.view(num_experts, ffn_hidden_size, hidden_size)
        "split-dbrx", {"model_type": "dbrx", "ffn_config": {"ffn_hidden_size": 4}},
        "transformer.blocks.0.ffn.experts.mlp.w1", 12,
        tuple(f"transformer.blocks.0.ffn.experts.{e}.w1" for e in range(3)),
        lambda w: tuple(w.view(3, 4, IN)), leaf="",
    ),
    "conv1d": Case(
        "split-gpt2", {"model_type": "gpt2", "n_embd": 6}, "transformer.h.0.attn.c_attn", 18, qkv("layers.0"),
        lambda w: w.chunk(3), conv1d=True,
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "apart.py"
    file.write_text(PLUGIN)
    loaded = load()
    loaded.add_file(file)
    return loaded


def numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Multiples of 1/8 below 1: sums of their products are exact in fp32."""
    return torch.randint(-7, 8, shape, generator=generator) / 8


def matrix_of(case: Case, seed: int = 0) -> torch.Tensor:
    return numbers(torch.Generator().manual_seed(seed), case.out, IN)


def base_of(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None) -> Path:
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def fused_base(folder: Path, case: Case, matrix: torch.Tensor, **more: torch.Tensor) -> Path:
    return base_of(folder, {case.fused + case.leaf: case.stored(matrix), **more}, case.config)


def split_base(folder: Path, case: Case, matrix: torch.Tensor) -> Path:
    tensors = {f"{name}.weight": case.stored(part) for name, part in case.apart(matrix).items()}
    return base_of(folder, tensors, case.config)


class Factors(NamedTuple):
    up: torch.Tensor
    down: torch.Tensor
    alpha: float

    @property
    def delta(self) -> torch.Tensor:
        """In fp64, by PEFT's rule."""
        return self.alpha / self.down.shape[0] * self.up.double() @ self.down.double()


def random_factors(shapes: dict[str, int], seed: int = 1, *, alike: bool = False) -> dict[str, Factors]:
    """Factors for modules of so many rows; ranks and alphas differ unless `alike`, and scalings stay exact."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for n, (module, rows) in enumerate(shapes.items()):
        rank, alpha = (2, 3) if alike else ((2, 3), (1, 0.5), (4, 5))[n % 3]
        found[module] = Factors(numbers(generator, rows, rank), numbers(generator, rank, IN), alpha)
    return found


def peft_of(folder: Path, factors: dict[str, Factors], **config: Any) -> Path:
    folder.mkdir()
    tensors = {}
    for module, (up, down, _) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    patterns = {
        "rank_pattern": {"^" + re.escape(m): f.down.shape[0] for m, f in factors.items()},
        "alpha_pattern": {"^" + re.escape(m): f.alpha for m, f in factors.items()},
    }
    content = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(factors), **patterns, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def parts_factors(case: Case, names: tuple[str, ...] | None = None, seed: int = 1, *, alike: bool = False):
    sizes = {name: len(part) for name, part in case.apart(matrix_of(case)).items()}
    return random_factors({name: sizes[name] for name in names or case.names}, seed, alike=alike)


def plus(case: Case, matrix: torch.Tensor, factors: dict[str, Factors], weight: float = 1.0) -> torch.Tensor:
    """The oracle: the fused matrix in fp64 with every delta in its place."""
    result = matrix.double().clone()
    views = dict(zip(case.names, case.parts(result), strict=True)) | {case.fused: result}
    for module, factor in factors.items():
        views[module] += weight * factor.delta.view(views[module].shape)
    return result


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


# --------------------------------------------------------------------------------------------------------------- merge


@every_case
@pytest.mark.parametrize("count", [1, 2, 3])
def test_some_parts_merge_into_the_fused_weight(case, count, tmp_path, plugins):
    matrix, names = matrix_of(case), case.names[-count:]
    other = numbers(torch.Generator().manual_seed(9), 5, 5)
    base = fused_base(tmp_path / "base", case, matrix, other=other)
    factors = parts_factors(case, names)
    loratool.merge(base, [peft_of(tmp_path / "adapter", factors)], tmp_path / "out", arch=case.arch, plugins=plugins)
    merged = tensors_of(tmp_path / "out")
    wanted = plus(case, matrix, factors)
    assert merged.keys() == {case.fused + case.leaf, "other"}
    assert torch.equal(merged[case.fused + case.leaf].double(), case.stored(wanted))
    assert torch.equal(merged["other"], other)
    for name, was, now in zip(case.names, case.parts(matrix), case.parts(wanted), strict=True):
        assert torch.equal(was.double(), now) == (name not in names)


@every_case
def test_a_fused_adapter_merges_into_a_base_that_has_the_parts_apart(case, tmp_path, plugins):
    matrix = matrix_of(case)
    base = split_base(tmp_path / "base", case, matrix)
    factors = random_factors({case.fused: case.out})
    loratool.merge(base, [peft_of(tmp_path / "adapter", factors)], tmp_path / "out", arch=case.arch, plugins=plugins)
    merged = tensors_of(tmp_path / "out")
    wanted = case.apart(plus(case, matrix, factors))
    assert merged.keys() == {f"{name}.weight" for name in case.names}
    for name in case.names:
        assert torch.equal(merged[f"{name}.weight"].double(), case.stored(wanted[name]))


@every_case
@pytest.mark.parametrize("split", [False, True])
def test_split_and_fused_adapters_add_up_with_their_weights_in_any_order(case, split, tmp_path, plugins):
    matrix = matrix_of(case)
    base = (split_base if split else fused_base)(tmp_path / "base", case, matrix)
    whole, apart = random_factors({case.fused: case.out}, 2), parts_factors(case, case.names[:2], 3)
    adapters = [peft_of(tmp_path / "whole", whole), peft_of(tmp_path / "apart", apart)]
    wanted = plus(case, plus(case, matrix, whole, 0.5), apart, -2.0)
    stored = {f"{n}.weight": case.stored(p) for n, p in case.apart(wanted).items()}
    stored = stored if split else {case.fused + case.leaf: case.stored(wanted)}
    common = {"arch": case.arch, "plugins": plugins}
    loratool.merge(base, adapters, tmp_path / "one", weights=[0.5, -2], **common)
    loratool.merge(base, adapters[::-1], tmp_path / "two", weights=[-2, 0.5], **common)
    for name, tensor in tensors_of(tmp_path / "one").items():
        assert torch.equal(tensor.double(), stored[name])
        assert torch.equal(tensor, tensors_of(tmp_path / "two")[name])


OSS = {"model_type": "gpt_oss", "hidden_size": IN, "intermediate_size": 5, "num_local_experts": 3}
STACK = f"{LAYER}.mlp.experts.gate_up_proj"


def oss_stack(seed: int = 0) -> torch.Tensor:
    """gate_up_proj (experts, in, out) with out = 2 x 5, as modeling_gpt_oss holds it."""
    return numbers(torch.Generator().manual_seed(seed), 3, IN, 10)


def oss_parts(stack: torch.Tensor, experts: int = 3) -> dict[str, torch.Tensor]:
    """gate = [..., ::2] and up = [..., 1::2] of each expert, as matrices (5, in): views."""
    names = ("gate_proj", "up_proj")
    return {f"{LAYER}.mlp.experts.{e}.{n}": stack[e, :, k::2].T for e in range(experts) for k, n in enumerate(names)}


def test_gate_and_up_of_single_experts_merge_into_the_columns_of_a_stack(tmp_path):
    stack = oss_stack()
    wanted = stack.double().clone()
    views = oss_parts(wanted)
    factors = random_factors(dict.fromkeys([*views][1:4], 5))
    base = base_of(tmp_path / "base", {STACK: stack}, OSS)
    loratool.merge(base, [peft_of(tmp_path / "adapter", factors)], tmp_path / "out")
    for module, factor in factors.items():
        views[module] += factor.delta
    assert torch.equal(tensors_of(tmp_path / "out")[STACK].double(), wanted)


def test_an_expert_trained_as_a_whole_merges_into_experts_that_lie_apart(tmp_path, plugins):
    """One matrix for each expert is a Linear layer: (out, in), though the family's stack is (experts, in, out)."""
    parts = oss_parts(oss_stack())
    base = base_of(tmp_path / "base", {f"{n}.weight": t for n, t in parts.items()}, OSS)
    factors = random_factors({"layers.0.expert.1.gate_up_proj": 10})
    loratool.merge(base, [peft_of(tmp_path / "a", factors)], tmp_path / "out", arch="split-oss", plugins=plugins)
    delta = factors["layers.0.expert.1.gate_up_proj"].delta
    merged = tensors_of(tmp_path / "out")
    for name, part in parts.items():
        added = {"1.gate_proj": delta[::2], "1.up_proj": delta[1::2]}.get(name.split("experts.")[1], 0)
        assert torch.equal(merged[f"{name}.weight"].double(), part.double() + added), name


# ------------------------------------------------------------------------------------------------------------- extract


def peft_delta(folder: Path, module: str) -> torch.Tensor:
    """scaling * B @ A in fp64 of one module, from the files alone; the config must give all modules one alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    assert not config["alpha_pattern"]
    assert not config["rank_pattern"]
    return config["lora_alpha"] / config["r"] * up @ down


@every_case
@pytest.mark.parametrize("forms", ["fused-split", "split-fused", "split-split", "fused-fused"])
def test_an_extract_between_any_two_forms_is_an_adapter_of_the_fused_weight(case, forms, tmp_path, plugins):
    write = {"fused": fused_base, "split": split_base}
    tuned_form, base_form = forms.split("-")
    factors = random_factors({case.fused: case.out}, 5)
    matrix = matrix_of(case)
    tuned = plus(case, matrix, factors).float()
    folders = write[tuned_form](tmp_path / "tuned", case, tuned), write[base_form](tmp_path / "base", case, matrix)
    common = {"arch": case.arch, "plugins": plugins}
    report = loratool.extract(*folders, tmp_path / "adapter", rank=2, **common)
    assert [row["module"] for row in report.rows] == [case.fused]
    if forms == "split-split" and case.arch == "baichuan":
        assert report.rows[0]["role"] == "qkv"  # not that of the first part
    assert not [f for f in report.findings if "only in the base" in f.what]
    module = case.fused if case.leaf else case.fused.rpartition(".")[0]  # of a bare parameter PEFT names the owner
    delta = peft_delta(tmp_path / "adapter", module)
    torch.testing.assert_close(delta, factors[case.fused].delta, rtol=0, atol=1e-5)
    for form in ("fused", "split"):
        base = write[form](tmp_path / form, case, matrix)
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / f"out-{form}", **common)
        again = tensors_of(tmp_path / f"out-{form}")
        wanted = tensors_of(write[form](tmp_path / f"wanted-{form}", case, tuned))
        assert again.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("forms", ["stack-apart", "apart-stack", "apart-apart", "stack-stack"])
def test_gate_and_up_of_experts_are_extracted_from_stacks_and_from_matrices_apart(forms, tmp_path):
    def write(folder: Path, stack: torch.Tensor, form: str) -> Path:
        parts = {f"{n}.weight": t for n, t in oss_parts(stack).items()}
        return base_of(folder, {STACK: stack} if form == "stack" else parts, OSS)

    generator = torch.Generator().manual_seed(6)
    stack, deltas = oss_stack(), [numbers(generator, 10, 2) @ numbers(generator, 2, IN) for _ in range(3)]
    tuned = stack + torch.stack([d.T for d in deltas])
    folders = (write(tmp_path / n, s, f) for n, s, f in zip("tb", (tuned, stack), forms.split("-"), strict=True))
    loratool.extract(*folders, tmp_path / "adapter", rank=2, arch="gpt-oss")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{LAYER}.mlp.experts.lora_{x}.weight"] for x in "AB")
    for expert, delta in enumerate(deltas):  # PEFT: A (experts x r, in), B (out, r x experts), the experts fastest
        found = up[:, expert::3] @ down[2 * expert : 2 * expert + 2]
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", [{0, 2}, {1}, {2}])
@pytest.mark.parametrize("target", [(), (f"{STACK}[2]", f"{STACK}[1]")])
def test_experts_that_did_not_change_keep_their_places_in_a_stack(changed, target, tmp_path):
    """Nobody routes to some experts while tuning; a stack without them would update their neighbours."""
    stack = oss_stack()
    tuned = stack.clone()
    for n in changed:
        tuned[n] += n + 1
    folders = base_of(tmp_path / "tuned", {STACK: tuned}, OSS), base_of(tmp_path / "base", {STACK: stack}, OSS)
    if target and 0 in changed:
        tuned[0] = stack[0]
    report = loratool.extract(*folders, tmp_path / "adapter", rank=2, target=target, rest="skip")
    assert report.totals["changed"] == len(changed - {0} if target else changed)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{LAYER}.mlp.experts.lora_{x}.weight"] for x in "AB")
    rank = len(down) // 3
    found = torch.stack([(up[:, e::3] @ down[rank * e : rank * (e + 1)]).T for e in range(3)])
    torch.testing.assert_close(found, tuned - stack, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rest", ["error", "skip"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_change_of_one_expert_that_is_not_extracted_is_never_overlooked(rest, changed, tmp_path):
    query = f"{LAYER}.self_attn.q_proj.weight"
    was = {query: numbers(torch.Generator(), 6, IN), STACK: oss_stack()}
    now = {name: tensor.clone() for name, tensor in was.items()}
    now[query] += 1
    now[STACK][changed] += 2
    folders = base_of(tmp_path / "tuned", now, OSS), base_of(tmp_path / "base", was, OSS)
    settings = {"rank": 1, "target": "q_proj", "rest": rest}
    if rest == "error":
        with pytest.raises(loratool.LoratoolError, match="1 tensors changed that are not extracted"):
            loratool.extract(*folders, tmp_path / "adapter", **settings)
        return
    report = loratool.extract(*folders, tmp_path / "adapter", **settings)
    assert report.totals["skipped_tensors"] == [STACK]
    left, kept = 4 * IN * 10, 6 * IN
    assert report.totals["left_out"] == pytest.approx(left / (left + kept))


def test_parts_of_different_dtypes_are_no_matrix_to_extract(tmp_path):
    case = CASES["concat-equal"]
    tuned, base = (split_base(tmp_path / n, case, matrix_of(case, seed)) for seed, n in enumerate(("tuned", "base")))
    key = f"{case.names[1]}.weight"
    tensors = tensors_of(tuned)
    save_file(tensors | {key: tensors[key].half()}, tuned / "model.safetensors")
    with pytest.raises(loratool.LoratoolError, match=r"k_proj.weight F16 \[6, 7\]"):
        loratool.extract(tuned, base, tmp_path / "adapter", rank=1)


# ------------------------------------------------------------------------------------------------------------- convert


def kohya_delta(file: Path, module: str) -> torch.Tensor:
    """alpha / rank * up @ down in fp64, from the file alone."""
    tensors = {n.removeprefix("lora_te_"): t.double() for n, t in load_file(file).items()}
    up, down = (tensors[f"{module.replace('.', '_')}.lora_{x}.weight"] for x in ("up", "down"))
    return tensors[f"{module.replace('.', '_')}.alpha"] / len(down) * up @ down


SIZELESS = ["concat-equal", "blocks", "stride"]  # layouts that follow from the rows alone: no config is needed


def alike(case: Case, names: tuple[str, ...]) -> dict[str, Factors]:
    """Factors of different ranks and one scaling."""
    ranks = dict(zip(case.names, (2, 1, 4), strict=False))
    sizes = {name: len(part) for name, part in case.apart(matrix_of(case)).items()}
    generator = torch.Generator().manual_seed(7)
    return {
        n: Factors(numbers(generator, sizes[n], ranks[n]), numbers(generator, ranks[n], IN), 1.5 * ranks[n])
        for n in names
    }


@pytest.mark.parametrize("case", [CASES[name] for name in SIZELESS], ids=SIZELESS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_joined_exactly_for_a_format_that_has_the_fused_name_and_back(case, count, tmp_path, plugins):
    factors = alike(case, case.names[-count:])
    wanted = plus(case, torch.zeros(case.out, IN), factors)
    peft_of(tmp_path / "adapter", factors)
    common = {"arch": case.arch, "plugins": plugins}
    loratool.convert(tmp_path / "adapter", tmp_path / "a.safetensors", to="kohya", **common)
    assert len(load_file(tmp_path / "a.safetensors")) == 3
    assert torch.equal(kohya_delta(tmp_path / "a.safetensors", case.fused), wanted)
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "back", to="peft", **common)
    assert torch.equal(peft_delta(tmp_path / "back", case.fused), wanted)


NEEDY = ["concat-gqa", "concat-gate-up", "interleave-bloom", "interleave-internlm2", "interleave-falcon", "conv1d"]


@pytest.mark.parametrize("case", [CASES[name] for name in NEEDY], ids=NEEDY)
def test_parts_whose_places_need_the_config_are_not_joined_without_it(case, tmp_path, plugins):
    peft_of(tmp_path / "adapter", alike(case, case.names))
    before = snapshot(tmp_path)
    with pytest.raises(loratool.LoratoolError, match=r"cannot be joined without the base: .*the config has no") as seen:
        loratool.convert(tmp_path / "adapter", tmp_path / "a.safetensors", to="kohya", arch=case.arch, plugins=plugins)
    assert seen.value.where == case.fused
    assert seen.value.exit_code == 3
    assert "--base" in seen.value.hint
    assert "config.json" in seen.value.hint
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["base", "base/config.json"])
@pytest.mark.parametrize("case", [CASES[name] for name in NEEDY], ids=NEEDY)
def test_the_config_of_the_base_says_where_parts_go_when_they_are_joined(case, place, tmp_path, plugins):
    """Of the base only config.json is there, and its weights are not needed."""
    factors = alike(case, case.names)
    peft_of(tmp_path / "adapter", factors)
    base_of(tmp_path / "base", {}, case.config)
    (tmp_path / "base/model.safetensors").unlink()
    common = {"arch": case.arch, "plugins": plugins, "base": tmp_path / place}
    loratool.convert(tmp_path / "adapter", tmp_path / "a.safetensors", to="kohya", **common)
    wanted = plus(case, torch.zeros(case.out, IN), factors)
    assert torch.equal(kohya_delta(tmp_path / "a.safetensors", case.fused), wanted)
    report = loratool.compare(tmp_path / "adapter", tmp_path / "a.safetensors", **common)
    assert report.totals["distance"] < 1e-7
    other = random_factors({case.fused: case.out}, 7)
    peft_of(tmp_path / "other", other)
    distance = (other[case.fused].delta - wanted).norm() / max(other[case.fused].delta.norm(), wanted.norm())
    report = loratool.compare(tmp_path / "adapter", tmp_path / "other", **common)
    assert report.totals["distance"] == pytest.approx(float(distance), abs=1e-12)


def test_a_base_names_the_family_of_an_adapter(tmp_path):
    """By its model_type; without it LLaMA's names are read as LLaMA's."""
    case = CASES["interleave-internlm2"]
    peft_of(tmp_path / "adapter", alike(case, case.names))
    base_of(tmp_path / "base", {}, case.config)
    report = loratool.convert(
        tmp_path / "adapter", tmp_path / "a.safetensors", to="kohya", base=tmp_path / "base", dry_run=True
    )
    assert report.totals["families"] == ["internlm2"]
    assert sorted(row["module"] for row in report.rows) == [f"{case.fused}[{part}]" for part in "kqv"]


def test_a_base_without_a_config_is_named(tmp_path):
    peft_of(tmp_path / "adapter", alike(CASES["concat-gqa"], CASES["concat-gqa"].names))
    base_of(tmp_path / "base", {}, None)
    with pytest.raises(loratool.LoratoolError, match=r"there is no config\.json") as seen:
        loratool.convert(tmp_path / "adapter", tmp_path / "a.safetensors", to="kohya", base=tmp_path / "base")
    assert seen.value.exit_code == 5
    assert str(tmp_path / "base") in str(seen.value)


def test_a_split_adapter_stays_split_in_its_own_format(tmp_path):
    """A copy in PEFT needs no layout, so no config either."""
    factors = alike(CASES["concat-gqa"], CASES["concat-gqa"].names)
    peft_of(tmp_path / "adapter", factors)
    loratool.convert(tmp_path / "adapter", tmp_path / "copy", to="peft", arch="phi3")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "copy"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_parts_of_different_scalings_are_joined_once_resize_has_folded_them_in(tmp_path):
    case = CASES["concat-equal"]
    factors = parts_factors(case)
    peft_of(tmp_path / "adapter", factors)
    with pytest.raises(loratool.LoratoolError, match="different scalings") as seen:
        loratool.convert(tmp_path / "adapter", tmp_path / "a.safetensors", to="kohya", arch=case.arch)
    assert "resize --energy 1 folds" in seen.value.hint
    loratool.resize(tmp_path / "adapter", tmp_path / "folded", energy=1, arch=case.arch)
    loratool.convert(tmp_path / "folded", tmp_path / "a.safetensors", to="kohya", arch=case.arch)
    wanted = plus(case, torch.zeros(case.out, IN), factors)
    torch.testing.assert_close(kohya_delta(tmp_path / "a.safetensors", case.fused), wanted, rtol=0, atol=1e-5)


def refused(folder: Path, factors: dict[str, Factors], arch: str) -> str:
    """What convert to kohya says; nothing may be written."""
    peft_of(folder / "adapter", factors)
    before = snapshot(folder)
    with pytest.raises(loratool.LoratoolError) as seen:
        loratool.convert(folder / "adapter", folder / "a.safetensors", to="kohya", arch=arch)
    assert snapshot(folder) == before
    assert seen.value.exit_code == 3
    assert seen.value.hint
    return str(seen.value)


def test_parts_of_different_dtypes_are_not_joined(tmp_path):
    case = CASES["concat-equal"]
    factors = alike(case, case.names)
    up, down, alpha = factors[case.names[1]]
    factors[case.names[1]] = Factors(up.half(), down.half(), alpha)
    assert "different dtypes" in refused(tmp_path, factors, case.arch)


def test_parts_of_a_size_that_the_layout_does_not_have_are_not_joined(tmp_path):
    case = CASES["concat-equal"]
    q, k, _ = case.names
    factors = random_factors({q: 12, k: 6}, alike=True)  # 18 rows together, as many as three parts of six
    assert "W_pack[q] has 12 rows, which its layout does not allow" in refused(tmp_path, factors, case.arch)


def test_a_weight_that_is_trained_whole_and_in_parts_is_not_converted_but_merged(tmp_path):
    case = CASES["concat-equal"]
    factors = random_factors({case.fused: 18, case.names[0]: 6}, alike=True)
    assert "as a whole and in parts" in refused(tmp_path, factors, case.arch)
    base = fused_base(tmp_path / "base", case, matrix_of(case))
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    merged = tensors_of(tmp_path / "out")[f"{case.fused}.weight"]
    assert torch.equal(merged.double(), plus(case, matrix_of(case), factors))


MOE = {
    "mixtral": f"{LAYER}.block_sparse_moe.experts.{{e}}.",
    "qwen3-moe": f"{LAYER}.mlp.experts.{{e}}.",
}
MOE_NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3-moe": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("arch", MOE)
@pytest.mark.parametrize("version", ["0.18.0", "0.19.0"])
def test_stacked_parameters_become_one_module_an_expert_in_another_format(arch, version, tmp_path):
    experts, rank, inner = 3, 2, 5
    generator = torch.Generator().manual_seed(8)
    sizes = {".base_layer": (2 * inner, IN), "": (IN, inner)}  # gate_up_proj and down_proj: (experts, out, in)
    tensors, deltas = {}, {}
    for nest, (out, into) in sizes.items():
        swap = version < "0.19"  # A had the size of the second axis, B that of the third
        first, last = (out, into) if swap else (into, out)
        down, up = numbers(generator, experts * rank, first), numbers(generator, last, rank * experts)
        tensors[f"base_model.model.{LAYER}.mlp.experts{nest}.lora_A.weight"] = down
        tensors[f"base_model.model.{LAYER}.mlp.experts{nest}.lora_B.weight"] = up
        for e in range(experts):
            delta = 1.5 * up[:, e::experts].double() @ down[rank * e : rank * (e + 1)].double()
            deltas[nest, e] = delta.T if swap else delta
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": [], "peft_version": version,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }  # fmt: skip
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    loratool.convert(tmp_path / "adapter", tmp_path / "a.safetensors", to="kohya", arch=arch)
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "back", to="peft", arch=arch)
    assert len(load_file(tmp_path / "a.safetensors")) == 3 * 3 * experts
    for e in range(experts):
        gate, up, down = (MOE[arch].format(e=e) + name for name in MOE_NAMES[arch])
        wanted = {gate: deltas[".base_layer", e][:inner], up: deltas[".base_layer", e][inner:], down: deltas["", e]}
        for module, delta in wanted.items():
            assert torch.equal(kohya_delta(tmp_path / "a.safetensors", module), delta)
        for nest in sizes:  # and in PEFT's spelling the experts are stacked again, as PEFT 0.19 has them
            assert torch.equal(
                stacked_delta(tmp_path / "back", f"{LAYER}.mlp.experts{nest}", e, experts), deltas[nest, e]
            )


def stacked_delta(folder, module, expert, experts):
    """The update of one expert, by the order of PEFT 0.19 and later, in fp64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_version"] == "0.19.0"
    tensors = load_file(folder / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{module}.lora_{f}.weight"].double() for f in "AB")
    rank = len(down) // experts
    name = f"{LAYER}.mlp.experts." + ("gate_up_proj" if module.endswith("base_layer") else "down_proj")
    alphas = [v for k, v in config["alpha_pattern"].items() if re.fullmatch(rf"(.*\.)?({k})$", name)]
    alpha = alphas[0] if alphas else config["lora_alpha"]
    return alpha / rank * up[:, expert::experts] @ down[rank * expert : rank * (expert + 1)]


# ------------------------------------------------------------------------------------------------------------- inspect


ROLES = {"stride": ("gate", "up"), "concat-gate-up": ("gate", "up"), "blocks": ("q", "k", "v")}


@pytest.mark.parametrize("name", [name for name in CASES if name != "stack"])
def test_parts_are_inspected_as_what_they_are(name, tmp_path, plugins):
    case = CASES[name]
    factors = parts_factors(case)
    peft_of(tmp_path / "adapter", factors)
    report = loratool.inspect(tmp_path / "adapter", arch=case.arch, plugins=plugins)
    roles = ROLES.get(name, ("q", "k", "v"))
    wanted = {f"{case.fused}[{role}]": (role, factors[part]) for part, role in zip(case.names, roles, strict=True)}
    assert {row["module"]: row["role"] for row in report.rows} == {m: role for m, (role, _) in wanted.items()}
    for row in report.rows:
        factor = wanted[row["module"]][1]
        assert (row["up"], row["down"], row["alpha"]) == ([*factor.up.shape], [*factor.down.shape], factor.alpha)


#: what is said of the parts of a fused module: their rows too, where these do not depend on the config
TOLD = {
    "concat-equal": ["q 0-5", "k 6-11", "v 12-17"],
    "concat-gqa": ["q", "k", "v"],
    "concat-gate-up": ["gate", "up"],
    "interleave-bloom": ["q", "k", "v"],
    "interleave-falcon": ["q", "k", "v"],
    "blocks": ["q 4 x 2", "v 4 x 2", "k 4 x 2"],
    "stride": ["gate 0, 2 ...", "up 1, 3 ..."],
    "stack": [],
}


@pytest.mark.parametrize("name", TOLD)
def test_the_parts_of_a_fused_module_are_inspected_by_name(name, tmp_path, plugins):
    case = CASES[name]
    peft_of(tmp_path / "adapter", random_factors({case.fused: case.out}))
    report = loratool.inspect(tmp_path / "adapter", arch=case.arch, plugins=plugins)
    assert [(row["module"], row.get("parts", [])) for row in report.rows] == [(case.fused, TOLD[name])]


# ------------------------------------------------------------------------------------------------------------- compare


def test_a_stack_is_compared_with_the_modules_that_it_stands_for(tmp_path):
    """gate_up_proj of transformers 5 is w1 and w3 of each expert."""
    rank, experts, inner = 2, 2, 5
    generator = torch.Generator().manual_seed(4)
    down, up = numbers(generator, experts * rank, IN), numbers(generator, 2 * inner, rank * experts)
    (tmp_path / "stacked").mkdir()
    prefix = f"base_model.model.{LAYER}.mlp.experts.lora_"
    stacked = {f"{prefix}A.weight": down, f"{prefix}B.weight": up}
    save_file(stacked, tmp_path / "stacked" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "peft_version": "0.19.0"}
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    (tmp_path / "stacked" / "adapter_config.json").write_text(json.dumps(config))
    single = {}
    for e in range(experts):
        one, part = up[:, e::experts], down[rank * e : rank * (e + 1)]
        for n, name in enumerate(("w1", "w3")):
            rows = one[inner * n : inner * (n + 1)].contiguous()
            single[MOE["mixtral"].format(e=e) + name] = Factors(rows, part.clone(), 2)
    peft_of(tmp_path / "same", single)
    last = [*single][-1]
    other = single[last].up + 1
    peft_of(tmp_path / "other", single | {last: Factors(other, single[last].down, 2)})
    same = loratool.compare(tmp_path / "stacked", tmp_path / "same", arch="mixtral")
    assert same.totals["equal"]
    assert same.totals["common"] == same.totals["modules"] == 2 * experts
    report = loratool.compare(tmp_path / "stacked", tmp_path / "other", arch="mixtral")
    assert [row["module"] for row in report.rows if row["distance"]] == [last]
    deltas = {m: f.delta for m, f in single.items()}
    changed = deltas | {last: other.double() @ single[last].down.double()}
    norm = max(torch.cat([*both.values()]).norm() for both in (deltas, changed))
    distance = (changed[last] - deltas[last]).norm() / norm
    assert report.totals["distance"] == pytest.approx(float(distance), abs=1e-12)


# ------------------------------------------------------------------------------------------------------ what goes wrong

PACK, BAICHUAN = CASES["concat-equal"].fused, CASES["concat-equal"].config
QKV, PHI3 = CASES["concat-gqa"].fused, CASES["concat-gqa"].config
W1 = CASES["stack"].fused


class Wrong(NamedTuple):
    """A base and an adapter that do not go together, and what the message must say."""

    base: dict[str, int]  # tensor: rows
    config: dict[str, Any] | None
    arch: str
    adapter: dict[str, int]  # module: rows
    words: tuple[str, ...]


WRONG = {
    "no-whole-parts": Wrong(
        {f"{PACK}.weight": 20}, BAICHUAN, "baichuan", {f"{LAYER}.self_attn.q_proj": 6},
        (PACK, "concat of q|k|v", "20 does not divide by 3", "--arch"),
    ),
    "no-config": Wrong(
        {f"{QKV}.weight": 24}, None, "phi3", {f"{LAYER}.self_attn.q_proj": 12},
        (QKV, "the config has no num_attention_heads", "config.json beside the base"),
    ),
    "no-config-of-a-split-base": Wrong(
        {f"{n}.weight": 8 for n in qkv(f"{LAYER}.self_attn")}, None, "phi3", {QKV: 24},
        (QKV, "the config has no num_attention_heads", "config.json beside the base"),
    ),
    "another-config": Wrong(
        {f"{QKV}.weight": 30}, PHI3, "phi3", {f"{LAYER}.self_attn.k_proj": 6},
        (QKV, "12 + 6 + 6 rows are not 30 rows", "--arch"),
    ),
    "a-part-too-high": Wrong(
        {f"{PACK}.weight": 18}, BAICHUAN, "baichuan", {f"{LAYER}.self_attn.v_proj": 7},
        (f"{PACK}[v]", "the base's weight is [6, 7], the adapter updates [7, 7]", "right base"),
    ),
    "a-split-base-with-odd-parts": Wrong(
        {f"{n}.weight": rows for n, rows in zip(qkv(f"{LAYER}.self_attn"), (7, 5, 6), strict=True)}, BAICHUAN,
        "baichuan", {PACK: 18}, (f"{PACK}[q]", "q_proj.weight has 7 rows, and the layout gives it 6", "config.json"),
    ),
    "a-split-base-without-all-parts": Wrong(
        {f"{LAYER}.self_attn.q_proj.weight": 6, f"{LAYER}.self_attn.v_proj.weight": 6}, BAICHUAN, "baichuan",
        {PACK: 18}, (PACK, "the base has no such module"),
    ),
    "slabs-that-do-not-divide": Wrong(
        {W1: 14}, CASES["stack"].config, "dbrx", {f"{W1}[0]": 4}, (W1, "layout stack", "are not 14 rows", "--arch"),
    ),
    "an-expert-too-many": Wrong(
        {W1: 12}, CASES["stack"].config, "dbrx", {f"{W1}[3]": 4}, (f"{W1}[3]", "the base has no such module"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named_and_nothing_is_written(case, tmp_path, capsys):
    base_of(tmp_path / "base", {name: torch.ones(rows, IN) for name, rows in case.base.items()}, case.config)
    peft_of(tmp_path / "adapter", random_factors(case.adapter))
    before = snapshot(tmp_path)
    out = tmp_path / "out"
    code = run_main("merge", tmp_path / "base", tmp_path / "adapter", "-o", out, "--arch", case.arch)
    message = " ".join(capsys.readouterr().err.split())
    assert code == 3
    for words in case.words:
        assert words in message
    assert snapshot(tmp_path) == before


def test_parts_of_a_split_base_with_other_inputs_are_refused(tmp_path):
    case = CASES["concat-equal"]
    tensors = {f"{n}.weight": torch.ones(6, IN - ("k_proj" in n)) for n in case.names}
    base = base_of(tmp_path / "base", tensors, case.config)
    adapter = peft_of(tmp_path / "adapter", random_factors({case.fused: 18}))
    with pytest.raises(loratool.LoratoolError, match=r"the base's weight is \[18, 6\], the adapter updates \[18, 7\]"):
        loratool.merge(base, [adapter], tmp_path / "out")


def test_an_extract_whose_layout_needs_a_config_says_so(tmp_path, capsys):
    case = CASES["concat-gqa"]
    split_base(tmp_path / "tuned", case, matrix_of(case))
    split_base(tmp_path / "base", case, matrix_of(case, 1))
    (tmp_path / "tuned" / "config.json").unlink()
    before = snapshot(tmp_path)
    arguments = ("extract", tmp_path / "tuned", "--base", tmp_path / "base", "-o", tmp_path / "out", "--rank", 2)
    assert run_main(*arguments, "--arch", "phi3") == 3
    message = " ".join(capsys.readouterr().err.split())
    assert "the config has no num_attention_heads" in message
    assert "config.json" in message
    assert snapshot(tmp_path) == before


# -------------------------------------------------------------------------------------------------------------- memory


ROWS = 64  # of one expert: the least that a tile has
CONFIG = OSS | {"hidden_size": ROWS}


def big_stack(experts: int) -> torch.Tensor:
    return numbers(torch.Generator().manual_seed(experts), experts, ROWS, 10)


@pytest.fixture
def reads(monkeypatch):
    """(file, bytes) of every single tensor that is read, at whatever depth of a view; tiles are 64 rows high."""
    monkeypatch.setattr(panels, "TILE", 1)
    monkeypatch.setattr(panels, "PANEL", 1)
    found: list[tuple[str, int]] = []
    call = Loader.__call__

    def listening(self, ref, into=None):
        found.extend((Path(piece.path).parent.name, ref.nbytes) for piece in ref.pieces[:1] if isinstance(piece, Span))
        return call(self, ref, into)

    monkeypatch.setattr(Loader, "__call__", listening)
    return found


def scratch(plan: Plan) -> int:
    return max(unit.scratch for unit in plan.units)


def test_a_merge_never_holds_more_than_one_expert_of_a_stack(tmp_path, reads, plugins):
    module, needed = f"{LAYER}.mlp.experts.3.gate_proj", []
    factors = {module: Factors(torch.ones(5, 1), torch.ones(1, ROWS), 1)}
    adapter = peft_of(tmp_path / "adapter", factors)
    for experts in (6, 12):
        base = base_of(tmp_path / f"base{experts}", {STACK: big_stack(experts)}, CONFIG)
        family, opened = plugins.architecture("gpt-oss"), checkpoint.open_base(str(base))
        plan = operations.merge.plan(opened, family, [Weighted(open_adapter(adapter, arch=family))], out_name="")
        needed.append(scratch(plan))
        assert max(ref.nbytes for unit in plan.units for ref in unit.reads) == ROWS * 10 * 4
        loratool.merge(base, [adapter], tmp_path / f"out{experts}")
        sizes = [n for file, n in reads if file == base.name]
        assert max(sizes) == ROWS * 10 * 4
        assert sum(sizes) == experts * ROWS * 10 * 4  # and nothing is read twice
    assert needed[0] == needed[1]


@pytest.mark.parametrize("forms", ["stack-apart", "apart-stack", "stack-stack"])
def test_an_extract_never_holds_more_than_one_expert_of_a_stack(forms, tmp_path, reads, plugins):
    needed = []
    for experts in (6, 12):
        folders = []
        for name, form, step in zip(("tuned", "base"), forms.split("-"), (1, 0), strict=True):
            stack = big_stack(experts) + step
            tensors = {STACK: stack}
            if form == "apart":
                tensors = {f"{n}.weight": t for n, t in oss_parts(stack, experts).items()}
            folders.append(base_of(tmp_path / f"{name}{experts}", tensors, CONFIG))
        opened = [checkpoint.open_base(str(folder)) for folder in folders]
        family, rule = plugins.architecture("gpt-oss"), operations.resize.Rule(rank=1)
        plan = operations.extract.plan(*opened, family, rule, plugins.format("peft"), options={})
        needed.append(scratch(plan))
        assert max(ref.nbytes for unit in plan.units for ref in unit.reads) == ROWS * 10 * 4
        loratool.extract(*folders, tmp_path / f"out{experts}", rank=1, arch="gpt-oss")
        assert max(size for file, size in reads if file in {f.name for f in folders}) == ROWS * 10 * 4
    assert needed[0] == needed[1]
