"""Decoders that are dense: LLaMA's names and relatives (see zoo.py)."""

from zoo import tiny

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

TINY = [
    tiny("llama", "LlamaForCausalLM", "LlamaConfig", **SIZES),
    tiny("llama", "LlamaForSequenceClassification", "LlamaConfig", **SIZES),
    tiny("llama", "LlamaModel", "LlamaConfig", **SIZES),
]
