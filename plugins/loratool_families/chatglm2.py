"""ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4-9B as remote code (modeling_chatglm.py of THUDM/chatglm2-6b).

query_key_value is [q; k; v] with multi_query_attention, else by head. dense_h_to_4h is [gate; up]. GLM-4 as
transformers has it (models/glm) splits q, k, v and calls the other weights as LLaMA does, with one gate_up_proj.
The published config.json names the class ChatGLMModel, but files and live model have the prefix `transformer.`.
"""

from loratool import Architecture, Embedding, Excluded, Fused, Linear, Match, concat, hookimpl, interleave_heads

_LAYER, _LLAMA = "transformer.encoder.layers.{i}", "model.layers.{i}"
_QKV, _PARTS = f"{_LAYER}.self_attention.query_key_value", ("q", "k", "v")
_HEAD = "(kv_channels|head_dim|128)"  # the second of each is what transformers' GLM-4 calls it
_KV = f"(multi_query_group_num|num_key_value_heads)*{_HEAD}"
_GROUPED = "multi_query_attention or num_key_value_heads"
CHATGLM2 = Architecture(
    name="chatglm2",
    match=Match(model_types=("chatglm",), when="padded_vocab_size"),
    layers=(
        Embedding("transformer.embedding.word_embeddings", group="embedding"),
        Linear(f"{_LAYER}.self_attention.(query_key_value|dense)", group="attention", roles=("qkv", "o")),
        Linear(f"{_LAYER}.mlp.(dense_h_to_4h|dense_4h_to_h)", group="mlp", roles=("gate_up", "down")),
        Linear("(transformer.output_layer|classifier_head)", group="head"),
        Excluded("transformer.prefix_encoder.(embedding|trans.0|trans.2)", group="prefix encoder"),
    ),
    default_targets=("query_key_value",),
    fused=(
        Fused(_QKV, _PARTS, layout=concat(f"num_attention_heads*{_HEAD}", _KV, _KV), when=_GROUPED),
        Fused(_QKV, _PARTS, layout=interleave_heads("num_attention_heads", _HEAD, _HEAD, _HEAD)),
        Fused(f"{_LAYER}.mlp.dense_h_to_4h", parts=("gate", "up"), layout=concat(parts=2)),
    ),
    aliases=(
        f"{_LLAMA}.self_attn.(q_proj|k_proj|v_proj) = {_QKV}[(q|k|v)]",
        f"{_LLAMA}.self_attn.o_proj = {_LAYER}.self_attention.dense",
        f"{_LLAMA}.mlp.(gate_proj|up_proj) = {_LAYER}.mlp.dense_h_to_4h[(gate|up)]",
        f"{_LLAMA}.mlp.(gate_up_proj|down_proj) = {_LAYER}.mlp.(dense_h_to_4h|dense_4h_to_h)",
        "(model.embed_tokens|lm_head) = (transformer.embedding.word_embeddings|transformer.output_layer)",
    ),
    prefixes={"": ("transformer.",)},
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """ChatGLM2 and its successors."""
    return [CHATGLM2]
