"""StarCoder2: LLaMA's attention and GPT-2's names for the MLP, all linear (transformers: models/starcoder2)."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

STARCODER2 = Architecture(
    name="starcoder2",
    match=Match(model_types=("starcoder2",)),
    layers=(
        Embedding("model.embed_tokens", group="embedding", roles=("embed",)),
        Linear(
            "model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")
        ),
        Linear("model.layers.{i}.mlp.(c_fc|c_proj)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score)", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("model.",)},
    headless=("Starcoder2Model",),
    tied=(("model.embed_tokens", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """StarCoder2."""
    return [STARCODER2]
