"""Gemma 1, 2 and 3 without a vision tower: LLaMA's names, a tied head (transformers: models/gemma, gemma2, gemma3)."""

from loratool import Architecture, Match, hookimpl

GEMMA = Architecture(
    name="gemma",
    like="llama",
    match=Match(model_types=("gemma", "gemma2", "gemma3_text", "vaultgemma")),
    headless=("GemmaModel", "Gemma2Model", "Gemma3TextModel", "VaultGemmaModel"),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Gemma 1, 2 and 3 (text)."""
    return [GEMMA]
