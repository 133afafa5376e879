"""GPT-NeoX and Pythia: q, k and v of one head lie together (transformers: models/gpt_neox).

Files call the head embed_out; transformers 5 calls it lm_head in memory.
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, hookimpl, interleave_heads

_LAYER = "gpt_neox.layers.{i}"
_DIM = "hidden_size/num_attention_heads"
GPT_NEOX = Architecture(
    name="gpt-neox",
    match=Match(model_types=("gpt_neox",)),
    layers=(
        Embedding("gpt_neox.embed_in", group="embedding", roles=("embed",)),
        Linear(f"{_LAYER}.attention.(query_key_value|dense)", group="attention", roles=("qkv", "o")),
        Linear(f"{_LAYER}.mlp.(dense_h_to_4h|dense_4h_to_h)", group="mlp", roles=("up", "down")),
        Linear("(embed_out|score|classifier|qa_outputs)", group="head"),
    ),
    default_targets=("query_key_value",),
    fused=(
        Fused(
            f"{_LAYER}.attention.query_key_value",
            parts=("q", "k", "v"),
            layout=interleave_heads("num_attention_heads", _DIM, _DIM, _DIM),
        ),
    ),
    memory=("lm_head = embed_out",),
    prefixes={"": ("gpt_neox.",)},
    headless=("GPTNeoXModel",),
    tied=(("gpt_neox.embed_in", "embed_out"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """GPT-NeoX and Pythia."""
    return [GPT_NEOX]
