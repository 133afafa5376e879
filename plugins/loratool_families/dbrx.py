"""DBRX (transformers: models/dbrx): q, k and v in one weight, and all experts of a layer in one 2-D parameter.

w1 (gate) and v1 (up) are slabs of (ffn, hidden) = (out, in), one an expert. The slabs of w2 are (ffn, hidden) too, but
used as x @ w2, so its rows are inputs: it is one matrix here, taken as it is stored, as PEFT's target_parameters does.
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl, stack

_BLOCK = "transformer.blocks.{i}"
_ATTENTION = f"{_BLOCK}.norm_attn_norm.attn"
_EXPERTS = f"{_BLOCK}.ffn.experts.mlp"
_KV = "attn_config.kv_n_heads*(d_model/n_heads)"
DBRX = Architecture(
    name="dbrx",
    match=Match(model_types=("dbrx",)),
    layers=(
        Embedding("transformer.wte", group="embedding", roles=("embed",)),
        Linear(f"{_ATTENTION}.(Wqkv|out_proj)", group="attention", roles=("qkv", "o")),
        Linear(f"{_EXPERTS}.(w1|v1|w2)", group="experts", roles=("gate", "up", "down"), parameter=True),
        Linear(f"{_BLOCK}.ffn.router.layer", group="router", roles=("router",)),
        Linear("lm_head", group="head"),
    ),
    default_targets=("Wqkv",),
    fused=(
        Fused(f"{_ATTENTION}.Wqkv", parts=("q", "k", "v"), layout=concat("d_model", _KV, _KV)),
        Fused(f"{_EXPERTS}.(w1|v1)", parts=(), layout=stack("ffn_config.ffn_hidden_size")),
    ),
    prefixes={"": ("transformer.",)},
    headless=("DbrxModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """DBRX."""
    return [DBRX]
