"""DeBERTa 1 (transformers: models/deberta): q, k and v are one weight, interleaved by head.

The relative positions are an nn.Embedding whose weight is read directly, so that an adapter on it would do nothing.
`legacy=false` in config.json puts the masked-LM head under `lm_predictions`.
"""

from loratool import Architecture, Embedding, Excluded, Fused, Linear, Match, hookimpl, interleave_heads

_LAYER = "deberta.encoder.layer.{i}"
_HEAD = "hidden_size/num_attention_heads"
DEBERTA = Architecture(
    name="deberta",
    match=Match(model_types=("deberta",)),
    layers=(
        Embedding(
            "deberta.embeddings.(word_embeddings|position_embeddings|token_type_embeddings)",
            group="embedding",
            roles=("embed", "position", "type"),
        ),
        Linear("deberta.embeddings.embed_proj", group="projection"),
        Excluded("deberta.encoder.rel_embeddings", group="position"),
        Linear(
            f"{_LAYER}.attention.self.(in_proj|pos_proj|pos_q_proj)", group="attention", roles=("qkv", "pos_k", "pos_q")
        ),
        Linear(f"{_LAYER}.attention.self.(head_logits_proj|head_weights_proj)", group="attention"),
        Linear(f"{_LAYER}.attention.output.dense", group="attention", roles=("o",)),
        Linear(f"{_LAYER}.(intermediate|output).dense", group="mlp", roles=("up", "down")),
        Linear("pooler.dense", group="head", roles=("pooler",)),
        Linear("cls.predictions.(transform.dense|decoder)", group="head", roles=("transform", "decoder")),
        Linear("lm_predictions.lm_head.dense", group="head", roles=("transform",)),
        Linear("(classifier|qa_outputs)", group="head"),
    ),
    default_targets=("in_proj",),
    fused=(
        Fused(
            f"{_LAYER}.attention.self.in_proj",
            parts=("q", "k", "v"),
            layout=interleave_heads("num_attention_heads", _HEAD, _HEAD, _HEAD),
        ),
    ),
    prefixes={"": ("deberta.",)},
    headless=("DebertaModel",),
    tied=(("deberta.embeddings.word_embeddings", "cls.predictions.decoder"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """DeBERTa 1 with any head, or none."""
    return [DEBERTA]
