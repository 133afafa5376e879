"""GLM-4-9B and GLM-4-0414 in transformers' names (transformers: models/glm, glm4): gate and up are one weight."""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl

_MLP = "model.layers.{i}.mlp"
GLM = Architecture(
    name="glm",
    match=Match(model_types=("glm", "glm4")),
    layers=(
        Embedding("model.embed_tokens", group="embedding"),
        Linear(
            "model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")
        ),
        Linear(f"{_MLP}.(gate_up_proj|down_proj)", group="mlp", roles=("gate_up", "down")),
        Linear("(lm_head|score)", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    fused=(Fused(f"{_MLP}.gate_up_proj", parts=("gate", "up"), layout=concat(parts=2)),),
    aliases=(f"{_MLP}.(gate_proj|up_proj) = {_MLP}.gate_up_proj[(gate|up)]",),
    prefixes={"": ("model.",)},
    headless=("GlmModel", "Glm4Model"),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """GLM-4."""
    return [GLM]
