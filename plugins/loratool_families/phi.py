"""Phi-1, Phi-1.5 and Phi-2 under transformers' own names (transformers: models/phi)."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

PHI = Architecture(
    name="phi",
    match=Match(model_types=("phi",)),
    layers=(
        Embedding("model.embed_tokens", group="embedding", roles=("embed",)),
        Linear(
            "model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|dense)", group="attention", roles=("q", "k", "v", "o")
        ),
        Linear("model.layers.{i}.mlp.(fc1|fc2)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score)", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("model.",)},
    headless=("PhiModel",),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Phi-1 to Phi-2."""
    return [PHI]
