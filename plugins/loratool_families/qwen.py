"""Qwen 1, the language model (remote code: modeling_qwen.py): c_attn is a Linear, [q; k; v]; w2 is the gate, w1 is up.

The aliases are the names that LLaMA-Factory's llamafy_qwen.py writes.
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl

_BLOCK, _LLAMA = "transformer.h.{i}", "model.layers.{i}"
QWEN = Architecture(
    name="qwen",
    match=Match(model_types=("qwen",)),
    layers=(
        Embedding("transformer.wte", group="embedding", roles=("embed",)),
        Linear(f"{_BLOCK}.attn.(c_attn|c_proj)", group="attention", roles=("qkv", "o")),
        Linear(f"{_BLOCK}.mlp.(w2|w1|c_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear("lm_head", group="head"),
    ),
    default_targets=("c_attn",),
    fused=(Fused(f"{_BLOCK}.attn.c_attn", parts=("q", "k", "v"), layout=concat(parts=3)),),
    aliases=(
        f"{_LLAMA}.self_attn.(q_proj|k_proj|v_proj) = {_BLOCK}.attn.c_attn[(q|k|v)]",
        f"{_LLAMA}.self_attn.o_proj = {_BLOCK}.attn.c_proj",
        f"{_LLAMA}.mlp.(gate_proj|up_proj|down_proj) = {_BLOCK}.mlp.(w2|w1|c_proj)",
        "model.embed_tokens = transformer.wte",
    ),
    prefixes={"": ("transformer.",)},
    headless=("QWenModel",),
    tied=(("transformer.wte", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen 1."""
    return [QWEN]
