"""InternLM3 (transformers: models/internlm3, which builds LLaMA's classes; remote code: modeling_internlm3.py).

Without a config the vocabulary tells it from LLaMA.
"""

from loratool import Architecture, Match, hookimpl

INTERNLM3 = Architecture(
    name="internlm3",
    like="llama",
    match=Match(model_types=("internlm3",), shapes=(("model.embed_tokens", "inp == 128512"),)),
    default_targets=("q_proj", "v_proj"),
    headless=("LlamaModel", "InternLM3Model"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """InternLM3."""
    return [INTERNLM3]
