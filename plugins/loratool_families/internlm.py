"""InternLM 1, 7B and 20B (remote code: modeling_internlm.py): LLaMA's names; q, k, v and o have biases.

Without a config the vocabulary tells it from LLaMA.
"""

from loratool import Architecture, Match, hookimpl

INTERNLM = Architecture(
    name="internlm",
    like="llama",
    match=Match(model_types=("internlm",), shapes=(("model.embed_tokens", "inp == 103168"),)),
    default_targets=("q_proj", "v_proj"),
    headless=("InternLMModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """InternLM 1."""
    return [INTERNLM]
