"""LLaMA 1-3, and every checkpoint with their names (transformers: models/llama)."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

LLAMA = Architecture(
    name="llama",
    match=Match(model_types=("llama", "cwm", "helium", "hyperclovax")),
    layers=(
        Embedding("model.embed_tokens", group="embedding"),
        Linear(
            "model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")
        ),
        Linear("model.layers.{i}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear("(lm_head|score)", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    aliases=("transformer.** = model.**",),  # as LlamaForQuestionAnswering calls the model
    prefixes={"": ("model.",)},
    headless=("LlamaModel", "CwmModel", "HeliumModel", "HyperCLOVAXModel"),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """LLaMA and the families that share its names."""
    return [LLAMA]
