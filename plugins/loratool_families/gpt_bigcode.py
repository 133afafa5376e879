"""GPT-BigCode, StarCoder 1: GPT-2's names, but linear layers and one key and value (transformers: models/gpt_bigcode).

Multi-query has all queries, then one key and one value; without it q, k and v of one head lie together.
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl, interleave_heads

_QKV = "transformer.h.{i}.attn.c_attn"
_PARTS = ("q", "k", "v")
_WIDTH, _HEADS = "(n_embd|hidden_size)", "(n_head|num_attention_heads)"
_DIM = f"{_WIDTH}/{_HEADS}"
GPT_BIGCODE = Architecture(
    name="gpt-bigcode",
    match=Match(model_types=("gpt_bigcode",), shapes=((_QKV, "out > inp"),)),
    layers=(
        Embedding("transformer.(wte|wpe)", group="embedding", roles=("embed", "position")),
        Linear("transformer.h.{i}.attn.(c_attn|c_proj)", group="attention", roles=("qkv", "o")),
        Linear("transformer.h.{i}.crossattention.(q_attn|c_attn|c_proj)", group="attention", roles=("q", "kv", "o")),
        Linear("transformer.h.{i}.mlp.(c_fc|c_proj)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score|classifier)", group="head"),
    ),
    default_targets=("c_attn",),
    fused=(
        Fused(_QKV, _PARTS, concat(_WIDTH, _DIM, _DIM), when="multi_query"),
        Fused(_QKV, _PARTS, interleave_heads(_HEADS, _DIM, _DIM, _DIM), when="not multi_query"),
    ),
    prefixes={"": ("transformer.",)},
    headless=("GPTBigCodeModel",),
    tied=(("transformer.wte", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """StarCoder 1 and SantaCoder."""
    return [GPT_BIGCODE]
