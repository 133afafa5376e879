"""Mamba and Falcon Mamba (transformers: models/mamba, models/falcon_mamba).

in_proj is [x; z], z being the gate; x_proj is [dt; B; C]. The first releases called the embeddings
`backbone.embedding`. PEFT refuses out_proj and conv1d, whose weights the fused kernels read directly.
"""

from loratool import Architecture, Conv1d, Embedding, Excluded, Fused, Linear, Match, concat, hookimpl

_MIXER = "backbone.layers.{i}.mixer"
MAMBA = Architecture(
    name="mamba",
    match=Match(model_types=("mamba", "falcon_mamba")),
    layers=(
        Embedding("backbone.embeddings", group="embedding", roles=("embed",)),
        Linear(f"{_MIXER}.(in_proj|x_proj|dt_proj|out_proj)", group="recurrent", roles=("in", "x", "dt", "out")),
        Conv1d(f"{_MIXER}.conv1d", group="conv", roles=("conv",)),
        Excluded(f"{_MIXER}.A_log", group="recurrent"),
        Linear("lm_head", group="head"),
    ),
    default_targets=("in_proj", "x_proj"),
    fused=(
        Fused(f"{_MIXER}.in_proj", parts=("x", "z"), layout=concat(parts=2)),
        Fused(f"{_MIXER}.x_proj", parts=("dt", "B", "C"), layout=concat("time_step_rank", "state_size", "state_size")),
    ),
    aliases=("backbone.embedding = backbone.embeddings",),
    prefixes={"": ("backbone.",)},
    headless=("MambaModel", "FalconMambaModel"),
    tied=(("backbone.embeddings", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Mamba and Falcon Mamba."""
    return [MAMBA]
