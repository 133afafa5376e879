"""What the names and shapes of weights say of them: roles, groups, towers, and a guess at what people train."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratool.layers import Conv1D, Conv1d, Conv2d, Conv3d, Embedding, Excluded, Experts, Layer, Linear, Matrix
from loratool.layouts import Layout
from loratool.patterns import join, split
from loratool.tensors import module_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A weight under its canonical path, and what its layer will say."""

    path: str
    kind: type[Layer]
    group: str = "other"
    role: str = ""
    tower: str = ""
    in_out: bool = False
    flipped: bool = False
    parts: tuple[str, ...] = ()
    layout: Layout | None = None


ROLES = {
    word: role
    for role, words in {
        "q": "q q_proj q_lin q_attn to_q wq query query_proj query_layer",
        "k": "k k_proj k_lin to_k wk key key_proj key_layer",
        "v": "v v_proj v_lin to_v wv value value_proj value_layer",
        "o": "o o_proj out_lin to_out",
        "qkv": "qkv qkv_proj to_qkv c_attn query_key_value wqkv w_pack in_proj_weight att_proj",
        "kv": "kv kv_proj to_kv key_value",
        "gate": "gate_proj wi_0 linear_gate",
        "up": "up_proj fc1 lin1 c_fc fc_in wi wi_1 dense_h_to_4h linear1 ffn",
        "down": "down_proj fc2 lin2 fc_out dense_4h_to_h linear2 ffn_output output_linear",
        "gate_up": "gate_up_proj gate_and_up_proj w13 input_linear",
    }.items()
    for word in words.split()
}
# what these mean depends on the block that they are in
_IN_ATTENTION = {"dense": "o", "out_proj": "o", "c_proj": "o", "wo": "o", "out": "o", "proj": "o"}
_IN_MLP = {"dense": "down", "c_proj": "down", "wo": "down", "w1": "gate", "w2": "down", "w3": "up", "gate": "gate"}
_FUSED = ("qkv", "kv", "gate_up")
HEADS = ("lm_head", "score", "classifier", "qa_outputs", "embed_out", "output_layer", "unembed", "decoder")
_EMBEDS = re.compile(r"(?:.*_)?(?:wte|wpe|embed|embeddings?|tokens?_embed\w*)|embed_(?:tokens|positions)\w*|shared")
_MATRICES: dict[int, type[Layer]] = {2: Matrix, 3: Conv1d, 4: Conv2d, 5: Conv3d}


def named(path: str) -> list[str]:
    """Return the elements of a path that are no indices."""
    return [e for e in split(path) if not e.isdigit()] or [path]


def role_of(leaf: str) -> str:
    """Return the role that a name stands for wherever it occurs, or nothing."""
    return ROLES.get(leaf.lower(), "")


def by_name(path: str, kind: type[Layer]) -> tuple[str, str]:
    """Return the group and the role of a weight by its path; an unknown name is its own role."""
    names = named(path)
    leaf, blocks = names[-1], names[:-1]
    attention = any(re.search("attn|attention", e, re.I) for e in blocks)
    role = _role(leaf, blocks, attention)
    if kind is Experts or any(re.fullmatch("experts?", e) for e in names):
        return "experts", role
    if kind is Embedding:
        return "embedding", "position" if "pos" in leaf or leaf == "wpe" else "embed"
    if kind in (Conv1d, Conv2d, Conv3d):
        return "conv", role
    if any(re.search("mamba|mixer|ssm|linear_attn|recurrent", e) for e in blocks):
        return "recurrent", role
    if attention or role in ("q", "k", "v", "qkv", "kv"):
        return "attention", role
    if _in_mlp(blocks) or role in ("gate", "up", "down", "gate_up"):
        return "mlp", role
    return ("projection" if re.search("projector|connector", path) else "other"), role


def _role(leaf: str, blocks: Sequence[str], attention: bool) -> str:
    if leaf == "dense" and not attention and blocks[-1:] in (["intermediate"], ["output"]):  # BERT and its kin
        return "up" if blocks[-1] == "intermediate" else "down"
    here = _IN_ATTENTION if attention else _IN_MLP if _in_mlp(blocks) else {}
    return here.get(leaf) or role_of(leaf) or leaf


def _in_mlp(blocks: Sequence[str]) -> bool:
    return any(re.search("mlp|ffn|feed_?forward|expert|moe|^ff$", e, re.I) for e in blocks)


def tower_of(path: str, seq2seq: bool = False) -> str:
    """Return the part of a multimodal or encoder-decoder model that a path lies in; nothing for the main one."""
    for element in split(path)[:-1]:
        if re.match("vision|visual|image_encoder", element):
            return "vision"
        if re.match("audio|speech", element):
            return "audio"
        if re.search("projector|connector|merger", element):
            return "projector"
        if seq2seq and element == "encoder":
            return "encoder"
    return ""


def from_header(name: str, shape: Shape, vocabulary: int) -> Weight:
    """Say what a tensor is by its name and shape alone."""
    path = module_of(name)
    leaf = named(path)[-1]
    kind = _MATRICES.get(len(shape), Excluded)
    if len(shape) == 3 and re.search("expert|moe", path, re.I) and "bias" not in leaf:
        kind = Experts
    elif path == name or "norm" in leaf or "rotary" in leaf:
        kind = Excluded
    elif kind is Matrix and ("router" in leaf or (leaf == "gate" and 4 * shape[0] <= shape[1])):
        return Weight(path, kind, "router", "router", tower_of(path))
    elif kind is Matrix and leaf in HEADS:
        return Weight(path, kind, "head", leaf, tower_of(path))
    elif kind is Matrix and (_EMBEDS.fullmatch(leaf) or (shape[0] == vocabulary and not role_of(leaf))):
        kind = Embedding
    group, role = by_name(path, kind)
    return Weight(path, kind, group, role, tower_of(path))


def vocabulary_of(shapes: Mapping[str, Shape]) -> int:
    """Return the number of tokens: the rows of the largest embedding by name, or of a very tall weight."""
    flat = {module_of(n): s for n, s in shapes.items() if len(s) == 2 and n.endswith(".weight")}
    embeddings = [s[0] for path, s in flat.items() if _EMBEDS.fullmatch(named(path)[-1])]
    tall = [s[0] for s in flat.values() if s[0] >= 8000 and s[0] >= 8 * s[1]]
    return max(embeddings or tall, default=0)


def is_fused(layer: Layer) -> bool:
    """Whether the role of a layer says that it holds several projections."""
    return not isinstance(layer, Excluded) and bool(layer.roles) and layer.roles[0] in _FUSED


def guess_targets(weights: Iterable[Weight]) -> tuple[str, ...]:
    """Guess what people train by default: q and v, else the fused qkv, else every linear layer of the main model."""
    usable = [w for w in weights if w.kind in (Linear, Conv1D, Matrix) and w.group not in ("head", "router", "experts")]
    main = [w for w in usable if w.tower in ("", "encoder")] or usable
    for roles in (("q", "v"), ("qkv",)):
        if set(roles) <= {w.role for w in main}:
            return tuple(sorted({_leaf(w.path) for w in main if w.role in roles}))
    return tuple(sorted({_leaf(w.path) for w in main}))


def _leaf(path: str) -> str:
    """The last element of a path that says something, and the index after it."""
    elements = split(path)
    last = max((n for n, e in enumerate(elements) if not e.isdigit()), default=0)
    return join(elements[last:])
