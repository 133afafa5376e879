"""Qwen 3, dense, with LLaMA's names (transformers: models/qwen3), and the text model of Qwen3-VL alone."""

from loratool import Architecture, Match, hookimpl

QWEN3 = Architecture(
    name="qwen3",
    like="llama",
    match=Match(model_types=("qwen3", "qwen3_vl_text")),
    headless=("Qwen3Model", "Qwen3VLTextModel"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen 3."""
    return [QWEN3]
