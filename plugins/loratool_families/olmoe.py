"""OLMoE and FlexOlmo (transformers: models/olmoe, models/flex_olmo): Qwen3-MoE's names, all layers sparse."""

from loratool import Architecture, Match, hookimpl

OLMOE = Architecture(
    name="olmoe",
    like="qwen3-moe",
    match=Match(model_types=("olmoe", "flex_olmo")),
    default_targets=("q_proj", "v_proj"),
    headless=("OlmoeModel", "FlexOlmoModel"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """OLMoE and FlexOlmo."""
    return [OLMOE]
