"""GPT-Neo: GPT-2's names for the MLP, but linear layers (transformers: models/gpt_neo)."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

GPT_NEO = Architecture(
    name="gpt-neo",
    match=Match(model_types=("gpt_neo",)),
    layers=(
        Embedding("transformer.(wte|wpe)", group="embedding", roles=("embed", "position")),
        Linear(
            "transformer.h.{i}.attn.attention.(q_proj|k_proj|v_proj|out_proj)",
            group="attention",
            roles=("q", "k", "v", "o"),
        ),
        Linear("transformer.h.{i}.mlp.(c_fc|c_proj)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score|classifier|qa_outputs)", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("transformer.",)},
    headless=("GPTNeoModel",),
    tied=(("transformer.wte", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """GPT-Neo."""
    return [GPT_NEO]
