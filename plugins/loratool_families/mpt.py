"""MPT: one weight holds q, k and v, one after another (transformers: models/mpt)."""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl

_WIDTH = "d_model|hidden_size"
MPT = Architecture(
    name="mpt",
    match=Match(model_types=("mpt",)),
    layers=(
        Embedding("transformer.wte", group="embedding", roles=("embed",)),
        Linear("transformer.blocks.{i}.attn.(Wqkv|out_proj)", group="attention", roles=("qkv", "o")),
        Linear("transformer.blocks.{i}.ffn.(up_proj|down_proj)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score|classifier|qa_outputs)", group="head"),
    ),
    default_targets=("Wqkv",),
    fused=(Fused("transformer.blocks.{i}.attn.Wqkv", parts=("q", "k", "v"), layout=concat(_WIDTH, _WIDTH, _WIDTH)),),
    prefixes={"": ("transformer.",)},
    headless=("MptModel",),
    tied=(("transformer.wte", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """MPT."""
    return [MPT]
