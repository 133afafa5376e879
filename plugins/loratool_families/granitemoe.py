"""Granite's mixtures of experts: plain, with a shared mlp, hybrid with Mamba-2 (transformers: models/granitemoe*).

The files hold 3-D stacks, as modules `input_linear` ([gate; up]) and `output_linear`; transformers 5 renames them in
memory. The hybrid without experts has the shared mlp only.
"""

from loratool import Architecture, Conv1d, Experts, Fused, Linear, Match, concat, hookimpl

_LAYER = "model.layers.{i}"
_MOE = f"{_LAYER}.block_sparse_moe"
_INNER = "mamba_expand*hidden_size"
GRANITEMOE = Architecture(
    name="granitemoe",
    like="llama",
    match=Match(model_types=("granitemoe", "granitemoeshared", "granitemoehybrid")),
    layers=(
        Experts(f"{_MOE}.(input_linear|output_linear)", group="experts", roles=("gate_up", "down")),
        Linear(f"{_MOE}.router.layer", group="router", roles=("router",)),
        Linear(f"{_LAYER}.shared_mlp.(input_linear|output_linear)", group="mlp", roles=("gate_up", "down")),
        Linear(f"{_LAYER}.mamba.(in_proj|out_proj)", group="recurrent", roles=("in", "out")),
        Conv1d(f"{_LAYER}.mamba.conv1d", group="recurrent", roles=("conv",)),
    ),
    default_targets=("q_proj", "v_proj"),
    fused=(
        Fused(f"{_MOE}.input_linear", parts=("gate", "up"), layout=concat(parts=2)),
        Fused(f"{_LAYER}.shared_mlp.input_linear", parts=("gate", "up"), layout=concat(parts=2)),
        Fused(
            f"{_LAYER}.mamba.in_proj",
            parts=("z", "x", "b", "c", "dt"),
            layout=concat(
                _INNER, _INNER, "mamba_n_groups*mamba_d_state", "mamba_n_groups*mamba_d_state", "mamba_n_heads"
            ),
        ),
    ),
    memory=(
        f"{_MOE}.experts.(gate_up_proj|down_proj) = {_MOE}.(input_linear|output_linear)",
        f"{_MOE}.router = {_MOE}.router.layer",
    ),
    aliases=(
        f"{_MOE}.experts.{{e}}.(gate_proj|up_proj) = {_MOE}.input_linear[{{e}}][(gate|up)]",
        f"{_MOE}.experts.{{e}}.down_proj = {_MOE}.output_linear[{{e}}]",
    ),
    headless=("GraniteMoeModel", "GraniteMoeSharedModel", "GraniteMoeHybridModel"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Granite's mixtures of experts."""
    return [GRANITEMOE]
