"""The family of examples/from_scratch.py's model, as a plugin: `loratool arch show -p review_classifier.py base`."""

from loratool import Architecture, Embedding, Linear, Match, hookimpl

REVIEWS = Architecture(
    name="review_classifier",
    match=Match(model_types=("review_classifier",)),
    layers=(
        Embedding("embedding", group="embedding"),
        Linear("hidden.{i}", group="mlp"),
        Linear("head", group="head"),
    ),
    default_targets=("hidden.*",),
)


@hookimpl
def register_architectures():
    """Return the one family."""
    return [REVIEWS]
