"""Phi-3.5-MoE (transformers: models/phimoe): Mixtral's names on disk; in memory the router is `mlp.router`."""

from loratool import Architecture, Match, hookimpl

PHIMOE = Architecture(
    name="phimoe",
    like="mixtral",
    match=Match(model_types=("phimoe",)),
    default_targets=("q_proj", "v_proj"),
    memory=("model.layers.{i}.mlp.router = model.layers.{i}.block_sparse_moe.gate",),
    headless=("PhimoeModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Phi-3.5-MoE."""
    return [PHIMOE]
