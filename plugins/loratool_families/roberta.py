"""RoBERTa, XLM-RoBERTa (also XL) and CamemBERT: BERT's encoder under another root, with heads of its own.

Sources: transformers, models/roberta, models/xlm_roberta, models/xlm_roberta_xl, models/camembert. A bare RobertaModel
has no leading `roberta.`.
"""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

_LAYER = "roberta.encoder.layer.{i}"
_TYPES = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert")
ROBERTA = Architecture(
    name="roberta",
    match=Match(model_types=_TYPES),
    layers=(
        Embedding(
            "roberta.embeddings.(word_embeddings|position_embeddings|token_type_embeddings)",
            group="embedding",
            roles=("embed", "position", "type"),
        ),
        Linear(f"{_LAYER}.attention.self.(query|key|value)", group="attention", roles=("q", "k", "v")),
        Linear(f"{_LAYER}.crossattention.self.(query|key|value)", group="attention", roles=("q", "k", "v")),
        Linear(f"{_LAYER}.(attention|crossattention).output.dense", group="attention", roles=("o", "o")),
        Linear(f"{_LAYER}.(intermediate|output).dense", group="mlp", roles=("up", "down")),
        Linear("roberta.pooler.dense", group="head", roles=("pooler",)),
        Linear("lm_head.(dense|decoder)", group="head", roles=("transform", "decoder")),
        Linear("classifier.(dense|out_proj)", group="head", roles=("dense", "classifier")),
        Linear("(classifier|qa_outputs)", group="head"),
    ),
    default_targets=("query", "value"),
    prefixes={"": ("roberta.",)},
    headless=("RobertaModel", "XLMRobertaModel", "XLMRobertaXLModel", "CamembertModel"),
    tied=(("roberta.embeddings.word_embeddings", "lm_head.decoder"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """RoBERTa and its multilingual and French relatives, with any head or none."""
    return [ROBERTA]
