"""LLaMA 1-3, Mistral, Yi, and every checkpoint with their names (transformers: models/llama, models/mistral)."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

LLAMA = Architecture(
    name="llama",
    match=Match(model_types=("llama", "mistral", "yi")),
    layers=(
        Embedding("model.embed_tokens", group="embedding"),
        Linear(
            "model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")
        ),
        Linear("model.layers.{i}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear("lm_head", group="head"),
        Linear("score", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("model.",)},
    headless=("LlamaModel", "MistralModel"),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """LLaMA and the families that share its names."""
    return [LLAMA]
