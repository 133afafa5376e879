"""The model card of a merged model: what it was made of, in a form that people and the Hugging Face Hub read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from loratool.adapter import Weighted
from loratool.plan import TextFile
from loratool.storage.checkpoint import Checkpoint

_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def card(base: Checkpoint, adapters: Sequence[Weighted], merged_into: str, dtype: str) -> TextFile:
    """Return README.md. Paths of this machine stay out of it: a folder is called by its last name.

    `merged_into` says what the base was when the deltas were added: decoded, or as trained.
    """
    named = [str((base.config or {}).get("_name_or_path") or ""), *(a.adapter.base_model for a in adapters)]
    hub = next((name for name in named if _HUB_NAME.fullmatch(name)), "")
    front = [f"base_model: {json.dumps(hub)}"] if hub else []
    front += ["tags:", "- lora", "- merged", "- loratool"]
    lines = ["---", *front, "---", "", "# Merged model", ""]
    lines += [f"- Base: `{_called(hub or base.path)}`{f', {merged_into}' if merged_into else ''}"]
    for one in adapters:
        scales = "".join(f", {pattern}: x {scale:g}" for pattern, scale in one.scales)
        lines.append(f"- Adapter: `{_called(one.adapter.origin.path)}`, weight {one.weight:g}{scales}")
    how = "the base's own dtypes" if dtype == "keep" else dtype
    lines += [f"- Written in {how}; sums in fp32 or wider, rounded once, by loratool.", ""]
    return TextFile("README.md", "\n".join(lines))


def _called(path: str) -> str:
    """A source as a card may show it: no folders of this machine, nothing that markdown would read."""
    name = path if _HUB_NAME.fullmatch(path) and not Path(path).exists() else Path(path).name or path
    return re.sub(r"[^\w./ -]", "_", name)[:200]
