"""Llama 4, with vision and text only (transformers: models/llama4).

Experts are (experts, in, out), the gate's columns left of up's. The text model omits the leading `language_model.`.
"""

from loratool import Architecture, Embedding, Excluded, Experts, Fused, Linear, Match, concat, hookimpl

_TEXT = "language_model.model"
_LAYER = f"{_TEXT}.layers.{{i}}"
_EXPERTS = f"{_LAYER}.feed_forward.experts"
_VISION = "vision_model"
_GLU = "(gate_proj|up_proj|down_proj)"
LLAMA4 = Architecture(
    name="llama4",
    match=Match(model_types=("llama4", "llama4_text")),
    layers=(
        Embedding(f"{_TEXT}.embed_tokens", group="embedding"),
        Linear(f"{_LAYER}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")),
        Linear(f"{_LAYER}.feed_forward.{_GLU}", group="mlp", roles=("gate", "up", "down")),
        Linear(f"{_LAYER}.feed_forward.shared_expert.{_GLU}", group="mlp", roles=("gate", "up", "down")),
        Experts(
            f"{_EXPERTS}.(gate_up_proj|down_proj)",
            group="experts",
            roles=("gate_up", "down"),
            in_out=True,
            unmarked=True,
        ),
        Linear(f"{_LAYER}.feed_forward.router", group="router"),
        Linear("language_model.lm_head", group="head"),
        Linear(f"{_VISION}.patch_embedding.linear", group="embedding", roles=("patch",), tower="vision"),
        Excluded(f"{_VISION}.positional_embedding_vlm", group="embedding", tower="vision"),
        Linear(
            f"{_VISION}.model.layers.{{i}}.self_attn.(q_proj|k_proj|v_proj|o_proj)",
            group="attention",
            roles=("q", "k", "v", "o"),
            tower="vision",
        ),
        Linear(f"{_VISION}.model.layers.{{i}}.mlp.(fc1|fc2)", group="mlp", roles=("up", "down"), tower="vision"),
        Linear(f"{_VISION}.vision_adapter.mlp.(fc1|fc2)", group="projection", roles=("up", "down"), tower="vision"),
        Linear("multi_modal_projector.linear_1", group="projection", tower="projector"),
    ),
    default_targets=("q_proj", "v_proj"),
    fused=(Fused(f"{_EXPERTS}.gate_up_proj", parts=("gate", "up"), layout=concat(parts=2)),),
    aliases=(
        f"{_EXPERTS}.{{e}}.(gate_proj|up_proj) = {_EXPERTS}.gate_up_proj[{{e}}][(gate|up)]",
        f"{_EXPERTS}.{{e}}.down_proj = {_EXPERTS}.down_proj[{{e}}]",
    ),
    prefixes={"": ("language_model.",)},
    headless=("Llama4ForCausalLM",),
    tied=((f"{_TEXT}.embed_tokens", "language_model.lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Llama 4."""
    return [LLAMA4]
