"""CodeGen: four large blocks of queries, values and keys, in that order (transformers: models/codegen).

Otherwise it is GPT-J, and people convert it to that: the aliases are GPT-J's names.
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, blocks, hookimpl

CODEGEN = Architecture(
    name="codegen",
    match=Match(model_types=("codegen",)),
    layers=(
        Embedding("transformer.wte", group="embedding", roles=("embed",)),
        Linear("transformer.h.{i}.attn.(qkv_proj|out_proj)", group="attention", roles=("qkv", "o")),
        Linear("transformer.h.{i}.mlp.(fc_in|fc_out)", group="mlp", roles=("up", "down")),
        Linear("lm_head", group="head"),
    ),
    default_targets=("qkv_proj",),
    fused=(Fused("transformer.h.{i}.attn.qkv_proj", parts=("q", "v", "k"), layout=blocks(4, parts=3)),),
    aliases=("transformer.h.{i}.attn.(q_proj|v_proj|k_proj) = transformer.h.{i}.attn.qkv_proj[(q|v|k)]",),
    prefixes={"": ("transformer.",)},
    headless=("CodeGenModel",),
    tied=(("transformer.wte", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """CodeGen."""
    return [CODEGEN]
