"""ViT, ViT-MSN, DeiT, BEiT, DINOv2 with and without registers (transformers: models/vit, ..., models/dinov2).

On disk, and in adapters of transformers 4, an attention is `attention.attention.query`; transformers 5 calls it
`attention.q_proj` in memory, and all but DINOv2 move `encoder.layer` to `layers`. Tokens and positions are bare
parameters. Only the root differs between the families.
"""

from loratool import Architecture, Conv2d, Excluded, Fused, Linear, Match, concat, hookimpl

_TOKENS = "cls_token|position_embeddings|mask_token"


def _layers(root: str, tokens: str, feed_forward: tuple[str, str]) -> tuple[Linear | Conv2d | Excluded, ...]:
    layer = f"{root}.encoder.layer.{{i}}"
    return (
        Excluded(f"{root}.embeddings.({tokens})", group="embedding"),
        Conv2d(f"{root}.embeddings.patch_embeddings.projection", group="embedding", roles=("patch",)),
        Linear(f"{layer}.attention.attention.(query|key|value)", group="attention", roles=("q", "k", "v")),
        Linear(f"{layer}.attention.output.dense", group="attention", roles=("o",)),
        Linear(f"{layer}.({'|'.join(feed_forward)})", group="mlp", roles=("up", "down")),
        Linear("classifier", group="head"),
    )


def _renamed(root: str) -> tuple[str, ...]:
    ours, theirs = f"{root}.layers.{{i}}", f"{root}.encoder.layer.{{i}}"
    return (
        f"{ours}.attention.(q_proj|k_proj|v_proj) = {theirs}.attention.attention.(query|key|value)",
        f"{ours}.attention.o_proj = {theirs}.attention.output.dense",
        f"{ours}.mlp.(fc1|fc2) = {theirs}.(intermediate|output).dense",
    )


_DENSE = ("intermediate.dense", "output.dense")
VIT = Architecture(
    name="vit",
    match=Match(model_types=("vit", "vit_msn")),
    layers=(
        *_layers("vit", _TOKENS, _DENSE),
        Linear("vit.pooler.dense", group="head", roles=("pooler",)),
        Conv2d("decoder.0", group="head", roles=("decoder",)),
    ),
    default_targets=("query", "value"),
    memory=_renamed("vit"),
    prefixes={"": ("vit.",)},
    headless=("ViTModel", "ViTMSNModel"),
)
DEIT = Architecture(
    name="deit",
    match=Match(model_types=("deit",)),
    layers=(
        *_layers("deit", f"{_TOKENS}|distillation_token", _DENSE),
        Linear("deit.pooler.dense", group="head", roles=("pooler",)),
        Linear("(cls_classifier|distillation_classifier)", group="head"),
        Conv2d("decoder.0", group="head", roles=("decoder",)),
    ),
    default_targets=("query", "value"),
    memory=_renamed("deit"),
    prefixes={"": ("deit.",)},
    headless=("DeiTModel",),
)
_BIAS = "relative_position_bias.relative_position_bias_table"
BEIT = Architecture(
    name="beit",
    match=Match(model_types=("beit",)),
    layers=(
        *_layers("beit", _TOKENS, _DENSE),
        Excluded(f"beit.encoder.layer.{{i}}.attention.attention.{_BIAS}", group="position"),
        Excluded(f"beit.encoder.{_BIAS}", group="position"),
        Linear("lm_head", group="head"),
    ),
    default_targets=("query", "value"),
    memory=(
        *_renamed("beit"),
        f"beit.layers.{{i}}.{_BIAS} = beit.encoder.layer.{{i}}.attention.attention.{_BIAS}",
        f"beit.shared_position_bias.relative_position_bias_table = beit.encoder.{_BIAS}",
    ),
    prefixes={"": ("beit.",)},
    headless=("BeitModel",),
)


def _dinov2(root: str, name: str, tokens: str, classes: tuple[str, ...]) -> Architecture:
    attention, mlp = (f"{root}.encoder.layer.{{i}}.{part}" for part in ("attention", "mlp"))
    return Architecture(
        name=name,
        match=Match(model_types=(root,)),
        layers=(
            *_layers(root, tokens, ("mlp.fc1", "mlp.fc2")),
            Linear(f"{mlp}.(weights_in|weights_out)", group="mlp", roles=("gate_up", "down")),
        ),
        default_targets=("query", "value"),
        fused=(Fused(f"{mlp}.weights_in", parts=("gate", "up"), layout=concat(parts=2)),),
        memory=(
            f"{attention}.(q_proj|k_proj|v_proj) = {attention}.attention.(query|key|value)",
            f"{attention}.o_proj = {attention}.output.dense",
            f"{mlp}.(gate_proj|up_proj) = {mlp}.weights_in[(gate|up)]",
            f"{mlp}.down_proj = {mlp}.weights_out",
        ),
        prefixes={"": (f"{root}.",)},
        headless=classes,
    )


DINOV2 = _dinov2("dinov2", "dinov2", _TOKENS, ("Dinov2Model", "Dinov2Backbone"))
WITH_REGISTERS = _dinov2(
    "dinov2_with_registers",
    "dinov2-with-registers",
    f"{_TOKENS}|register_tokens",
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """ViT and the families that share its names below the root."""
    return [VIT, DEIT, BEIT, DINOV2, WITH_REGISTERS]
