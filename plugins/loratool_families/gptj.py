"""GPT-J (transformers: models/gptj)."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

GPTJ = Architecture(
    name="gptj",
    match=Match(model_types=("gptj",)),
    layers=(
        Embedding("transformer.wte", group="embedding", roles=("embed",)),
        Linear("transformer.h.{i}.attn.(q_proj|k_proj|v_proj|out_proj)", group="attention", roles=("q", "k", "v", "o")),
        Linear("transformer.h.{i}.mlp.(fc_in|fc_out)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score|qa_outputs)", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("transformer.",)},
    headless=("GPTJModel",),
    tied=(("transformer.wte", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """GPT-J."""
    return [GPTJ]
