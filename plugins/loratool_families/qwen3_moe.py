"""Qwen3-MoE (transformers: models/qwen3_moe): one set of matrices an expert on disk, 3-D stacks in memory.

Layers that are not sparse (mlp_only_layers, decoder_sparse_step) have LLaMA's mlp.
"""

from loratool import Architecture, Linear, Match, hookimpl

_EXPERTS = "model.layers.{i}.mlp.experts"
QWEN3_MOE = Architecture(
    name="qwen3-moe",
    like="llama",
    match=Match(model_types=("qwen3_moe",)),
    layers=(
        Linear(f"{_EXPERTS}.{{e}}.(gate_proj|up_proj|down_proj)", group="experts", roles=("gate", "up", "down")),
        Linear("model.layers.{i}.mlp.gate", group="router", roles=("router",)),
    ),
    default_targets=("q_proj", "v_proj"),
    memory=(
        f"{_EXPERTS}.gate_up_proj = {_EXPERTS}.{{e}}.(gate_proj|up_proj)",
        f"{_EXPERTS}.down_proj = {_EXPERTS}.{{e}}.down_proj",
    ),
    headless=("Qwen3MoeModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen3-MoE."""
    return [QWEN3_MOE]
