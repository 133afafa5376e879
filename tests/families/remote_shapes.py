"""What checkpoints of remote-code families hold: names and shapes from the published module structures.

Each function below follows the modules of one modeling file and takes that file's config keys. SAMPLES are small
configs, with sizes that all differ, and the configs of published models (their depth is cut to two layers here).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]
LAYERS = range(2)


def _llama_like(c: Config, attention: Shapes, head: str = "lm_head") -> Shapes:
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    shapes: Shapes = {"model.embed_tokens": (vocab, hidden)}
    for n in LAYERS:
        shapes |= {f"model.layers.{n}.self_attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{n}.mlp.{name}": (inner, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"model.layers.{n}.mlp.down_proj"] = (hidden, inner)
    return shapes | {head: (c.get("num_labels", vocab), hidden)}


def _split(c: Config, head: str = "lm_head") -> Shapes:
    """InternLM 1 and 3, XVERSE, Yi: separate q, k, v."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    dim = c.get("head_dim", hidden // heads)
    kv = c.get("num_key_value_heads", heads) * dim
    attention = {"q_proj": (heads * dim, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    return _llama_like(c, attention | {"o_proj": (hidden, heads * dim)}, head)


def baichuan(c: Config) -> Shapes:
    hidden = c["hidden_size"]
    return _llama_like(c, {"W_pack": (3 * hidden, hidden), "o_proj": (hidden, hidden)})


def _prefix_encoder(c: Config, size: int, width: int) -> Shapes:
    if not c.get("pre_seq_len"):
        return {}
    name, entries = "transformer.prefix_encoder", c["pre_seq_len"]
    if not c.get("prefix_projection"):
        return {f"{name}.embedding": (entries, size)}
    hidden = c["hidden_size"]
    return {
        f"{name}.embedding": (entries, width),
        f"{name}.trans.0": (hidden, width),
        f"{name}.trans.2": (size, hidden),
    }


def chatglm(c: Config) -> Shapes:
    hidden, inner, vocab = c["hidden_size"], c["inner_hidden_size"], c["vocab_size"]
    shapes: Shapes = {"transformer.word_embeddings": (vocab, hidden)}
    for n in LAYERS:
        shapes |= {
            f"transformer.layers.{n}.attention.query_key_value": (3 * hidden, hidden),
            f"transformer.layers.{n}.attention.dense": (hidden, hidden),
            f"transformer.layers.{n}.mlp.dense_h_to_4h": (inner, hidden),
            f"transformer.layers.{n}.mlp.dense_4h_to_h": (hidden, inner),
        }
    return shapes | {"lm_head": (vocab, hidden)} | _prefix_encoder(c, 2 * len(LAYERS) * hidden, hidden)


def chatglm2(c: Config) -> Shapes:
    hidden, inner, vocab = c["hidden_size"], c["ffn_hidden_size"], c["padded_vocab_size"]
    width = c["kv_channels"] * c["num_attention_heads"]
    kv = c["multi_query_group_num"] * c["kv_channels"] if c["multi_query_attention"] else width
    shapes: Shapes = {"transformer.embedding.word_embeddings": (vocab, hidden)}
    for n in LAYERS:
        shapes |= {
            f"transformer.encoder.layers.{n}.self_attention.query_key_value": (width + 2 * kv, hidden),
            f"transformer.encoder.layers.{n}.self_attention.dense": (hidden, width),
            f"transformer.encoder.layers.{n}.mlp.dense_h_to_4h": (2 * inner, hidden),
            f"transformer.encoder.layers.{n}.mlp.dense_4h_to_h": (hidden, inner),
        }
    shapes["transformer.output_layer"] = (vocab, hidden)
    size = 2 * len(LAYERS) * kv
    return shapes | _prefix_encoder(c, size, size) | _classifier(c, "classifier_head")


def _classifier(c: Config, name: str) -> Shapes:
    return {name: (c["num_labels"], c["hidden_size"])} if "num_labels" in c else {}


def internlm2(c: Config) -> Shapes:
    hidden, inner, vocab, heads = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_attention_heads"]
    qkv = (heads + 2 * c["num_key_value_heads"]) * (hidden // heads)
    shapes: Shapes = {"model.tok_embeddings": (vocab, hidden)}
    for n in LAYERS:
        shapes |= {
            f"model.layers.{n}.attention.wqkv": (qkv, hidden),
            f"model.layers.{n}.attention.wo": (hidden, hidden),
            f"model.layers.{n}.feed_forward.w1": (inner, hidden),
            f"model.layers.{n}.feed_forward.w3": (inner, hidden),
            f"model.layers.{n}.feed_forward.w2": (hidden, inner),
        }
    task = c["architectures"][0].removeprefix("InternLM2For")
    heads_of = {"CausalLM": ("output", vocab), "RewardModel": ("v_head", 1)}
    name, out = heads_of.get(task, ("qa_outputs" if task == "QuestionAnswering" else "score", 2))
    return shapes | {name: (out, hidden)}


def _phi(c: Config, block: str, first: int, embedding: str, head: str) -> Shapes:
    hidden, inner, vocab = c["n_embd"], c["n_inner"] or 4 * c["n_embd"], c["vocab_size"]
    qkv = (c["n_head"] + 2 * (c.get("n_head_kv") or c["n_head"])) * (hidden // c["n_head"])
    shapes: Shapes = {embedding: (vocab, hidden)}
    for n in range(first, first + len(LAYERS)):
        shapes |= {
            f"{block}.{n}.mixer.Wqkv": (qkv, hidden),
            f"{block}.{n}.mixer.out_proj": (hidden, hidden),
            f"{block}.{n}.mlp.fc1": (inner, hidden),
            f"{block}.{n}.mlp.fc2": (hidden, inner),
        }
    return shapes | {head: (vocab, hidden)}


def mixformer(c: Config) -> Shapes:
    """One Sequential: the embedding is its element 0, the head its last."""
    return _phi(c, "layers", 1, "layers.0.wte", f"layers.{len(LAYERS) + 1}.linear")


def phi_msft(c: Config) -> Shapes:
    return _phi(c, "transformer.h", 0, "transformer.embd.wte", "lm_head.linear")


def phi3small(c: Config) -> Shapes:
    hidden, inner, vocab = c["hidden_size"], c["ff_intermediate_size"], c["vocab_size"]
    qkv = (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * (hidden // c["num_attention_heads"])
    shapes: Shapes = {"model.embed_tokens": (vocab, hidden)}
    for n in LAYERS:
        shapes |= {
            f"model.layers.{n}.self_attn.query_key_value": (qkv, hidden),
            f"model.layers.{n}.self_attn.dense": (hidden, hidden),
            f"model.layers.{n}.mlp.up_proj": (2 * inner, hidden),
            f"model.layers.{n}.mlp.down_proj": (hidden, inner),
        }
    return shapes | (_classifier(c, "score") or {"lm_head": (vocab, hidden)})


def qwen(c: Config) -> Shapes:
    hidden, half, vocab = c["hidden_size"], c["intermediate_size"] // 2, c["vocab_size"]
    shapes: Shapes = {"transformer.wte": (vocab, hidden)}
    for n in LAYERS:
        shapes |= {
            f"transformer.h.{n}.attn.c_attn": (3 * hidden, hidden),
            f"transformer.h.{n}.attn.c_proj": (hidden, hidden),
            f"transformer.h.{n}.mlp.w1": (half, hidden),
            f"transformer.h.{n}.mlp.w2": (half, hidden),
            f"transformer.h.{n}.mlp.c_proj": (hidden, half),
        }
    return shapes | {"lm_head": (vocab, hidden)}


class Sample(NamedTuple):
    """A config, the family that it belongs to, and the module structure that it configures."""

    label: str
    family: str
    structure: Callable[[Config], Shapes]
    config: Config

    @property
    def shapes(self) -> Shapes:
        """Shapes of the weights by module path."""
        return self.structure(self.config)


def _config(model_type: str, cls: str, **keys: Any) -> Config:
    return {"model_type": model_type, "architectures": [cls], **keys}


def _sized(hidden: int, inner: int, heads: int, vocab: int, **keys: Any) -> Config:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "vocab_size": vocab}
    return {**sizes, "num_hidden_layers": 2, **keys}


_BAICHUAN = ("baichuan", "BaichuanForCausalLM")
_GLM6 = {"num_layers": 2, "position_encoding_2d": True, "layernorm_epsilon": 1e-05, "max_sequence_length": 2048}
_GLM2 = {
    "num_layers": 2, "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "original_rope": True, "post_layer_norm": True, "rmsnorm": True, "tie_word_embeddings": False,
}  # fmt: skip
_PHI = {"n_inner": None, "n_layer": 2, "n_positions": 2048, "rotary_dim": 32, "tie_word_embeddings": False}


def _glm6(hidden: int, inner: int, heads: int, vocab: int, **keys: Any) -> Config:
    sizes = {"hidden_size": hidden, "inner_hidden_size": inner, "num_attention_heads": heads, "vocab_size": vocab}
    return _config("chatglm", "ChatGLMModel", **sizes, **_GLM6, **keys)


def _glm2(hidden: int, inner: int, heads: int, vocab: int, groups: int, **keys: Any) -> Config:
    sizes = {"hidden_size": hidden, "ffn_hidden_size": inner, "num_attention_heads": heads, "padded_vocab_size": vocab}
    mine = {"multi_query_attention": True, "multi_query_group_num": groups, "kv_channels": 128}
    return _config("chatglm", "ChatGLMModel", **{**sizes, **_GLM2, **mine, **keys})


def _internlm2(task: str, **sizes: Any) -> Config:
    return _config("internlm2", f"InternLM2For{task}", bias=False, **sizes)


_SMALL2 = _sized(24, 20, 4, 50, num_key_value_heads=2)
_SMALL3 = {"hidden_size": 24, "ff_intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 2}
_SMALL3 |= {"vocab_size": 50, "hidden_act": "gegelu", "gegelu_limit": 20.0}

SAMPLES = (
    Sample("Baichuan-7B", "baichuan", baichuan, _config(
        "baichuan", "BaiChuanForCausalLM", **_sized(4096, 11008, 32, 64000, max_position_embeddings=4096))),
    Sample("Baichuan-13B", "baichuan", baichuan, _config(
        *_BAICHUAN, **_sized(5120, 13696, 40, 64000, model_max_length=4096))),
    Sample("small Baichuan", "baichuan", baichuan, _config(*_BAICHUAN, **_sized(24, 20, 4, 50))),
    Sample("Baichuan2-7B", "baichuan2", baichuan, _config(
        *_BAICHUAN, **_sized(4096, 11008, 32, 125696, max_position_embeddings=4096, z_loss_weight=0))),
    Sample("Baichuan2-13B", "baichuan2", baichuan, _config(
        *_BAICHUAN, **_sized(5120, 13696, 40, 125696, model_max_length=4096, tie_word_embeddings=False))),
    Sample("small Baichuan2", "baichuan2", baichuan, _config(*_BAICHUAN, **_sized(24, 20, 4, 125696))),
    Sample("ChatGLM-6B", "chatglm", chatglm, _glm6(4096, 16384, 32, 130528)),
    Sample("ChatGLM-6B first vocabulary", "chatglm", chatglm, _glm6(4096, 16384, 32, 150528)),
    Sample("small ChatGLM", "chatglm", chatglm, _glm6(24, 20, 4, 50, pre_seq_len=8)),
    Sample("small ChatGLM prefix", "chatglm", chatglm, _glm6(24, 20, 3, 50, pre_seq_len=8, prefix_projection=True)),
    Sample("ChatGLM2-6B", "chatglm2", chatglm2, _glm2(4096, 13696, 32, 65024, 2)),
    Sample("ChatGLM3-6B", "chatglm2", chatglm2, _glm2(4096, 13696, 32, 65024, 2, classifier_dropout=None)),
    Sample("GLM-4-9B", "chatglm2", chatglm2, _glm2(4096, 13696, 32, 151552, 2, rope_ratio=500)),
    Sample("small ChatGLM2", "chatglm2", chatglm2, _glm2(24, 20, 4, 50, 2, kv_channels=7, num_labels=3)),
    Sample("small ChatGLM2 by head", "chatglm2", chatglm2, _glm2(
        24, 20, 4, 50, 1, kv_channels=7, multi_query_attention=False, pre_seq_len=8, prefix_projection=True)),
    Sample("InternLM-7B", "internlm", _split, _config(
        "internlm", "InternLMForCausalLM", **_sized(4096, 11008, 32, 103168, bias=True))),
    Sample("InternLM-20B", "internlm", _split, _config(
        "internlm", "InternLMForCausalLM", **_sized(5120, 13824, 40, 103168, bias=False))),
    Sample("InternLM2-7B", "internlm2", internlm2, _internlm2(
        "CausalLM", **_sized(4096, 14336, 32, 92544, num_key_value_heads=8))),
    Sample("InternLM2.5-20B", "internlm2", internlm2, _internlm2(
        "CausalLM", **_sized(6144, 16384, 48, 92544, num_key_value_heads=8, pretraining_tp=1))),
    Sample("InternLM2-7B-reward", "internlm2", internlm2, _internlm2(
        "RewardModel", **_sized(4096, 14336, 32, 92544, num_key_value_heads=8, reward_token_id=92527))),
    Sample("small InternLM2", "internlm2", internlm2, _internlm2("CausalLM", **_SMALL2)),
    Sample("small InternLM2 classifier", "internlm2", internlm2, _internlm2("SequenceClassification", **_SMALL2)),
    Sample("small InternLM2 span", "internlm2", internlm2, _internlm2("QuestionAnswering", **_SMALL2)),
    Sample("InternLM3-8B", "internlm3", _split, _config(
        "internlm3", "InternLM3ForCausalLM", **_sized(4096, 10240, 32, 128512, num_key_value_heads=2, head_dim=128))),
    Sample("XVERSE-13B", "xverse", _split, _config("xverse", "XverseForCausalLM", **_sized(5120, 13824, 40, 100278))),
    Sample("Yi-6B", "yi", _split, _config(
        "Yi", "YiForCausalLM", **_sized(4096, 11008, 32, 64000, num_key_value_heads=4))),
    Sample("Phi-1.5", "phi-old", mixformer, _config(
        "mixformer-sequential", "MixFormerSequentialForCausalLM", n_embd=2048, n_head=32, vocab_size=51200, **_PHI)),
    Sample("small MixFormer", "phi-old", mixformer, _config(
        "mixformer-sequential", "MixFormerSequentialForCausalLM",
        **{**_PHI, "n_embd": 24, "n_head": 4, "n_head_kv": 2, "vocab_size": 50, "n_inner": 20})),
    Sample("Phi-2", "phi-msft", phi_msft, _config(
        "phi-msft", "PhiForCausalLM", n_embd=2560, n_head=32, n_head_kv=None, vocab_size=51200, **_PHI)),
    Sample("small Phi", "phi-msft", phi_msft, _config(
        "phi-msft", "PhiForCausalLM",
        **{**_PHI, "n_embd": 24, "n_head": 4, "n_head_kv": 2, "vocab_size": 50, "n_inner": 20})),
    Sample("Phi-3-small", "phi3small", phi3small, _config(
        "phi3small", "Phi3SmallForCausalLM", hidden_size=4096, ff_intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=100352)),
    Sample("small Phi-3-small", "phi3small", phi3small, _config("phi3small", "Phi3SmallForCausalLM", **_SMALL3)),
    Sample("small Phi-3-small classifier", "phi3small", phi3small, _config(
        "phi3small", "Phi3SmallForSequenceClassification", num_labels=3, **_SMALL3)),
    Sample("Qwen-7B", "qwen", qwen, _config(
        "qwen", "QWenLMHeadModel", **_sized(4096, 22016, 32, 151936, kv_channels=128, no_bias=True))),
    Sample("Qwen-72B", "qwen", qwen, _config(
        "qwen", "QWenLMHeadModel", **_sized(8192, 49152, 64, 152064, kv_channels=128, no_bias=True))),
    Sample("small Qwen", "qwen", qwen, _config("qwen", "QWenLMHeadModel", **_sized(24, 40, 4, 50, kv_channels=6))),
)  # fmt: skip
