"""Every built-in family against live models: what they have in memory, and what they save."""

import pytest
from zoo import Tiny, every, record

from loratool import testing
from loratool.detection import family_of, matrices
from loratool.layers import Excluded, Experts
from loratool.operations.matching import places
from loratool.operations.survey import Survey
from loratool.patterns import flatten, selects
from loratool.plugins import load
from loratool.storage import checkpoint
from loratool.tensors import TensorRef, TensorSource, module_of

ZOO = every()
CLASSES = {
    "linear": ("Linear", "Router", "Gate", "NormHead"),  # routers are linear maps of a class of their own
    "Conv1D": ("Conv1D",),
    "conv1d": ("Conv1d",),
    "conv2d": ("Conv2d",),
    "conv3d": ("Conv3d",),
    "embedding": ("Embedding",),
}
#: the project's own table of what to train by default
TABLE = {
    "baichuan": ["W_pack"], "baichuan2": ["W_pack"], "bloom": ["query_key_value"], "chatglm": ["query_key_value"],
    "chatglm2": ["query_key_value"], "falcon": ["query_key_value"], "internlm": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"], "mistral": ["q_proj", "v_proj"], "mixtral": ["q_proj", "v_proj"],
    "xverse": ["q_proj", "v_proj"], "yi": ["q_proj", "v_proj"], "phi": ["q_proj", "v_proj"], "phi-old": ["Wqkv"],
    "qwen": ["c_attn"], "gpt2": ["c_attn"], "bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"],
}  # fmt: skip


_GLU = ("gate_proj", "up_proj", "down_proj")
_DEEPSEEK = ["eh_proj", "embed_tokens", "shared_head.head"]
_QWEN = ["fc", *(f"layers.0.self_attn.{n}_proj" for n in "qkvo")]
_DENSE = [f"layers.0.mlp.{n}" for n in _GLU]
_SPARSE = [
    "layers.0.mlp.gate",
    "layers.0.mlp.shared_expert_gate",
    *(f"layers.0.mlp.{owner}.{n}" for owner in ("shared_expert", "experts.0", "experts.3") for n in _GLU),
]
_STACKED = ["layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"]
#: weights of released files that transformers does not load: a layer behind the last that predicts a second token
PREDICTION = {
    **{family: [f"model.layers.2.{n}" for n in _DEEPSEEK] for family in ("glm4-moe", "deepseek-v3", "glm4-moe-lite")},
    "qwen3-next": [f"mtp.{n}" for n in (*_QWEN, *_SPARSE)],
    "qwen3-5": [f"mtp.{n}" for n in (*_QWEN, *_DENSE)],
    "qwen3-5-text": [f"mtp.{n}" for n in (*_QWEN, *_DENSE)],
    "qwen3-5-moe": [f"mtp.{n}" for n in (*_QWEN, *_SPARSE, *_STACKED)],
    "qwen3-5-moe-text": [f"mtp.{n}" for n in (*_QWEN, *_DENSE, *_SPARSE, *_STACKED)],
}


@pytest.fixture(scope="module")
def plugins():
    return load()


def modules(shapes):
    """Module paths of parameters of two or more dimensions."""
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) > 1}


def meanings(architecture, shapes, component=""):
    """The canonical paths that these weights stand for; each of a stack."""
    paths = []
    for path, shape in modules(shapes).items():
        known = architecture.find(path, component)
        assert known is not None, f"{architecture.name} does not know {path} {shape}"
        indices = [known.at(n) for n in range(shape[0])] if known.axis else [known]
        paths += [part for k in indices for part in k.parts]
    return paths


@pytest.mark.parametrize("one", ZOO, ids=str)
def test_every_matrix_in_memory_and_on_disk_is_a_layer_or_excluded_by_name(one: Tiny, plugins):
    architecture = plugins.architecture(one.family)
    on_disk = meanings(architecture, record(one).disk, one.component)
    in_memory = meanings(architecture, record(one).memory, one.component)
    assert len(set(on_disk)) == len(on_disk), "two tensors of the file are one layer"
    on_disk, in_memory = (  # a weight may be fused in the file and split in memory
        [part for p in paths for part in architecture.parts_of(p, one.component) or (p,)]
        for paths in (on_disk, in_memory)
    )
    tied = {p for group in architecture.tied for p in group}
    ignored = {p for p in {*on_disk, *in_memory} if (k := architecture.find(p)) and isinstance(k.layer, Excluded)}
    assert set(on_disk) - ignored <= set(in_memory)
    assert set(in_memory) - set(on_disk) - ignored <= tied  # of tied weights one is saved


@pytest.mark.parametrize("one", ZOO, ids=str)
def test_layers_are_of_the_kind_that_the_model_has(one: Tiny, plugins):
    architecture = plugins.architecture(one.family)
    live = record(one)
    for name, shape in live.memory.items():
        known = architecture.find(name.removesuffix(".weight"), one.component)
        if len(shape) < 2 or known is None or isinstance(known.layer, Excluded):
            continue
        if isinstance(known.layer, Experts) or known.axis:
            assert len(shape) == 3 or known.layer.kind == "linear", name
            continue
        if name.rpartition(".")[2] != "weight":  # a bare parameter that works as a linear layer (DBRX's stacks)
            assert known.layer.kind == "linear", name
            assert len(shape) == 2, name
            continue
        found = live.classes.get(name.rpartition(".")[0], "")
        assert any(word in found for word in CLASSES[known.layer.kind]), (name, known.layer.kind, found)


@pytest.mark.parametrize("family", sorted({one.family for one in ZOO}))
def test_every_pattern_of_a_family_occurs_in_some_model(family: str, plugins):
    architecture = plugins.architecture(family)
    seen = set(PREDICTION.get(family, ()))
    for one in (z for z in ZOO if z.family == family):
        seen |= {p.partition("[")[0] for p in meanings(architecture, record(one).disk, one.component)}
        seen |= {p.partition("[")[0] for p in meanings(architecture, record(one).memory, one.component)}
        vectors = [n for n, shape in {**record(one).disk, **record(one).memory}.items() if len(shape) == 1]
        norms = (architecture.find(module_of(n), one.component) for n in vectors)
        seen |= {k.path for k in norms if k and k.layer.group == "norm"}
    inherited = {s for s, _ in plugins.architecture(architecture.like).skeletons()} if architecture.like else set()
    mine = [s for s, _ in architecture.skeletons() if s not in inherited]
    assert [s.text for s in mine if not any(s.match(p) is not None for p in seen)] == []


@pytest.mark.parametrize("one", ZOO, ids=str)
def test_names_in_memory_are_found_and_written_back(one: Tiny, plugins):
    architecture = plugins.architecture(one.family)
    for path in modules(record(one).memory):
        known = architecture.find(path, one.component)
        if len(known.parts) == 1 and not known.axis and not isinstance(known.layer, Excluded):
            assert architecture.in_memory(known.component, known.parts[0], one.cls) == path


@pytest.mark.parametrize("one", ZOO, ids=str)
def test_the_family_is_found_by_config_and_fits_by_names(one: Tiny, plugins):
    base = checkpoint.open_base(str(record(one).folder))
    assert family_of(base, plugins).architecture.name == one.alone
    assert plugins.architecture(one.family).explains(matrices(base.tensors))


@pytest.mark.parametrize("one", ZOO, ids=str)
def test_flat_names_come_back_to_one_layer_each(one: Tiny, plugins):
    architecture = plugins.architecture(one.family)
    start = architecture.kohya_prefix(one.component)
    for path in meanings(architecture, record(one).disk, one.component):
        if "[" not in path and not isinstance(architecture.find(path).layer, Excluded):
            found = architecture.unflatten(f"{start}_{flatten(path)}")
            assert [(k.component, k.path) for k in found] == [(one.component, path)]


@pytest.mark.parametrize("one", ZOO, ids=str)
def test_fused_layouts_divide_the_rows_among_the_parts(one: Tiny, plugins):
    architecture = plugins.architecture(one.family)
    live = record(one)
    base = checkpoint.open_base(str(live.folder))
    for target, place in places(base, architecture).items():
        component, (path,), out = target.component, target.parts, place.out
        parts = architecture.layout(path, component, out, live.config) if "[" not in path or "[0]" in path else {}
        if parts:
            rows = sorted(row for ranges in parts.values() for r in ranges for row in r)
            assert rows == list(range(out)), (path, parts)
            for part in parts:
                assert architecture.find(part).path == part


@pytest.mark.parametrize("one", ZOO, ids=str)
def test_default_targets_select_layers(one: Tiny, plugins):
    architecture = plugins.architecture(one.family)
    paths = {p.partition("[")[0] for p in meanings(architecture, record(one).disk, one.component)}
    if one.component in ("", architecture.components[0]):
        assert architecture.default_targets
        assert any(selects(t, p) for t in architecture.default_targets for p in paths)


@pytest.mark.parametrize("family", sorted(TABLE))
def test_default_targets_are_those_of_the_projects_table(family: str, plugins):
    assert sorted(plugins.architecture(family).default_targets) == sorted(TABLE[family])


@pytest.mark.parametrize("family", PREDICTION)
def test_weights_of_released_files_that_no_model_loads_are_excluded_by_name(family: str, plugins):
    """The layer behind the last has all that the others have, and these."""
    architecture = plugins.architecture(family)
    one = next(z for z in ZOO if z.family == family and z.cls.endswith(("ForCausalLM", "ForConditionalGeneration")))
    shapes = {f"{path}.weight": (8, 8) for path in PREDICTION[family]} | record(one).disk
    for name, shape in record(one).disk.items():
        if name.startswith("model.layers.1.") and "model.layers.2.eh_proj" in PREDICTION[family]:
            shapes[name.replace("model.layers.1.", "model.layers.2.")] = shape
    config = record(one).config | {"num_nextn_predict_layers": 1}
    assert testing.problems(architecture, shapes, config) == []
    tensors = {name: TensorRef(name, shape, "F32") for name, shape in shapes.items()}
    found = family_of(TensorSource("base", tensors, {}, None), plugins)
    assert found is not None
    assert {m.name for m in Survey(architecture, shapes, config).modules} == {
        m.name for m in Survey(architecture, record(one).disk, config).modules
    }
