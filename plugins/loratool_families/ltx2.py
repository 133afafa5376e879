"""LTX-2: LTX-Video with sound, a second stream in each block, and connectors between text encoder and transformer.

Sources: diffusers, models/transformers/transformer_ltx2.py, pipelines/ltx2/connectors.py and
scripts/convert_ltx2_to_diffusers.py. LTX-2.3 gates the attention and modulates the prompt. In a file of the original
spelling the connectors have the leading elements of the transformer, and the projections of the text have none.
"""

from loratool import Architecture, Excluded, Labels, Linear, Match, Named, hookimpl

_C, _CONNECTORS = "transformer", "connectors"
_BLOCK, _ROLES = "transformer_blocks.{i}", ("q", "k", "v", "o", "gate")
_ATTENTION = "(attn1|attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn)"
_QKVO = "(to_q|to_k|to_v|to_out.0|to_gate_logits)"
_TABLES = "(scale_shift_table|audio_scale_shift_table)"
_SCALE = "cross_attn_scale_shift_table"
_TIMES = (  # in the original, in diffusers
    "(adaln_single|audio_adaln_single|prompt_adaln_single|audio_prompt_adaln_single)",
    "(time_embed|audio_time_embed|prompt_adaln|audio_prompt_adaln)",
)
_CROSS = (
    "av_ca_(video_scale_shift|audio_scale_shift|a2v_gate|v2a_gate)_adaln_single",
    "av_cross_attn_(video_scale_shift|audio_scale_shift|video_a2v_gate|audio_v2a_gate)",
)
_TIMED = "emb.timestep_embedder.(linear_1|linear_2)"
_NATIVE = (
    "(patchify_proj|audio_patchify_proj) = (proj_in|audio_proj_in)",
    f"{_TIMES[0]}.** = {_TIMES[1]}.**",
    f"{_CROSS[0]}.** = {_CROSS[1]}.**",
    f"{_BLOCK}.{_ATTENTION}.(q_norm|k_norm) = {_BLOCK}.{_ATTENTION}.(norm_q|norm_k)",
    f"{_BLOCK}.scale_shift_table_a2v_ca_(video|audio) = {_BLOCK}.(video|audio)_a2v_{_SCALE}",
)
_CONNECTOR, _OLD = "(video|audio)_connector", "diffusion_model.(video|audio)_embeddings_connector"
_CONNECTORS_NATIVE = (
    f"{_OLD}.transformer_1d_blocks.{{i}}.attn1.(q_norm|k_norm) = "
    f"{_CONNECTOR}.transformer_blocks.{{i}}.attn1.(norm_q|norm_k)",
    f"{_OLD}.transformer_1d_blocks.{{i}}.attn1.{_QKVO} = {_CONNECTOR}.transformer_blocks.{{i}}.attn1.{_QKVO}",
    f"{_OLD}.transformer_1d_blocks.{{i}}.ff.net.(0.proj|2) = {_CONNECTOR}.transformer_blocks.{{i}}.ff.net.(0.proj|2)",
    f"{_OLD}.learnable_registers = {_CONNECTOR}.learnable_registers",
    "text_embedding_projection.(aggregate|video_aggregate|audio_aggregate)_embed = "
    "(text_proj_in|video_text_proj_in|audio_text_proj_in)",
)
LTX2 = Architecture(
    name="ltx2",
    match=Match(
        classes=("LTX2VideoTransformer3DModel", "LTX2TextConnectors"),
        # not the widths of others with these names: Cosmos, PixArt, LTX-Video, Sana
        shapes=(
            (f"{_BLOCK}.attn1.to_q", "inp != 1152 and inp != 2048 and inp != 2240"),
            (f"{_BLOCK}.attn2.to_k", "inp == out"),
        ),
        metadata=("ltx2",),
    ),
    layers=(
        Linear(f"{_BLOCK}.{_ATTENTION}.{_QKVO}", "attention", _ROLES, _C),
        Linear(f"{_BLOCK}.(ff|audio_ff).net.(0.proj|2)", "mlp", ("up", "down"), _C),
        Linear("(proj_in|audio_proj_in)", "other", ("video", "audio"), _C),
        Linear("(caption_projection|audio_caption_projection).(linear_1|linear_2)", "other", ("up", "down"), _C),
        Linear(f"{_TIMES[1]}.{_TIMED}", "other", ("up", "down"), _C),
        Linear(f"{_CROSS[1]}.{_TIMED}", "other", ("up", "down"), _C),
        Linear(f"{_TIMES[1]}.linear", "modulation", ("time",), _C),
        Linear(f"{_CROSS[1]}.linear", "modulation", ("time",), _C),
        Linear("(proj_out|audio_proj_out)", "head", ("video", "audio"), _C),
        Excluded(f"{_BLOCK}.(video|audio)_a2v_{_SCALE}", "modulation", component=_C),
        Excluded(f"{_BLOCK}.(prompt|audio_prompt)_scale_shift_table", "modulation", component=_C),
        Excluded(f"{_BLOCK}.{_TABLES}", "modulation", component=_C),
        Excluded(_TABLES, "modulation", component=_C),
        Excluded("keyframes_abs_pos_embedding", "position", component=_C),
        Linear(f"{_CONNECTOR}.transformer_blocks.{{i}}.attn1.{_QKVO}", "attention", _ROLES, _CONNECTORS),
        Linear(f"{_CONNECTOR}.transformer_blocks.{{i}}.ff.net.(0.proj|2)", "mlp", ("up", "down"), _CONNECTORS),
        Linear("(text|video_text|audio_text)_proj_in", "projection", ("text", "video", "audio"), _CONNECTORS),
        Excluded(f"{_CONNECTOR}.learnable_registers", "token", component=_CONNECTORS),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    labels=Labels("ltx2"),
    named={
        _C: Named(
            "lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=_NATIVE,
            flat="native",
        ),
        _CONNECTORS: Named("lora_unet", checkpoint=("model.",), native=_CONNECTORS_NATIVE),
    },
    ignored=("vae.", "audio_vae.", "vocoder."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """LTX-2: transformer and connectors."""
    return [LTX2]
