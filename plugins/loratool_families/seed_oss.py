"""Seed-OSS with LLaMA's names (transformers: models/seed_oss)."""

from loratool import Architecture, Match, hookimpl

SEED_OSS = Architecture(
    name="seed-oss",
    like="llama",
    match=Match(model_types=("seed_oss",)),
    headless=("SeedOssModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Seed-OSS."""
    return [SEED_OSS]
