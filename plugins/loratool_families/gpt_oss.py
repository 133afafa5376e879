"""gpt-oss (transformers: models/gpt_oss): experts as (experts, in, out), gate and up in alternate columns.

The released files hold the experts in MXFP4 (`_blocks`, `_scales`), which no layer here describes.
"""

from loratool import Architecture, Embedding, Excluded, Experts, Fused, Linear, Match, hookimpl, stride

_LAYER = "model.layers.{i}"
_EXPERTS = f"{_LAYER}.mlp.experts"
GPT_OSS = Architecture(
    name="gpt-oss",
    match=Match(model_types=("gpt_oss",)),
    layers=(
        Embedding("model.embed_tokens", group="embedding"),
        Linear(f"{_LAYER}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")),
        Experts(f"{_EXPERTS}.(gate_up_proj|down_proj)", group="experts", roles=("gate_up", "down"), in_out=True),
        Excluded(f"{_EXPERTS}.(gate_up_proj_bias|down_proj_bias)", group="experts"),
        Linear(f"{_LAYER}.mlp.router", group="router"),
        Linear("(lm_head|score)", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    fused=(Fused(f"{_EXPERTS}.gate_up_proj", parts=("gate", "up"), layout=stride(2)),),
    aliases=(
        f"{_EXPERTS}.{{e}}.(gate_proj|up_proj) = {_EXPERTS}.gate_up_proj[{{e}}][(gate|up)]",
        f"{_EXPERTS}.{{e}}.down_proj = {_EXPERTS}.down_proj[{{e}}]",
    ),
    prefixes={"": ("model.",)},
    headless=("GptOssModel",),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """gpt-oss."""
    return [GPT_OSS]
