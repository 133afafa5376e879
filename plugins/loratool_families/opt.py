"""OPT: the MLP's layers sit beside the attention; 350m projects in and out of its width (transformers: models/opt)."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

_LAYER = "model.decoder.layers.{i}"
OPT = Architecture(
    name="opt",
    match=Match(model_types=("opt",)),
    layers=(
        Embedding("model.decoder.(embed_tokens|embed_positions)", group="embedding", roles=("embed", "position")),
        Linear("model.decoder.(project_in|project_out)", group="projection"),
        Linear(f"{_LAYER}.self_attn.(q_proj|k_proj|v_proj|out_proj)", group="attention", roles=("q", "k", "v", "o")),
        Linear(f"{_LAYER}.(fc1|fc2)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score|qa_outputs)", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("model.",)},
    headless=("OPTModel",),
    tied=(("model.decoder.embed_tokens", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """OPT."""
    return [OPT]
