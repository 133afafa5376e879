"""Gemma 3 with its SigLIP vision tower (transformers: models/gemma3, siglip). The text model alone is gemma's.

Files have `language_model.model`; transformers 4.52 and later have `model.language_model` in memory, and version 5 also
leaves out the vision tower's `vision_model`. The projection into the text model is a bare parameter.
"""

from loratool import Architecture, Conv2d, Embedding, Excluded, Linear, Match, hookimpl

_TEXT = "language_model.model"
_VISION = "vision_tower.vision_model"
GEMMA3 = Architecture(
    name="gemma3",
    match=Match(model_types=("gemma3",)),
    layers=(
        Embedding(f"{_TEXT}.embed_tokens", group="embedding"),
        Linear(
            f"{_TEXT}.layers.{{i}}.self_attn.(q_proj|k_proj|v_proj|o_proj)",
            group="attention",
            roles=("q", "k", "v", "o"),
        ),
        Linear(f"{_TEXT}.layers.{{i}}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear("(language_model.lm_head|score)", group="head"),
        Conv2d(f"{_VISION}.embeddings.patch_embedding", group="conv", roles=("patch",), tower="vision"),
        Embedding(f"{_VISION}.embeddings.position_embedding", group="embedding", roles=("position",), tower="vision"),
        Linear(
            f"{_VISION}.encoder.layers.{{i}}.self_attn.(q_proj|k_proj|v_proj|out_proj)",
            group="attention",
            roles=("q", "k", "v", "o"),
            tower="vision",
        ),
        Linear(f"{_VISION}.encoder.layers.{{i}}.mlp.(fc1|fc2)", group="mlp", roles=("up", "down"), tower="vision"),
        # the pooling head, which the released files lack
        Linear(f"{_VISION}.head.attention.out_proj", group="attention", roles=("o",), tower="vision"),
        Linear(f"{_VISION}.head.mlp.(fc1|fc2)", group="mlp", roles=("up", "down"), tower="vision"),
        Excluded(f"{_VISION}.head.(attention.in_proj_weight|probe)", group="attention", tower="vision"),
        Excluded("multi_modal_projector.mm_input_projection_weight", group="projection", tower="projector"),
    ),
    default_targets=("model.layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.v_proj"),
    memory=(
        "lm_head = language_model.lm_head",
        f"model.language_model.** = {_TEXT}.**",
        f"model.vision_tower.** = {_VISION}.**",
        "model.multi_modal_projector.** = multi_modal_projector.**",
    ),
    aliases=(f"model.{_VISION}.** = {_VISION}.**",),  # transformers 4.52 to 4.57
    prefixes={"": ("model.",)},
    headless=("Gemma3Model",),
    tied=((f"{_TEXT}.embed_tokens", "language_model.lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Gemma 3 (vision and text)."""
    return [GEMMA3]
