"""T5, Flan-T5, mT5 and UMT5 (transformers: models/t5, models/mt5, models/umt5).

`shared` is the embedding of encoder, decoder and, where config.json ties it, `lm_head`. The table of relative positions
is an nn.Embedding that no adapter is for. Classifiers hold the model as `transformer.`.
"""

from loratool import Architecture, Embedding, Excluded, Linear, Match, hookimpl

_QKVO, _ROLES = "(q|k|v|o)", ("q", "k", "v", "o")
_FEED_FORWARD = "DenseReluDense.(wi|wi_0|wi_1|wo)"
T5 = Architecture(
    name="t5",
    match=Match(model_types=("t5", "mt5", "umt5")),
    layers=(
        Embedding("(shared|encoder.embed_tokens|decoder.embed_tokens)", group="embedding", roles=("embed",)),
        Linear(f"(encoder|decoder).block.{{i}}.layer.0.SelfAttention.{_QKVO}", group="attention", roles=_ROLES),
        Linear(f"decoder.block.{{i}}.layer.1.EncDecAttention.{_QKVO}", group="attention", roles=_ROLES),
        Linear(f"encoder.block.{{i}}.layer.1.{_FEED_FORWARD}", group="mlp", roles=("up", "gate", "up", "down")),
        Linear(f"decoder.block.{{i}}.layer.2.{_FEED_FORWARD}", group="mlp", roles=("up", "gate", "up", "down")),
        Excluded("(encoder|decoder).block.{i}.layer.0.SelfAttention.relative_attention_bias", group="position"),
        Linear("(lm_head|classifier|qa_outputs)", group="head"),
        Linear("classification_head.(dense|out_proj)", group="head", roles=("dense", "classifier")),
    ),
    default_targets=("q", "v"),
    aliases=("transformer.** = **",),
    wrapped={
        "transformer.": tuple(f"{p}T5For{h}Classification" for p in ("", "M", "UM") for h in ("Sequence", "Token"))
    },
    tied=(("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """T5 and the families that share its names."""
    return [T5]
