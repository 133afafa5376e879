"""OLMo 1, 2 and 3 with LLaMA's names (transformers: models/olmo, olmo2, olmo3)."""

from loratool import Architecture, Match, hookimpl

OLMO = Architecture(
    name="olmo",
    like="llama",
    match=Match(model_types=("olmo", "olmo2", "olmo3")),
    headless=("OlmoModel", "Olmo2Model", "Olmo3Model"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """OLMo 1, 2 and 3."""
    return [OLMO]
