"""Whisper (transformers: models/whisper): BART's blocks behind two convolutions over time.

The tables of positions carry no adapter: the encoder's is a constant, the decoder's module is not called with
positions. WhisperForAudioClassification is the encoder without the leading `model.`.
"""

from loratool import Architecture, Conv1d, Embedding, Excluded, Linear, Match, hookimpl

_ATTENTION, _ROLES = "(q_proj|k_proj|v_proj|out_proj)", ("q", "k", "v", "o")
_SIDES = "model.(encoder|decoder)"
WHISPER = Architecture(
    name="whisper",
    match=Match(model_types=("whisper",)),
    layers=(
        Conv1d("model.encoder.(conv1|conv2)", group="conv"),
        Embedding("model.decoder.embed_tokens", group="embedding", roles=("embed",)),
        Excluded(f"{_SIDES}.embed_positions", group="position"),
        Linear(f"{_SIDES}.layers.{{i}}.self_attn.{_ATTENTION}", group="attention", roles=_ROLES),
        Linear(f"model.decoder.layers.{{i}}.encoder_attn.{_ATTENTION}", group="attention", roles=_ROLES),
        Linear(f"{_SIDES}.layers.{{i}}.(fc1|fc2)", group="mlp", roles=("up", "down")),
        Linear("(proj_out|projector|classifier)", group="head", roles=("head", "projector", "classifier")),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("model.",)},
    headless=("WhisperModel", "WhisperForAudioClassification"),
    tied=(("model.decoder.embed_tokens", "proj_out"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Whisper with any head, or none."""
    return [WHISPER]
