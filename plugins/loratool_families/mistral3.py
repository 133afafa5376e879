"""Mistral Small 3.1 and Ministral 3 with the Pixtral vision tower (transformers: models/mistral3, pixtral).

Files have `language_model.model`; transformers 4.52 and later have `model.language_model` in memory.
"""

from loratool import Architecture, Conv2d, Embedding, Linear, Match, hookimpl

_TEXT = "language_model.model"
_VISION = "vision_tower.transformer.layers.{i}"
MISTRAL3 = Architecture(
    name="mistral3",
    match=Match(model_types=("mistral3",)),
    layers=(
        Embedding(f"{_TEXT}.embed_tokens", group="embedding"),
        Linear(
            f"{_TEXT}.layers.{{i}}.self_attn.(q_proj|k_proj|v_proj|o_proj)",
            group="attention",
            roles=("q", "k", "v", "o"),
        ),
        Linear(f"{_TEXT}.layers.{{i}}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear("language_model.lm_head", group="head"),
        Conv2d("vision_tower.patch_conv", group="conv", roles=("patch",), tower="vision"),
        Linear(
            f"{_VISION}.attention.(q_proj|k_proj|v_proj|o_proj)",
            group="attention",
            roles=("q", "k", "v", "o"),
            tower="vision",
        ),
        Linear(
            f"{_VISION}.feed_forward.(gate_proj|up_proj|down_proj)",
            group="mlp",
            roles=("gate", "up", "down"),
            tower="vision",
        ),
        Linear(
            "multi_modal_projector.(linear_1|linear_2|patch_merger.merging_layer)",
            group="projection",
            roles=("up", "down", "merge"),
            tower="projector",
        ),
    ),
    default_targets=("self_attn.q_proj", "self_attn.v_proj"),
    memory=(
        "lm_head = language_model.lm_head",
        f"model.language_model.** = {_TEXT}.**",
        "model.vision_tower.** = vision_tower.**",
        "model.multi_modal_projector.** = multi_modal_projector.**",
    ),
    prefixes={"": ("model.",)},
    headless=("Mistral3Model",),
    tied=((f"{_TEXT}.embed_tokens", "language_model.lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Mistral 3 (vision and text)."""
    return [MISTRAL3]
