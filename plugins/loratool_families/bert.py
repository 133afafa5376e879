"""BERT (transformers: models/bert). A bare BertModel, such as most sentence encoders, has no leading `bert.`."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

BERT = Architecture(
    name="bert",
    match=Match(model_types=("bert",)),
    layers=(
        Embedding(
            "bert.embeddings.(word_embeddings|position_embeddings|token_type_embeddings)",
            group="embedding",
            roles=("embed", "position", "type"),
        ),
        Linear("bert.encoder.layer.{i}.attention.self.(query|key|value)", group="attention", roles=("q", "k", "v")),
        Linear(
            "bert.encoder.layer.{i}.crossattention.self.(query|key|value)", group="attention", roles=("q", "k", "v")
        ),
        Linear("bert.encoder.layer.{i}.(attention|crossattention).output.dense", group="attention", roles=("o", "o")),
        Linear("bert.encoder.layer.{i}.(intermediate|output).dense", group="mlp", roles=("up", "down")),
        Linear("bert.pooler.dense", group="head", roles=("pooler",)),
        Linear("cls.predictions.(transform.dense|decoder)", group="head", roles=("transform", "decoder")),
        Linear("(cls.seq_relationship|classifier|qa_outputs)", group="head"),
    ),
    default_targets=("query", "value"),
    prefixes={"": ("bert.",)},
    headless=("BertModel",),
    tied=(("bert.embeddings.word_embeddings", "cls.predictions.decoder"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """BERT with any head, or none."""
    return [BERT]
