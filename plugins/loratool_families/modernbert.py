"""ModernBERT (transformers: models/modernbert): Wqkv is [q; k; v], and Wi is [act; gate] of Wo(gelu(act) * gate)."""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl

_LAYER = "model.layers.{i}"
MODERNBERT = Architecture(
    name="modernbert",
    match=Match(model_types=("modernbert",)),
    layers=(
        Embedding("model.embeddings.tok_embeddings", group="embedding", roles=("embed",)),
        Linear(f"{_LAYER}.attn.(Wqkv|Wo)", group="attention", roles=("qkv", "o")),
        Linear(f"{_LAYER}.mlp.(Wi|Wo)", group="mlp", roles=("gate_up", "down")),
        Linear("head.dense", group="head", roles=("transform",)),
        Linear("(decoder|classifier)", group="head"),
    ),
    default_targets=("Wqkv",),
    fused=(
        Fused(f"{_LAYER}.attn.Wqkv", parts=("q", "k", "v"), layout=concat(parts=3)),
        Fused(f"{_LAYER}.mlp.Wi", parts=("act", "gate"), layout=concat(parts=2)),
    ),
    prefixes={"": ("model.",)},
    headless=("ModernBertModel",),
    tied=(("model.embeddings.tok_embeddings", "decoder"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """ModernBERT with any head, or none."""
    return [MODERNBERT]
