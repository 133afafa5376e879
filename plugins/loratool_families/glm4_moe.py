"""GLM-4.5 (transformers: models/glm4_moe) and the relatives with latent attention (glm4_moe_lite, glm_moe_dsa).

Qwen3-MoE's experts, shared experts, and LLaMA's mlp in the first layers (first_k_dense_replace). Released files have
one layer more than the model: it predicts a second token, and has weights that no other layer has.
"""

from loratool import Architecture, Excluded, Linear, Match, hookimpl

GLM4_MOE = Architecture(
    name="glm4-moe",
    like="qwen3-moe",
    match=Match(model_types=("glm4_moe",)),
    layers=(
        Linear(
            "model.layers.{i}.mlp.shared_experts.(gate_proj|up_proj|down_proj)",
            group="mlp",
            roles=("gate", "up", "down"),
        ),
        Excluded("model.layers.{i}.(eh_proj|embed_tokens|shared_head.head)", group="prediction"),
    ),
    default_targets=("q_proj", "v_proj"),
    headless=("Glm4MoeModel",),
)
GLM4_MOE_LITE = Architecture(
    name="glm4-moe-lite",
    like="deepseek-v3",
    match=Match(model_types=("glm4_moe_lite", "glm_moe_dsa")),
    headless=("Glm4MoeLiteModel", "GlmMoeDsaModel"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """GLM's mixtures of experts."""
    return [GLM4_MOE, GLM4_MOE_LITE]
