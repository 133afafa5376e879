"""Baichuan 1, 7B and 13B (remote code: modeling_baichuan.py): LLaMA's names, but q, k and v are one weight.

Baichuan 2 has the same names and model_type; the vocabulary tells them apart (64000 entries here, 125696 there).
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl

_ATTENTION = "model.layers.{i}.self_attn"
BAICHUAN = Architecture(
    name="baichuan",
    match=Match(
        model_types=("baichuan",), when="vocab_size < 125696", shapes=(("model.embed_tokens", "inp < 125696"),)
    ),
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
    headless=("BaichuanModel",),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Baichuan 1."""
    return [BAICHUAN]
