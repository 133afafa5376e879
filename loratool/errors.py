"""Every error that loratool raises on purpose, and the exit code of each.

    LoratoolError
    ├── UsageError      2   the command line asks for something that cannot be meant
    ├── InputError      3   a file was understood but is refused
    │   ├── FormatError      it is not what it claims to be: damaged, truncated, hostile, unknown
    │   ├── MismatchError    adapter and base, or two checkpoints, do not belong together
    │   ├── AmbiguityError   several readings are possible and would give different output
    │   └── UnsupportedError well-formed, but something loratool cannot do exactly yet
    ├── HubError        4   the network failed, or the Hugging Face Hub said no
    ├── StorageError    5   the file system said no, or the output exists
    ├── LockedError     6   another run is writing the same output
    └── PluginError     7   a plugin is broken, or two plugins conflict

Each says what happened, where, and what to try next.
"""

from __future__ import annotations


class LoratoolError(Exception):
    """The base of all errors: catch this one.

    `where` names the file, module path or shapes; `hint` says what to try next.
    """

    exit_code = 3

    def __init__(self, what: str, *, where: object = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = str(where)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class UsageError(LoratoolError):
    """The command line, or the arguments of an API call, cannot be meant as given."""

    exit_code = 2


class InputError(LoratoolError):
    """An input was read and is refused; nothing was written."""


class FormatError(InputError):
    """A file is damaged, truncated, hostile or of an unknown format."""


class MismatchError(InputError):
    """Adapter and base, or two checkpoints, do not belong together."""


class AmbiguityError(InputError):
    """Several readings of the input are possible and would give different output."""


class UnsupportedError(InputError):
    """The input is well-formed but holds something that cannot be carried exactly yet."""


class HubError(LoratoolError):
    """The network failed, or the Hugging Face Hub said no.

    `missing` says what is not there: the repository, the revision or the connection; it is empty for any other reason.
    `status` is that of the answer, where there was one that said no.
    """

    exit_code = 4

    def __init__(self, what: str, *, where: object = "", hint: str = "", missing: str = "", status: int = 0) -> None:
        super().__init__(what, where=where, hint=hint)
        self.missing = missing
        self.status = status


class StorageError(LoratoolError):
    """Reading or writing failed, space is short, or the output exists."""

    exit_code = 5


class LockedError(LoratoolError):
    """Another run is writing the same output."""

    exit_code = 6


class PluginError(LoratoolError):
    """A plugin is broken, or two plugins conflict."""

    exit_code = 7
