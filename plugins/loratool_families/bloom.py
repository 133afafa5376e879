"""BLOOM and BLOOMZ: q, k and v of one head lie together in one weight (transformers: models/bloom).

Files on the Hub omit the leading `transformer.`; files that save_pretrained writes have it.
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, hookimpl, interleave_heads

_HEADS = "n_head|num_attention_heads"
_DIM = f"(hidden_size|n_embed)/({_HEADS})"
BLOOM = Architecture(
    name="bloom",
    match=Match(model_types=("bloom",)),
    layers=(
        Embedding("transformer.word_embeddings", group="embedding", roles=("embed",)),
        Linear("transformer.h.{i}.self_attention.(query_key_value|dense)", group="attention", roles=("qkv", "o")),
        Linear("transformer.h.{i}.mlp.(dense_h_to_4h|dense_4h_to_h)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score|classifier|qa_outputs)", group="head"),
    ),
    default_targets=("query_key_value",),
    fused=(
        Fused(
            "transformer.h.{i}.self_attention.query_key_value",
            parts=("q", "k", "v"),
            layout=interleave_heads(_HEADS, _DIM, _DIM, _DIM),
        ),
    ),
    prefixes={"": ("transformer.",)},
    headless=("BloomModel",),
    tied=(("transformer.word_embeddings", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """BLOOM."""
    return [BLOOM]
