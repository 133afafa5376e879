"""Mixtral (transformers: models/mixtral): LLaMA's attention, and a file with one set of matrices an expert.

transformers 5 stacks the experts in memory: gate_up_proj (experts, 2 x inter, hidden) holds w1 above w3. Files that it
saves with save_original_format=False have that form too.
"""

from loratool import Architecture, Linear, Match, hookimpl

_MOE = "model.layers.{i}.block_sparse_moe"
MIXTRAL = Architecture(
    name="mixtral",
    like="llama",
    match=Match(model_types=("mixtral",)),
    layers=(
        Linear(f"{_MOE}.experts.{{e}}.(w1|w3|w2)", group="experts", roles=("gate", "up", "down")),
        Linear(f"{_MOE}.gate", group="router", roles=("router",)),
        Linear("qa_outputs", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    memory=(
        f"model.layers.{{i}}.mlp.gate = {_MOE}.gate",
        f"model.layers.{{i}}.mlp.experts.gate_up_proj = {_MOE}.experts.{{e}}.(w1|w3)",
        f"model.layers.{{i}}.mlp.experts.down_proj = {_MOE}.experts.{{e}}.w2",
    ),
    headless=("MixtralModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Mixtral."""
    return [MIXTRAL]
