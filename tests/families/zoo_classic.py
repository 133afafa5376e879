"""The classic decoders: GPT-2 and what came before and beside LLaMA's names (see zoo.py)."""

from zoo import Tiny, tiny

GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "n_inner": 48, "pad_token_id": 0}
GPTJ = GPT2 | {"rotary_dim": 4}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
PLAIN = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = PLAIN | {"num_key_value_heads": 2}
FALCON = {n: v for n, v in PLAIN.items() if n != "intermediate_size"} | {"ffn_hidden_size": 48}
NEO = PLAIN | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
NEO = {n: v for n, v in NEO.items() if n not in ("num_hidden_layers", "num_attention_heads")}
OPT = {n: v for n, v in PLAIN.items() if n != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32}
MPT = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}


def _heads(family: str, stem: str, config: str, settings: dict[str, object], *classes: str) -> list[Tiny]:
    return [tiny(family, stem + c, config, **{**SPECIAL, **settings}) for c in classes]


CAUSAL, SEQUENCE, TOKEN, QA = (
    f"For{task}" for task in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
)
TINY = [
    *_heads("gpt2", "GPT2", "GPT2Config", GPT2, "LMHeadModel", "DoubleHeadsModel", "Model", SEQUENCE, TOKEN, QA),
    *_heads("gpt2", "GPT2", "GPT2Config", GPT2 | {"add_cross_attention": True}, "LMHeadModel"),
    *_heads("gpt2", "GPT2", "GPT2Config", GPT2 | {"tie_word_embeddings": False}, "LMHeadModel"),
    *_heads("bloom", "Bloom", "BloomConfig", BLOOM, CAUSAL, "Model", SEQUENCE, TOKEN, QA),
    *_heads("falcon", "Falcon", "FalconConfig", FALCON, CAUSAL, "Model", SEQUENCE, TOKEN, QA),
    *_heads("falcon", "Falcon", "FalconConfig", FALCON | {"multi_query": False, "alibi": True, "bias": True}, CAUSAL),
    *_heads("falcon", "Falcon", "FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, CAUSAL),
    *_heads("phi", "Phi", "PhiConfig", GROUPED, CAUSAL, "Model", SEQUENCE, TOKEN),
    *_heads("phi", "Phi", "PhiConfig", GROUPED | {"qk_layernorm": True}, CAUSAL),
    *_heads("phi3", "Phi3", "Phi3Config", GROUPED, CAUSAL, "Model", SEQUENCE, TOKEN),
    *_heads("phi3", "Phi3", "Phi3Config", PLAIN | {"tie_word_embeddings": True}, CAUSAL),
    *_heads("gptj", "GPTJ", "GPTJConfig", GPTJ, CAUSAL, "Model", SEQUENCE, QA),
    *_heads("gpt-neo", "GPTNeo", "GPTNeoConfig", NEO, CAUSAL, "Model", SEQUENCE, TOKEN, QA),
    *_heads("gpt-neox", "GPTNeoX", "GPTNeoXConfig", PLAIN, CAUSAL, "Model", SEQUENCE, TOKEN, QA),
    *_heads("gpt-neox", "GPTNeoX", "GPTNeoXConfig", PLAIN | {"attention_bias": False}, CAUSAL),
    *_heads("codegen", "CodeGen", "CodeGenConfig", GPTJ, CAUSAL, "Model"),
    *_heads("opt", "OPT", "OPTConfig", OPT, CAUSAL, "Model", SEQUENCE, QA),
    *_heads("opt", "OPT", "OPTConfig", OPT | {"word_embed_proj_dim": 24}, CAUSAL),
    *_heads("mpt", "Mpt", "MptConfig", MPT, CAUSAL, "Model", SEQUENCE, TOKEN, QA),
    *_heads("gpt-bigcode", "GPTBigCode", "GPTBigCodeConfig", GPT2, CAUSAL, "Model", SEQUENCE, TOKEN),
    *_heads("gpt-bigcode", "GPTBigCode", "GPTBigCodeConfig", GPT2 | {"multi_query": False}, CAUSAL),
    *_heads(
        "gpt-bigcode",
        "GPTBigCode",
        "GPTBigCodeConfig",
        GPT2 | {"multi_query": False, "add_cross_attention": True},
        CAUSAL,
    ),
    *_heads("starcoder2", "Starcoder2", "Starcoder2Config", GROUPED, CAUSAL, "Model", SEQUENCE, TOKEN),
    *_heads("starcoder2", "Starcoder2", "Starcoder2Config", GROUPED | {"tie_word_embeddings": False}, CAUSAL),
    *_heads("stablelm", "StableLm", "StableLmConfig", GROUPED, CAUSAL, "Model", SEQUENCE, TOKEN),
    *_heads("stablelm", "StableLm", "StableLmConfig", GROUPED | {"qk_layernorm": True, "use_qkv_bias": True}, CAUSAL),
    *_heads("persimmon", "Persimmon", "PersimmonConfig", PLAIN, CAUSAL, "Model", SEQUENCE, TOKEN),
]
