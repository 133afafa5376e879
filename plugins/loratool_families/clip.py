"""CLIP with both towers, and its vision tower alone (transformers: models/clip).

CLIPVisionModel has no `vision_model.` in memory since transformers 5; files of either release may have it. The text
encoder alone is a part of Stable Diffusion, whose family describes it.
"""

from loratool import Architecture, Conv2d, Embedding, Linear, Match, hookimpl

_ATTENTION, _ROLES = "encoder.layers.{i}.self_attn.(q_proj|k_proj|v_proj|out_proj)", ("q", "k", "v", "o")
_FEED_FORWARD = "encoder.layers.{i}.mlp.(fc1|fc2)"
CLIP = Architecture(
    name="clip",
    match=Match(model_types=("clip", "clip_vision_model")),
    layers=(
        Embedding("text_model.embeddings.(token_embedding|position_embedding)", "embedding", ("embed", "position")),
        Linear(f"text_model.{_ATTENTION}", "attention", _ROLES),
        Linear(f"text_model.{_FEED_FORWARD}", "mlp", ("up", "down")),
        Conv2d("vision_model.embeddings.patch_embedding", "embedding", ("patch",), tower="vision"),
        Embedding("vision_model.embeddings.position_embedding", "embedding", ("position",), tower="vision"),
        Linear(f"vision_model.{_ATTENTION}", "attention", _ROLES, tower="vision"),
        Linear(f"vision_model.{_FEED_FORWARD}", "mlp", ("up", "down"), tower="vision"),
        Linear("text_projection", "projection"),
        Linear("visual_projection", "projection", tower="vision"),
        Linear("classifier", "head", tower="vision"),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("vision_model.",)},
    headless=("CLIPVisionModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """CLIP, or its vision tower."""
    return [CLIP]
