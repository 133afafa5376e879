"""Qwen 2 and 2.5 with LLaMA's names (transformers: models/qwen2), and the text models of Qwen2-VL and 2.5-VL alone."""

from loratool import Architecture, Match, hookimpl

QWEN2 = Architecture(
    name="qwen2",
    like="llama",
    match=Match(model_types=("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")),
    headless=("Qwen2Model", "Qwen2VLTextModel", "Qwen2_5_VLTextModel"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen 2 and 2.5."""
    return [QWEN2]
