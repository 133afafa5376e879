"""SigLIP and SigLIP 2 with both towers, and their vision towers alone (transformers: models/siglip, models/siglip2).

SiglipVisionModel has no `vision_model.` in memory since transformers 5. The pooling head is an nn.MultiheadAttention
with a packed in_proj_weight. SigLIP 2 embeds patches with a linear layer; its checkpoints of a fixed resolution are of
the first family (model_type siglip).
"""

from loratool import Architecture, Conv2d, Embedding, Excluded, Linear, Match, hookimpl

_ATTENTION, _ROLES = "encoder.layers.{i}.self_attn.(q_proj|k_proj|v_proj|out_proj)", ("q", "k", "v", "o")
_FEED_FORWARD = "encoder.layers.{i}.mlp.(fc1|fc2)"


def _siglip(name: str, patches: type[Linear | Conv2d], pixels: str, vision_class: str) -> Architecture:
    return Architecture(
        name=name,
        match=Match((name, f"{name}_vision_model"), shapes=(("vision_model.embeddings.patch_embedding", pixels),)),
        layers=(
            Embedding("text_model.embeddings.(token_embedding|position_embedding)", "embedding", ("embed", "position")),
            Linear(f"text_model.{_ATTENTION}", "attention", _ROLES),
            Linear(f"text_model.{_FEED_FORWARD}", "mlp", ("up", "down")),
            Linear("text_model.head", "projection"),
            patches("vision_model.embeddings.patch_embedding", "embedding", ("patch",), tower="vision"),
            Embedding("vision_model.embeddings.position_embedding", "embedding", ("position",), tower="vision"),
            Linear(f"vision_model.{_ATTENTION}", "attention", _ROLES, tower="vision"),
            Linear(f"vision_model.{_FEED_FORWARD}", "mlp", ("up", "down"), tower="vision"),
            Excluded("vision_model.head.probe", "embedding", tower="vision"),
            Excluded("vision_model.head.attention.in_proj_weight", "attention", ("qkv",), tower="vision"),
            Linear("vision_model.head.attention.out_proj", "attention", ("o",), tower="vision"),
            Linear("vision_model.head.mlp.(fc1|fc2)", "mlp", ("up", "down"), tower="vision"),
            Linear("classifier", "head", tower="vision"),
        ),
        default_targets=("q_proj", "v_proj"),
        prefixes={"": ("vision_model.",)},
        headless=(vision_class,),
    )


@hookimpl
def register_architectures() -> list[Architecture]:
    """SigLIP and SigLIP 2."""
    return [
        _siglip("siglip", Conv2d, "inp <= 4", "SiglipVisionModel"),  # channels
        _siglip("siglip2", Linear, "inp > 4", "Siglip2VisionModel"),  # channels times pixels
    ]
