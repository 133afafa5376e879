"""Yi as first published, model_type Yi (remote code: modeling_yi.py): LLaMA's matrices, other names of norms.

Later releases of the same checkpoints say `llama`.
"""

from loratool import Architecture, Match, hookimpl

YI = Architecture(
    name="yi",
    like="llama",
    match=Match(model_types=("Yi", "yi")),
    default_targets=("q_proj", "v_proj"),
    headless=("YiModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Yi with its first config."""
    return [YI]
