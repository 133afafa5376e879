"""Baichuan 2 (remote code: modeling_baichuan.py): Baichuan 1's layers, and a head that normalises its weight.

`lm_head` is a NormHead: its rows are scaled to length 1 in forward, so a sum with a delta is not what a trained delta
means, and the head carries no adapter. LLaMA-Factory's llamafy_baichuan2.py splits W_pack as here, into [q; k; v].
"""

from loratool import Architecture, Embedding, Excluded, Fused, Linear, Match, concat, hookimpl

_ATTENTION = "model.layers.{i}.self_attn"
BAICHUAN2 = Architecture(
    name="baichuan2",
    match=Match(
        model_types=("baichuan",), when="vocab_size >= 125696", shapes=(("model.embed_tokens", "inp >= 125696"),)
    ),
    layers=(
        Embedding("model.embed_tokens", group="embedding"),
        Linear(f"{_ATTENTION}.(W_pack|o_proj)", group="attention", roles=("qkv", "o")),
        Linear("model.layers.{i}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Excluded("lm_head", group="normalised head"),
    ),
    default_targets=("W_pack",),
    fused=(Fused(f"{_ATTENTION}.W_pack", parts=("q", "k", "v"), layout=concat(parts=3)),),
    aliases=(f"{_ATTENTION}.(q_proj|k_proj|v_proj) = {_ATTENTION}.W_pack[(q|k|v)]",),
    prefixes={"": ("model.",)},
    headless=("BaichuanModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Baichuan 2."""
    return [BAICHUAN2]
