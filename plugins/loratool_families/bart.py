"""BART and what shares its names: mBART, PLBART, Blenderbot, Marian, Pegasus, M2M100 (transformers: models/bart, ...).

The tables of positions carry no adapter: their modules take token ids and look up positions (BART), or they are
constants (Marian, Pegasus). A decoder alone (BartForCausalLM) has the names of the whole.
"""

from loratool import Architecture, Embedding, Excluded, Linear, Match, hookimpl

_ATTENTION, _ROLES = "(q_proj|k_proj|v_proj|out_proj)", ("q", "k", "v", "o")
_SIDES = "model.(encoder|decoder)"
BART = Architecture(
    name="bart",
    match=Match(
        model_types=("bart", "mbart", "plbart", "blenderbot", "blenderbot-small", "marian", "pegasus", "m2m_100")
    ),
    layers=(
        Embedding("(model.shared|model.encoder.embed_tokens|model.decoder.embed_tokens)", "embedding", ("embed",)),
        Excluded(f"{_SIDES}.embed_positions", group="position"),
        Linear(f"{_SIDES}.layers.{{i}}.self_attn.{_ATTENTION}", group="attention", roles=_ROLES),
        Linear(f"model.decoder.layers.{{i}}.encoder_attn.{_ATTENTION}", group="attention", roles=_ROLES),
        Linear(f"{_SIDES}.layers.{{i}}.(fc1|fc2)", group="mlp", roles=("up", "down")),
        Linear("(lm_head|qa_outputs)", group="head"),
        Linear("classification_head.(dense|out_proj)", group="head", roles=("dense", "classifier")),
        Excluded("final_logits_bias", group="bias"),
    ),
    default_targets=("q_proj", "v_proj"),
    prefixes={"": ("model.",)},
    headless=(
        "BartModel",
        "MBartModel",
        "PLBartModel",
        "BlenderbotModel",
        "BlenderbotSmallModel",
        "MarianModel",
        "PegasusModel",
        "M2M100Model",
    ),
    tied=(("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """BART and the families that share its names."""
    return [BART]
