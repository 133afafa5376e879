"""DeBERTa 2 and 3, mDeBERTa 3 (transformers: models/deberta_v2): q, k and v apart, and an optional convolution.

The relative positions are an nn.Embedding whose weight is read directly, so that an adapter on it would do nothing.
`legacy=false` in config.json puts the masked-LM head under `lm_predictions`.
"""

from loratool import Architecture, Conv1d, Embedding, Excluded, Linear, Match, hookimpl

_LAYER = "deberta.encoder.layer.{i}"
DEBERTA_V2 = Architecture(
    name="deberta-v2",
    match=Match(model_types=("deberta-v2",)),
    layers=(
        Embedding(
            "deberta.embeddings.(word_embeddings|position_embeddings|token_type_embeddings)",
            group="embedding",
            roles=("embed", "position", "type"),
        ),
        Linear("deberta.embeddings.embed_proj", group="projection"),
        Excluded("deberta.encoder.rel_embeddings", group="position"),
        Conv1d("deberta.encoder.conv.conv", group="conv"),
        Linear(f"{_LAYER}.attention.self.(query_proj|key_proj|value_proj)", group="attention", roles=("q", "k", "v")),
        Linear(f"{_LAYER}.attention.self.(pos_query_proj|pos_key_proj)", group="attention", roles=("pos_q", "pos_k")),
        Linear(f"{_LAYER}.attention.output.dense", group="attention", roles=("o",)),
        Linear(f"{_LAYER}.(intermediate|output).dense", group="mlp", roles=("up", "down")),
        Linear("pooler.dense", group="head", roles=("pooler",)),
        Linear("cls.predictions.(transform.dense|decoder)", group="head", roles=("transform", "decoder")),
        Linear("lm_predictions.lm_head.dense", group="head", roles=("transform",)),
        Linear("(classifier|qa_outputs)", group="head"),
    ),
    default_targets=("query_proj", "value_proj"),
    prefixes={"": ("deberta.",)},
    headless=("DebertaV2Model",),
    tied=(("deberta.embeddings.word_embeddings", "cls.predictions.decoder"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """DeBERTa 2 and 3 with any head, or none."""
    return [DEBERTA_V2]
