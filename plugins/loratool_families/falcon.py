"""Falcon: one set of names, three layouts of q, k and v (transformers: models/falcon; remote code: modeling_RW.py).

7B is multi-query: all queries, one key, one value. RW-1B has q, k, v a head. 40B, 180B and 11B (new decoder
architecture) have groups of several queries, one key, one value. The older configs, model types RefinedWebModel (7B,
RW-1B) and RefinedWeb (40B), spell the counts n_head and n_head_kv and have no flag for the new decoder.
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl, interleave_heads

_QKV = "transformer.h.{i}.self_attention.query_key_value"
_PARTS = ("q", "k", "v")
_HEADS = "(num_attention_heads|n_head)"
_GROUPS = f"(num_kv_heads|n_head_kv|{_HEADS})"
_DIM = f"hidden_size/{_HEADS}"
_NEW = "(new_decoder_architecture or model_type == 'RefinedWeb')"
FALCON = Architecture(
    name="falcon",
    match=Match(model_types=("falcon", "RefinedWeb", "RefinedWebModel")),
    layers=(
        Embedding("transformer.word_embeddings", group="embedding", roles=("embed",)),
        Linear("transformer.h.{i}.self_attention.(query_key_value|dense)", group="attention", roles=("qkv", "o")),
        Linear("transformer.h.{i}.mlp.(dense_h_to_4h|dense_4h_to_h)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score|classifier|qa_outputs)", group="head"),
    ),
    default_targets=("query_key_value",),
    fused=(
        Fused(_QKV, _PARTS, interleave_heads(_GROUPS, f"{_HEADS}/{_GROUPS}*({_DIM})", _DIM, _DIM), when=_NEW),
        Fused(_QKV, _PARTS, concat("hidden_size", _DIM, _DIM), when=f"multi_query and not {_NEW}"),
        Fused(_QKV, _PARTS, interleave_heads(_HEADS, _DIM, _DIM, _DIM), when=f"not multi_query and not {_NEW}"),
    ),
    prefixes={"": ("transformer.",)},
    headless=("FalconModel",),
    tied=(("transformer.word_embeddings", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Falcon."""
    return [FALCON]
