"""What two models say: base with a live adapter against the merged model, by transformers and PEFT, in fp32.

This is the one check of a merge in which no code of loratool computes either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from loratool.adapter import Weighted
from loratool.discovery import shapes_from_config
from loratool.errors import LoratoolError
from loratool.storage import checkpoint
from loratool.storage.location import place
from loratool.storage.remote import is_here

TOKENS = 16
TOLERANCE = 0.1  # of the spread: two roundings to bfloat16 of a whole model stay well below


def compare(base: str, adapters: Sequence[Weighted], merged: str, memory: int) -> tuple[float, str]:
    """Return the largest difference of the logits relative to their spread, or why they cannot be compared.

    `memory` (bytes) bounds both models in fp32. Weights other than 1, several adapters, and modules left out are
    things that PEFT does otherwise; remote code is never run.
    """
    why_not = _obstacle(base, adapters, memory)
    if why_not:
        return 0.0, why_not
    import torch

    try:
        with torch.no_grad(), _without_bars():
            live = _logits(base, str(place(adapters[0].adapter.origin.path)))
            ours = _logits(merged, "")
    except Exception as problem:  # of a library that does not know this kind of model, or wants other inputs
        return 0.0, f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
    return float((live - ours).abs().max() / live.std()), ""


@contextmanager
def _without_bars() -> Iterator[None]:
    """Silence the bars of transformers while models are loaded, and leave its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _obstacle(base: str, adapters: Sequence[Weighted], memory: int) -> str:
    if not find_spec("transformers") or not find_spec("peft"):
        return "transformers and peft are not both installed"
    if len(adapters) != 1 or adapters[0].weight != 1 or adapters[0].scales or adapters[0].adapter.skipped:
        return "only one whole adapter at weight 1 has a counterpart in PEFT"
    adapter = adapters[0].adapter
    if any(name.startswith("initial ") for name in adapter.tensors):
        return "PEFT draws what a PiSSA-like adapter started from anew when it loads it"
    if adapter.origin.format != "peft" or not place(adapter.origin.path).is_dir():
        return "PEFT opens folders in its own format"
    if not (is_here(Path(base)) and is_here(place(adapter.origin.path))):
        return "transformers opens local files, and --stream left these on the Hub"
    if not Path(base, "config.json").is_file():
        return "the base has no config.json"
    opened = checkpoint.open_base(base, allow_pickle=True)  # it has been opened before, as the user allowed
    if not (opened.config or {}).get("model_type") or opened.quantised:
        return "transformers would not load this base in fp32 as it is"
    described = _shapes(opened.config or {})
    if any(described.get(name, ref.shape) != ref.shape for name, ref in opened.tensors.items()) or not described:
        return "config.json does not describe these weights"
    size = 4 * 2 * sum(map(prod, described.values()))
    return f"two models of {size // 2:,} bytes do not fit into --max-memory" if size > memory else ""


def _shapes(config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Return the weights of the model that transformers would make of a config: on the meta device, without any."""
    try:
        return shapes_from_config(config)
    except LoratoolError:
        return {}


def _logits(folder: str, adapter: str) -> Any:
    """Return what a model says to some tokens, with the adapter at work where one is given."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = [c for c in config.architectures or [] if hasattr(transformers, c)]
    model_class = getattr(transformers, names[0]) if names else transformers.AutoModel
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.arange(TOKENS)[None] * 7919 % vocabulary
    inputs = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    return next(v for v in model(input_ids=tokens, **inputs).values() if isinstance(v, torch.Tensor))
