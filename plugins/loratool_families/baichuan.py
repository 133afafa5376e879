"""Baichuan 1 (remote code: modeling_baichuan.py): LLaMA's names, but q, k and v are one weight."""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl

_ATTENTION = "model.layers.{i}.self_attn"
BAICHUAN = Architecture(
    name="baichuan",
    match=Match(model_types=("baichuan",), when="vocab_size != 125696"),
    layers=(
        Embedding("model.embed_tokens", group="embedding"),
        Linear(f"{_ATTENTION}.(W_pack|o_proj)", group="attention", roles=("qkv", "o")),
        Linear("model.layers.{i}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear("lm_head", group="head"),
    ),
    default_targets=("W_pack",),
    fused=(Fused(f"{_ATTENTION}.W_pack", parts=("q", "k", "v"), layout=concat(parts=3)),),
    aliases=(f"{_ATTENTION}.(q_proj|k_proj|v_proj) = {_ATTENTION}.W_pack[(q|k|v)]",),  # after llamafying
    prefixes={"": ("model.",)},
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Baichuan 1."""
    return [BAICHUAN]
