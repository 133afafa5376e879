"""Qwen3-VL-MoE (transformers: models/qwen3_vl_moe): Qwen3-VL's names, and stacks of experts.

The released files hold (experts, in, out), gate left of up; transformers 5 holds
(experts, out, in), and saves models in that order.
"""

from loratool import Architecture, Experts, Fused, Linear, Match, concat, hookimpl

_MLP = "model.language_model.layers.{i}.mlp"
_EXPERTS = f"{_MLP}.experts"
QWEN3_VL_MOE = Architecture(
    name="qwen3-vl-moe",
    like="qwen3-vl",
    match=Match(model_types=("qwen3_vl_moe",)),
    layers=(
        Experts(
            f"{_EXPERTS}.gate_up_proj",
            group="experts",
            roles=("gate_up",),
            in_out=True,
            flipped_in_memory=True,
            inputs="hidden_size",
        ),
        Experts(
            f"{_EXPERTS}.down_proj",
            group="experts",
            roles=("down",),
            in_out=True,
            flipped_in_memory=True,
            inputs="moe_intermediate_size",
        ),
        Linear(f"{_MLP}.gate", group="router", roles=("router",)),
    ),
    default_targets=("q_proj", "v_proj"),
    fused=(Fused(f"{_EXPERTS}.gate_up_proj", parts=("gate", "up"), layout=concat(parts=2)),),
    aliases=(
        f"{_EXPERTS}.{{e}}.(gate_proj|up_proj) = {_EXPERTS}.gate_up_proj[{{e}}][(gate|up)]",
        f"{_EXPERTS}.{{e}}.down_proj = {_EXPERTS}.down_proj[{{e}}]",
    ),
    headless=("Qwen3VLMoeModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen3-VL-MoE."""
    return [QWEN3_VL_MOE]
