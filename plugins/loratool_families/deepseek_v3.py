"""DeepSeek-V3, R1 and V3.2 (transformers: models/deepseek_v3, models/deepseek_v32): DeepSeek-V2's names.

V3.2 adds the indexer of its sparse attention.
"""

from loratool import Architecture, Linear, Match, hookimpl

DEEPSEEK_V3 = Architecture(
    name="deepseek-v3",
    like="deepseek-v2",
    match=Match(model_types=("deepseek_v3", "deepseek_v32")),
    layers=(
        Linear(
            "model.layers.{i}.self_attn.indexer.(wq_b|wk|weights_proj)",
            group="attention",
            roles=("index_q", "index_k", "index_weights"),
        ),
    ),
    headless=("DeepseekV3Model", "DeepseekV32Model"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """DeepSeek-V3."""
    return [DEEPSEEK_V3]
