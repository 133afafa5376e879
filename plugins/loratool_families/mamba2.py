"""Mamba 2 (transformers: models/mamba2): in_proj is [z; xBC; dt]: the gate, the convolution's input, a step a head."""

from loratool import Architecture, Conv1d, Embedding, Fused, Linear, Match, concat, hookimpl

_MIXER = "backbone.layers.{i}.mixer"
_INNER = "expand*hidden_size"
MAMBA2 = Architecture(
    name="mamba2",
    match=Match(model_types=("mamba2",)),
    layers=(
        Embedding("backbone.embeddings", group="embedding", roles=("embed",)),
        Linear(f"{_MIXER}.(in_proj|out_proj)", group="recurrent", roles=("in", "out")),
        Conv1d(f"{_MIXER}.conv1d", group="conv", roles=("conv",)),
        Linear("lm_head", group="head"),
    ),
    default_targets=("in_proj",),
    fused=(
        Fused(
            f"{_MIXER}.in_proj",
            parts=("z", "xBC", "dt"),
            layout=concat(_INNER, f"{_INNER}+2*n_groups*state_size", "num_heads"),
        ),
    ),
    aliases=("backbone.embedding = backbone.embeddings",),
    prefixes={"": ("backbone.",)},
    headless=("Mamba2Model",),
    tied=(("backbone.embeddings", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Mamba 2."""
    return [MAMBA2]
