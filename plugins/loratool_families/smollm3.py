"""SmolLM 3 with LLaMA's names and a tied head (transformers: models/smollm3)."""

from loratool import Architecture, Match, hookimpl

SMOLLM3 = Architecture(
    name="smollm3",
    like="llama",
    match=Match(model_types=("smollm3",)),
    headless=("SmolLM3Model",),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """SmolLM 3."""
    return [SMOLLM3]
