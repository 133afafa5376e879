"""Qwen1.5-MoE and Qwen2-MoE (transformers: models/qwen2_moe): Qwen3-MoE's names, and a shared expert with its gate."""

from loratool import Architecture, Linear, Match, hookimpl

_MLP = "model.layers.{i}.mlp"
QWEN2_MOE = Architecture(
    name="qwen2-moe",
    like="qwen3-moe",
    match=Match(model_types=("qwen2_moe",)),
    layers=(
        Linear(f"{_MLP}.shared_expert.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear(f"{_MLP}.shared_expert_gate", group="router", roles=("router",)),
        Linear("qa_outputs", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    headless=("Qwen2MoeModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen2-MoE."""
    return [QWEN2_MOE]
