"""Mistral and the dense Ministral, with LLaMA's names (transformers: models/mistral, ministral, ministral3)."""

from loratool import Architecture, Linear, Match, hookimpl

MISTRAL = Architecture(
    name="mistral",
    like="llama",
    match=Match(model_types=("mistral", "ministral", "ministral3")),
    layers=(Linear("qa_outputs", group="head"),),
    headless=("MistralModel", "MinistralModel", "Ministral3Model"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Mistral."""
    return [MISTRAL]
