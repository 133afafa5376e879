"""Where an output goes: whether it may be written there, who else is writing, and its appearance in one step."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from loratool.errors import LockedError, LoratoolError, StorageError, UsageError
from loratool.plan import RECORD
from loratool.storage import jsonfile

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_REPORT_CAP = 1 << 30
_HEX = frozenset("0123456789abcdef")

#: What save_pretrained leaves at the top of a folder: `force` may replace these without having written them.
_KNOWN = re.compile(
    r"(?:model|adapter_model|pytorch_model|diffusion_pytorch_model)(?:\.fp16)?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"|(?:model|pytorch_model|diffusion_pytorch_model)\.(?:safetensors|bin)\.index\.json"
    r"|(?:config|adapter_config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|preprocessor_config|processor_config|chat_template|loratool\.report)\.json"
    r"|vocab\.txt|merges\.txt|chat_template\.jinja|tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model"
    r"|README\.md|LICENSE(?:\.txt|\.md)?|\.gitattributes"
)


def check_target(
    out: Path, inputs: Iterable[str], *, single_file: bool, force: bool, names: Collection[str] = ()
) -> None:
    """Refuse an output that exists (without `force`), that is an input or holds one, or that is no place to write.

    `names` are the files that the plan is known to write; others may stand in the way of `force`.
    """
    for name in inputs:
        source, target = Path(name).resolve(), out.resolve()
        if target == source or source.is_relative_to(target) or (source.is_dir() and target.is_relative_to(source)):
            raise UsageError("the output would overwrite or enter an input", where=out, hint="choose another -o")
    if not out.exists():
        return
    with suppress(LockedError, OSError):  # a run is writing there, or nobody may
        sweep(out)
    empty = out.is_dir() and not any(out.iterdir())
    if not force and not empty:
        raise StorageError("the output exists", where=out, hint="choose another -o, or --force to replace it")
    check_replaceable(out, single_file, names)


def check_replaceable(out: Path, single_file: bool, names: Collection[str]) -> None:
    """Refuse to replace a file by a folder, a folder by a file, or a folder that holds what nobody can make again."""
    if out.is_dir() == single_file:
        raise StorageError(
            f"the output is a {'folder' if out.is_dir() else 'file'}", where=out, hint="choose another -o"
        )
    if out.is_dir() and not is_report(out / RECORD):
        found = list(islice(_foreign(out, names), 4))
        if found:
            more = " and more" if len(found) > 3 else ""
            raise StorageError(
                f"refusing to replace a folder that holds other files: {', '.join(found[:3])}{more}",
                where=out,
                hint="choose another -o, or move them away",
            )


def _foreign(folder: Path, names: Collection[str]) -> Iterator[str]:
    """What a folder holds apart from `names` and from what save_pretrained writes at its top."""
    for path, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if Path(path, name).is_symlink()]
        for name in sorted((*files, *links)):
            inside = Path(path, name).relative_to(folder).as_posix()
            if inside not in names and not _KNOWN.fullmatch(inside):
                yield inside
        if not folders and not files and Path(path) != folder:
            yield f"{Path(path).relative_to(folder).as_posix()}/"


def _raise(error: OSError) -> None:
    raise error


def is_report(path: Path) -> bool:
    """Whether a file is a report of loratool."""
    try:
        content = jsonfile.read(path, _REPORT_CAP)
    except LoratoolError:
        return False
    return "verb" in content and "ledger" in content


def sweep(out: Path) -> None:
    """Remove what a run that died after publishing left beside its output. One to be resumed still has its journal."""
    left = [root for root in stagings(out) if not (root / "journal").exists()]
    if not left and not lock_path(out).exists():
        return
    lock = take_lock(lock_path(out))
    try:
        for root in left:
            if not (root / "journal").exists():
                shutil.rmtree(root, ignore_errors=True)
        lock_path(out).unlink(missing_ok=True)
    finally:
        os.close(lock)


def stagings(out: Path) -> list[Path]:
    """The staging folders of an output: exactly those, for `OUT.loratool-x` may be another output with its own."""
    start = f".{out.name}.loratool-"
    return [
        path
        for path in out.parent.iterdir()
        if path.name.startswith(start) and len(path.name) == len(start) + 16 and set(path.name[-16:]) <= _HEX
    ]


def lock_path(out: Path) -> Path:
    """Return the lock file of an output."""
    return out.parent / f".{out.name}.loratool.lock"


def publish(source: Path, out: Path, force: bool) -> None:
    """Let what is staged appear under its name in one step; with `force` in exchange for what is there."""
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if not out.exists():
        source.rename(out)
    elif not force:
        raise StorageError("the output appeared while this run was working", where=out, hint="--force replaces it")
    elif out.is_file():
        source.replace(out)
    elif not _exchange(source, out):
        aside = source.parent / "replaced"
        try:
            out.rename(aside)
            source.rename(out)
        except BaseException:
            if aside.exists() and not out.exists():
                aside.rename(out)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically (Linux renameat2); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0)


def take_lock(path: Path) -> int:
    """Return the descriptor of the lock file, locked; LockedError where another run holds it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LockedError("another run is writing this output", where=path, hint="wait for it to end") from None
        try:
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return fd
        except FileNotFoundError:
            pass  # its last holder removed it between our open and our lock
        os.close(fd)


def fsync(path: Path) -> None:
    """Make a file or folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
