"""Persimmon: q, k and v of one head lie together in one weight (transformers: models/persimmon)."""

from loratool import Architecture, Embedding, Fused, Linear, Match, hookimpl, interleave_heads

_LAYER = "model.layers.{i}"
_DIM = "hidden_size/num_attention_heads"
PERSIMMON = Architecture(
    name="persimmon",
    match=Match(model_types=("persimmon",)),
    layers=(
        Embedding("model.embed_tokens", group="embedding", roles=("embed",)),
        Linear(f"{_LAYER}.self_attn.(query_key_value|dense)", group="attention", roles=("qkv", "o")),
        Linear(f"{_LAYER}.mlp.(dense_h_to_4h|dense_4h_to_h)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score)", group="head"),
    ),
    default_targets=("query_key_value",),
    fused=(
        Fused(
            f"{_LAYER}.self_attn.query_key_value",
            parts=("q", "k", "v"),
            layout=interleave_heads("num_attention_heads", _DIM, _DIM, _DIM),
        ),
    ),
    prefixes={"": ("model.",)},
    headless=("PersimmonModel",),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Persimmon."""
    return [PERSIMMON]
