"""DistilBERT (transformers: models/distilbert). A bare DistilBertModel has no leading `distilbert.`."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

DISTILBERT = Architecture(
    name="distilbert",
    match=Match(model_types=("distilbert",)),
    layers=(
        Embedding(
            "distilbert.embeddings.(word_embeddings|position_embeddings)",
            group="embedding",
            roles=("embed", "position"),
        ),
        Linear(
            "distilbert.transformer.layer.{i}.attention.(q_lin|k_lin|v_lin|out_lin)",
            group="attention",
            roles=("q", "k", "v", "o"),
        ),
        Linear("distilbert.transformer.layer.{i}.ffn.(lin1|lin2)", group="mlp", roles=("up", "down")),
        Linear("(vocab_transform|vocab_projector|pre_classifier|classifier|qa_outputs)", group="head"),
    ),
    default_targets=("q_lin", "v_lin"),
    prefixes={"": ("distilbert.",)},
    headless=("DistilBertModel",),
    tied=(("distilbert.embeddings.word_embeddings", "vocab_projector"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """DistilBERT with any head, or none."""
    return [DISTILBERT]
