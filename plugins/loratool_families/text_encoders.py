"""Text encoders that several families of image models have: their layers, and what other checkpoints call them.

No plugin of its own: the families beside it build on it. Sources: transformers, models/clip, models/t5, models/llama;
open_clip, transformer.py, whose names single-file checkpoints of SD 2 and XL have.
"""

from loratool import Embedding, Excluded, Linear

_ROLES = ("q", "k", "v", "o")
TextLayers = tuple[Linear | Embedding | Excluded, ...]


def clip(component: str, *, projection: bool = False) -> TextLayers:
    """Return the layers of CLIP's text model, with the projection that CLIPTextModelWithProjection has."""
    layer = "text_model.encoder.layers.{i}"
    tables = "text_model.embeddings.(token_embedding|position_embedding)"
    layers = (
        Embedding(tables, "embedding", ("embed", "position"), component),
        Linear(f"{layer}.self_attn.(q_proj|k_proj|v_proj|out_proj)", "attention", _ROLES, component),
        Linear(f"{layer}.mlp.(fc1|fc2)", "mlp", ("up", "down"), component),
        Excluded(f"{layer}.(layer_norm1|layer_norm2)", "norm", component=component),
        Excluded("text_model.final_layer_norm", "norm", component=component),
    )
    return (*layers, Linear("text_projection", "projection", ("projection",), component)) if projection else layers


#: one table under two names
T5_TIED = (("shared", "encoder.embed_tokens"),)


def t5(component: str) -> TextLayers:
    """Return the layers of T5EncoderModel with a gated feed-forward: T5 1.1 XXL, UMT5, ByT5."""
    layer = "encoder.block.{i}.layer"
    return (
        Embedding("(shared|encoder.embed_tokens)", "embedding", ("embed",), component),
        Linear(f"{layer}.0.SelfAttention.(q|k|v|o)", "attention", _ROLES, component),
        Linear(f"{layer}.1.DenseReluDense.(wi_0|wi_1|wo)", "mlp", ("gate", "up", "down"), component),
        Excluded(f"{layer}.0.SelfAttention.relative_attention_bias", "position", component=component),
    )


def decoder(component: str, start: str = "") -> TextLayers:
    """Return the layers of a language model of Llama's names (Qwen 2 and 3, Gemma 2, Mistral); `start` is `model.`."""
    layer = start + "layers.{i}"
    return (
        Embedding(f"{start}embed_tokens", "embedding", ("embed",), component),
        Linear(f"{layer}.self_attn.(q_proj|k_proj|v_proj|o_proj)", "attention", _ROLES, component),
        Linear(f"{layer}.mlp.(gate_proj|up_proj|down_proj)", "mlp", ("gate", "up", "down"), component),
    )


_BLOCK, _LAYER = "transformer.resblocks.{i}", "text_model.encoder.layers.{i}"
#: CLIP as open_clip names it
OPEN_CLIP = (
    f"{_BLOCK}.attn.in_proj_weight = {_LAYER}.self_attn.(q_proj|k_proj|v_proj)",
    f"{_BLOCK}.attn.in_proj_bias = {_LAYER}.self_attn.(q_proj|k_proj|v_proj).bias",
    f"{_BLOCK}.attn.out_proj = {_LAYER}.self_attn.out_proj",
    f"{_BLOCK}.mlp.(c_fc|c_proj) = {_LAYER}.mlp.(fc1|fc2)",
    f"{_BLOCK}.(ln_1|ln_2) = {_LAYER}.(layer_norm1|layer_norm2)",
    "token_embedding = text_model.embeddings.token_embedding",
    "positional_embedding = text_model.embeddings.position_embedding.weight",
    "ln_final = text_model.final_layer_norm",
)
#: what the model with a projection has more: a parameter that holds the transpose
OPEN_CLIP_PROJECTION = ("text_projection = text_projection  @transpose",)
