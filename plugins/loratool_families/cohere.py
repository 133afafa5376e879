"""Command R and its successors: LLaMA's names, a tied head (transformers: models/cohere, cohere2)."""

from loratool import Architecture, Match, hookimpl

COHERE = Architecture(
    name="cohere",
    like="llama",
    match=Match(model_types=("cohere", "cohere2")),
    headless=("CohereModel", "Cohere2Model"),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Cohere 1 and 2."""
    return [COHERE]
