"""RWKV 4 (transformers: models/rwkv). The time_* parameters, of shape (1, 1, hidden), carry no adapter."""

from loratool import Architecture, Embedding, Excluded, Linear, Match, hookimpl

_BLOCK = "rwkv.blocks.{i}"
RWKV = Architecture(
    name="rwkv",
    match=Match(model_types=("rwkv",)),
    layers=(
        Embedding("rwkv.embeddings", group="embedding", roles=("embed",)),
        Linear(
            f"{_BLOCK}.attention.(key|value|receptance|output)", group="attention", roles=("k", "v", "receptance", "o")
        ),
        Linear(f"{_BLOCK}.feed_forward.(key|value|receptance)", group="mlp", roles=("up", "down", "receptance")),
        Excluded(f"{_BLOCK}.attention.(time_mix_key|time_mix_value|time_mix_receptance)", group="recurrent"),
        Excluded(f"{_BLOCK}.feed_forward.(time_mix_key|time_mix_receptance)", group="recurrent"),
        Linear("head", group="head"),
    ),
    default_targets=("key", "value", "receptance", "output"),
    prefixes={"": ("rwkv.",)},
    headless=("RwkvModel",),
    tied=(("rwkv.embeddings", "head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """RWKV 4."""
    return [RWKV]
