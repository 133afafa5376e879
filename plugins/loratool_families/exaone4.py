"""EXAONE 4 with LLaMA's names (transformers: models/exaone4)."""

from loratool import Architecture, Match, hookimpl

EXAONE4 = Architecture(
    name="exaone4",
    like="llama",
    match=Match(model_types=("exaone4",)),
    headless=("Exaone4Model",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """EXAONE 4."""
    return [EXAONE4]
