"""GPT-2: Conv1D layers (weights stored (in, out)), fused q|k|v columns, a tied head (transformers: models/gpt2).

Files on the Hub omit the leading `transformer.`; files that save_pretrained writes have it.
"""

from loratool import Architecture, Conv1D, Embedding, Fused, Linear, Match, concat, hookimpl

_WIDTH = "n_embd|hidden_size"
GPT2 = Architecture(
    name="gpt2",
    match=Match(model_types=("gpt2",), shapes=(("transformer.h.{i}.attn.c_attn", "out == 3*inp"),)),
    layers=(
        Embedding("transformer.(wte|wpe)", group="embedding", roles=("embed", "position")),
        Conv1D("transformer.h.{i}.attn.(c_attn|c_proj)", group="attention", roles=("qkv", "o")),
        Conv1D("transformer.h.{i}.crossattention.(q_attn|c_attn|c_proj)", group="attention", roles=("q", "kv", "o")),
        Conv1D("transformer.h.{i}.mlp.(c_fc|c_proj)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|score|classifier|qa_outputs)", group="head"),
        Linear("multiple_choice_head.summary", group="head"),
    ),
    default_targets=("c_attn",),
    fused=(
        Fused("transformer.h.{i}.attn.c_attn", parts=("q", "k", "v"), layout=concat(_WIDTH, _WIDTH, _WIDTH)),
        Fused("transformer.h.{i}.crossattention.c_attn", parts=("k", "v"), layout=concat(_WIDTH, _WIDTH)),
    ),
    prefixes={"": ("transformer.",)},
    headless=("GPT2Model",),
    tied=(("transformer.wte", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """GPT-2 and its distillations."""
    return [GPT2]
