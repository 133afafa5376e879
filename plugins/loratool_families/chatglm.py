"""ChatGLM-6B (remote code: modeling_chatglm.py of THUDM/chatglm-6b): q, k, v by head in one weight, a GELU MLP.

ChatGLM2 and later share the model_type and have other names: see chatglm2. The published config.json names the class
ChatGLMModel, but the files and the live model (ChatGLMForConditionalGeneration) have the prefix `transformer.`.
"""

from loratool import Architecture, Embedding, Excluded, Fused, Linear, Match, hookimpl, interleave_heads

_LAYER = "transformer.layers.{i}"
_HEAD = "hidden_size/num_attention_heads"
CHATGLM = Architecture(
    name="chatglm",
    match=Match(model_types=("chatglm",), when="(inner_hidden_size or position_encoding_2d) and not padded_vocab_size"),
    layers=(
        Embedding("transformer.word_embeddings", group="embedding"),
        Linear(f"{_LAYER}.attention.(query_key_value|dense)", group="attention", roles=("qkv", "o")),
        Linear(f"{_LAYER}.mlp.(dense_h_to_4h|dense_4h_to_h)", group="mlp", roles=("up", "down")),
        Linear("lm_head", group="head"),
        Excluded("transformer.prefix_encoder.(embedding|trans.0|trans.2)", group="prefix encoder"),
    ),
    default_targets=("query_key_value",),
    fused=(
        Fused(
            f"{_LAYER}.attention.query_key_value",
            parts=("q", "k", "v"),
            layout=interleave_heads("num_attention_heads", _HEAD, _HEAD, _HEAD),
        ),
    ),
    prefixes={"": ("transformer.",)},
    tied=(("transformer.word_embeddings", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """ChatGLM-6B."""
    return [CHATGLM]
