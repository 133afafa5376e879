"""StableLM 2 and 3B, Stable Code: LLaMA's names (transformers: models/stablelm; remote code: stablelm_epoch)."""

from loratool import Architecture, Match, hookimpl

STABLELM = Architecture(
    name="stablelm",
    like="llama",
    match=Match(model_types=("stablelm", "stablelm_epoch")),
    headless=("StableLmModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """StableLM."""
    return [STABLELM]
