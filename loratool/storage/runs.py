"""What trainers and publishers leave beside a model's weights, told by the names of files alone: nothing is opened.

A run folder holds checkpoints; a checkpoint holds the trainer's own state; training on several devices leaves pieces
that only its own tools can join; a published model may hold its weights a second time.
Names: transformers.Trainer, accelerate, diffusers' scripts and torchtune for checkpoints; DeepSpeed's global_step
folders; torch.distributed.checkpoint's .distcp files; Meta's and Mistral's consolidated files.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from loratool.errors import InputError, LoratoolError, StorageError, UnsupportedError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = (".safetensors", *PICKLES)
_MODELS = ("model", "pytorch_model", "diffusion_pytorch_model")
_CHECKPOINT = re.compile(r"(?P<unit>checkpoint|step|epoch)[-_](?P<number>\d+)")
_DEEPSPEED = re.compile(r"global_step\d+|(?:.*_)?mp_rank_\d+.*_states\.pt")
#: What a trainer keeps to go on training. It does not belong to the model.
_STATE = re.compile(
    r"(?:optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state|(?:all|train|eval)_results)"
    r"(?:[_-]?\d+)*\.(?:pt|pth|bin|pkl|json)|zero_to_fp32\.py|(?:.*_)?mp_rank_\d+.*_states\.pt"
)
#: a part of weights in several files
SHARD = re.compile(r"-\d{5}-of-\d{5}")
_SHOWN = 12
_FIRST_RELEASE = "the same weights under the names of their first release"


def is_state(name: str) -> bool:
    """Whether a file is a trainer's own, by its name."""
    return _STATE.fullmatch(name) is not None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the first step first."""
    found = [(int(match["number"]), p) for p in folder.iterdir() if (match := _CHECKPOINT.fullmatch(p.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def one_of(found: list[Path], folder: Path) -> InputError:
    """Return the error that lists the checkpoints of a run, and says how to go on."""
    told = [f"{path.name} ({_label(path)})" for path in found]
    if len(told) > _SHOWN:
        told = [f"{len(told) - _SHOWN} earlier ones", *told[-_SHOWN:]]
    count = f"{len(found)} checkpoints" if len(found) > 1 else "one checkpoint"
    last = found[-1]
    is_model = any(p.suffix in WEIGHTS and p.name.startswith(_MODELS) for p in last.iterdir())
    command = f"merge {last} ADAPTER -o OUT" if is_model else f"inspect {last}"
    return InputError(
        "\n  ".join([f"this is a training run with {count} and no weights of its own", *told]),
        where=folder,
        hint=f"name one checkpoint; of the last: loratool {command}",
    )


def _label(path: Path) -> str:
    match = _CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return f"{'epoch' if match['unit'] == 'epoch' else 'step'} {int(match['number'])}"


def no_weights(folder: Path) -> LoratoolError:
    """Return the error for a folder without weights that can be read: it says what is there instead."""
    pieces = in_pieces(folder)
    if pieces is not None:
        return pieces
    run = checkpoints(folder)
    if run:
        return one_of(run, folder)
    if any(folder.glob("consolidated*.pth")):
        return UnsupportedError(
            "these are weights in Meta's own layout (consolidated*.pth)",
            where=folder,
            hint="transformers' convert_llama_weights_to_hf.py rewrites them",
        )
    return StorageError("no weights are in this folder", where=folder, hint="expected *.safetensors")


def in_pieces(place: Path) -> UnsupportedError | None:
    """Return why a file or folder cannot be read that holds what each device of a training had, or None."""
    names = [place.name, *((p.name for p in place.iterdir()) if place.is_dir() else ())]
    deepspeed = next((name for name in names if _DEEPSPEED.fullmatch(name)), "")
    if deepspeed:
        home = place if place.is_dir() and not _DEEPSPEED.fullmatch(place.name) else place.parent
        home = home.parent if _DEEPSPEED.fullmatch(home.name) else home
        return UnsupportedError(
            f"these are DeepSpeed's partitions ({deepspeed}): each device's piece of the weights",
            where=place,
            hint=f"python {home / 'zero_to_fp32.py'} {home} OUT joins them; then name OUT",
        )
    patterns = ("*.distcp", "*/*.distcp") if place.is_dir() else ()
    shards = [p for pattern in patterns for p in sorted(place.glob(pattern))]
    if place.suffix == ".distcp":
        shards = [place]
    if shards:
        sharded = shards[0].parent
        return UnsupportedError(
            f"these are shards of torch.distributed ({sharded.name}/*.distcp): each device's piece of the weights",
            where=place,
            hint=f"accelerate merge-weights {sharded} OUT joins them; then name OUT",
        )
    return None


def second_copies(folder: Path, read: Collection[str], adapters: Collection[str]) -> tuple[str, ...]:
    """Say which weights beside those that were `read` are not, and why; names are relative to the folder.

    Adapters' files and the trainer's state are no copies of a model, and not told of.
    """
    why: dict[str, list[str]] = {}
    pickled = all(name.endswith(PICKLES) or name.endswith(".json") for name in read)
    for path in sorted(folder.iterdir()):
        name = path.name
        if name == "original" and path.is_dir() and any(p.suffix in WEIGHTS for p in path.iterdir()):
            why.setdefault(_FIRST_RELEASE, []).append("original/")
        if path.suffix not in WEIGHTS or not path.is_file() or name in read or name in adapters or is_state(name):
            continue
        if name.startswith("consolidated"):
            why.setdefault(_FIRST_RELEASE, []).append(name)
        elif path.suffix in PICKLES and not pickled:
            why.setdefault("pickles, and there are safetensors", []).append(name)
        else:
            index = next((n for n in read if n.endswith(".json")), "")
            why.setdefault(f"{index} does not name them" if index else f"{min(read)} is the model", []).append(name)
    return tuple(f"not read: {_some(names)} ({reason})" for reason, names in why.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
