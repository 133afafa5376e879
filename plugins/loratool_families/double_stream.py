"""The blocks of Flux and its relatives: some with a stream each for image and text, then some with one for both.

No plugin of its own: the families beside it build on it. diffusers splits what the authors' models fuse: q, k and v,
and in the single-stream blocks the first layer of the feed-forward with them. Sources: diffusers,
models/transformers/transformer_flux.py, transformer_hunyuan_video.py; black-forest-labs/flux, modules/layers.py.
"""

from loratool import Linear

COMPONENT = "transformer"
DOUBLE, SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_ROLES = ("q", "k", "v", "o")


def unlike(*widths: int) -> tuple[tuple[str, str], ...]:
    """Return the condition on shapes that the model is not of these widths, which others with these names are of."""
    return ((f"{DOUBLE}.attn.to_q", " and ".join(f"inp != {width}" for width in widths)),)


def counts(double: int, single: int = 0) -> tuple[tuple[str, int], ...]:
    """Return how many blocks of either kind a model has."""
    return (("transformer_blocks", double), *((("single_transformer_blocks", single),) if single else ()))


def linear(pattern: str, group: str, *roles: str) -> Linear:
    """Return a layer of the transformer."""
    return Linear(pattern, group, roles, COMPONENT)


def attention(attn: str = "attn") -> tuple[Linear, ...]:
    """Return the attention of the blocks with two streams."""
    return (
        linear(f"{DOUBLE}.{attn}.(to_q|to_k|to_v|to_out.0)", "attention", *_ROLES),
        linear(f"{DOUBLE}.{attn}.(add_q_proj|add_k_proj|add_v_proj|to_add_out)", "attention", *_ROLES),
    )


def feed_forward() -> tuple[Linear, ...]:
    """Return the feed-forwards of the blocks with two streams."""
    return (linear(f"{DOUBLE}.(ff|ff_context).net.(0.proj|2)", "mlp", "up", "down"),)


def single() -> tuple[Linear, ...]:
    """Return the layers of the blocks with one stream."""
    return (
        linear(f"{SINGLE}.attn.(to_q|to_k|to_v)", "attention", *_ROLES[:3]),
        linear(f"{SINGLE}.(proj_mlp|proj_out)", "mlp", "up", "down"),
    )


def modulation() -> tuple[Linear, ...]:
    """Return the modulations that each block has of its own."""
    return (
        linear(f"{DOUBLE}.(norm1|norm1_context).linear", "modulation", "image", "text"),
        linear(f"{SINGLE}.norm.linear", "modulation", "modulation"),
    )


def blocks() -> tuple[Linear, ...]:
    """Return everything that a block of either kind has in Flux.1 and HunyuanVideo."""
    return (*attention(), *feed_forward(), *single(), *modulation())


#: The rules of the blocks as black-forest-labs and ComfyUI name them; Chroma has no modulation.
ATTENTION_RULES = (
    f"double_blocks.{{i}}.img_attn.qkv = {DOUBLE}.attn.(to_q|to_k|to_v)",
    f"double_blocks.{{i}}.txt_attn.qkv = {DOUBLE}.attn.(add_q_proj|add_k_proj|add_v_proj)",
    f"double_blocks.{{i}}.(img|txt)_attn.proj = {DOUBLE}.attn.(to_out.0|to_add_out)",
    f"double_blocks.{{i}}.img_attn.norm.(query_norm|key_norm).scale = {DOUBLE}.attn.(norm_q|norm_k).weight",
    f"double_blocks.{{i}}.txt_attn.norm.(query_norm|key_norm).scale = {DOUBLE}.attn.(norm_added_q|norm_added_k).weight",
    f"single_blocks.{{i}}.norm.(query_norm|key_norm).scale = {SINGLE}.attn.(norm_q|norm_k).weight",
)
FEED_FORWARD_RULES = (
    f"double_blocks.{{i}}.(img|txt)_mlp.(0|2) = {DOUBLE}.(ff|ff_context).net.(0.proj|2)",
    f"single_blocks.{{i}}.linear1 = {SINGLE}.(attn.to_q:in|attn.to_k:in|attn.to_v:in|proj_mlp:4*in)",
    f"single_blocks.{{i}}.linear2 = {SINGLE}.proj_out",
)
MODULATION_RULES = (
    f"double_blocks.{{i}}.(img|txt)_mod.lin = {DOUBLE}.(norm1|norm1_context).linear",
    f"single_blocks.{{i}}.modulation.lin = {SINGLE}.norm.linear",
)
BLOCK_RULES = (*ATTENTION_RULES, *FEED_FORWARD_RULES, *MODULATION_RULES)
#: The last layer: the authors' modulation gives shift, then scale, and that of diffusers scale, then shift.
LAST_RULES = ("final_layer.linear = proj_out", "final_layer.adaLN_modulation.1 = norm_out.linear @swap2")
