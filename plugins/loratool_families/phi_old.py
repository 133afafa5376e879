"""Phi-1, 1.5 and 2 before transformers had them (remote code): q, k and v are one weight, Wqkv, [q; k; v].

phi-old   modeling_mixformer_sequential.py: one Sequential of embedding, blocks and head, so block i is layers.{i + 1}
phi-msft  modeling_phi.py: transformer.h.{i}; its aliases are the names that transformers gives Phi (models/phi)
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl

_BLOCK, _PHI = "transformer.h.{i}", "model.layers.{i}"
_WIDTH, _HEADS = "(n_embd|hidden_size)", "(n_head|num_attention_heads)"  # the latter in configs of transformers' Phi
_KV = f"(n_head_kv|num_key_value_heads|{_HEADS})*({_WIDTH}/{_HEADS})"
_LAYOUT = concat(_WIDTH, _KV, _KV)
MIXFORMER = Architecture(
    name="phi-old",
    match=Match(model_types=("mixformer-sequential",)),
    layers=(
        Embedding("layers.0.wte", group="embedding", roles=("embed",)),
        Linear("layers.{i}.mixer.(Wqkv|out_proj)", group="attention", roles=("qkv", "o")),
        Linear("layers.{i}.mlp.(fc1|fc2)", group="mlp", roles=("up", "down")),
        Linear("layers.{i}.linear", group="head", roles=("lm_head",)),
    ),
    default_targets=("Wqkv",),
    fused=(Fused("layers.{i}.mixer.Wqkv", parts=("q", "k", "v"), layout=_LAYOUT),),
)
MSFT = Architecture(
    name="phi-msft",
    match=Match(model_types=("phi-msft",)),
    layers=(
        Embedding("transformer.embd.wte", group="embedding", roles=("embed",)),
        Linear(f"{_BLOCK}.mixer.(Wqkv|out_proj)", group="attention", roles=("qkv", "o")),
        Linear(f"{_BLOCK}.mlp.(fc1|fc2)", group="mlp", roles=("up", "down")),
        Linear("lm_head.linear", group="head", roles=("lm_head",)),
    ),
    default_targets=("Wqkv",),
    fused=(Fused(f"{_BLOCK}.mixer.Wqkv", parts=("q", "k", "v"), layout=_LAYOUT),),
    aliases=(
        f"{_PHI}.self_attn.(q_proj|k_proj|v_proj) = {_BLOCK}.mixer.Wqkv[(q|k|v)]",
        f"{_PHI}.self_attn.dense = {_BLOCK}.mixer.out_proj",
        f"{_PHI}.mlp.(fc1|fc2) = {_BLOCK}.mlp.(fc1|fc2)",
        "(model.embed_tokens|lm_head) = (transformer.embd.wte|lm_head.linear)",
    ),
    prefixes={"": ("transformer.",)},
    headless=("PhiModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Phi as MixFormerSequential and as phi-msft."""
    return [MIXFORMER, MSFT]
