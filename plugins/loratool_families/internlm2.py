"""InternLM2 and 2.5 (remote code: modeling_internlm2.py): q, k, v by key-value head in wqkv; w1 gate, w3 up, w2 down.

The aliases are LLaMA's names. Here q_proj means the rows that the model's own reshape takes as queries. LLaMA-Factory's
former llamafy_internlm2.py cut wqkv into [q; k; v], which are other rows (it warned that its models do not work).
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, hookimpl, interleave_heads

_LAYER = "model.layers.{i}"
_HEAD = "hidden_size/num_attention_heads"
INTERNLM2 = Architecture(
    name="internlm2",
    match=Match(model_types=("internlm2",)),
    layers=(
        Embedding("model.tok_embeddings", group="embedding"),
        Linear(f"{_LAYER}.attention.(wqkv|wo)", group="attention", roles=("qkv", "o")),
        Linear(f"{_LAYER}.feed_forward.(w1|w3|w2)", group="mlp", roles=("gate", "up", "down")),
        Linear("(output|score|v_head|qa_outputs)", group="head"),  # v_head: InternLM2ForRewardModel
    ),
    default_targets=("wqkv",),
    fused=(
        Fused(
            f"{_LAYER}.attention.wqkv",
            parts=("q", "k", "v"),
            layout=interleave_heads(
                "num_key_value_heads|num_attention_heads",
                f"num_attention_heads/(num_key_value_heads|num_attention_heads)*({_HEAD})",
                _HEAD,
                _HEAD,
            ),
        ),
    ),
    aliases=(
        f"{_LAYER}.self_attn.(q_proj|k_proj|v_proj) = {_LAYER}.attention.wqkv[(q|k|v)]",
        f"{_LAYER}.self_attn.o_proj = {_LAYER}.attention.wo",
        f"{_LAYER}.mlp.(gate_proj|up_proj|down_proj) = {_LAYER}.feed_forward.(w1|w3|w2)",
        "(model.embed_tokens|lm_head) = (model.tok_embeddings|output)",
        "transformer.** = model.**",  # InternLM2ForQuestionAnswering
    ),
    prefixes={"": ("model.",)},
    headless=("InternLM2Model",),
    tied=(("model.tok_embeddings", "output"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """InternLM2 and 2.5."""
    return [INTERNLM2]
