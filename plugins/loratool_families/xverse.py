"""XVERSE, the dense models (remote code: modeling_xverse.py, configuration_xverse.py): LLaMA's names."""

from loratool import Architecture, Match, hookimpl

XVERSE = Architecture(
    name="xverse",
    like="llama",
    match=Match(model_types=("xverse",)),
    default_targets=("q_proj", "v_proj"),
    headless=("XverseModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """XVERSE."""
    return [XVERSE]
