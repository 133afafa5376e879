"""Granite, dense, with LLaMA's names (transformers: models/granite)."""

from loratool import Architecture, Match, hookimpl

GRANITE = Architecture(
    name="granite",
    like="llama",
    match=Match(model_types=("granite",)),
    headless=("GraniteModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Granite."""
    return [GRANITE]
