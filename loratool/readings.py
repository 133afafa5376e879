"""What a family knows of a name."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from loratool import native
from loratool.errors import MismatchError
from loratool.layers import Layer
from loratool.layouts import Rows


class Known(NamedTuple):
    """What a family knows of a name: the canonical paths that it stands for, and their layer.

    Almost always one path. Several are the parts of a weight that is fused under this name; `axis` is the index (`e`)
    that is still open in the paths of a stack of experts. `distance` counts how far the name is from the family's own
    spelling (rules that were needed, a prefix that was assumed): of several readings the nearest is meant. `heights`
    and `swap` say how the rows of the parts lie, `turned` that a file has them as columns: see loratool.native.
    """

    component: str
    parts: tuple[str, ...]
    layer: Layer
    role: str
    axis: str = ""
    distance: int = 0
    heights: tuple[str, ...] = ()
    swap: bool = False
    turned: bool = False

    @property
    def path(self) -> str:
        """The canonical path, for messages; parts joined by +."""
        return "+".join(self.parts)

    def at(self, index: int) -> Known:
        """Return one layer of a stack."""
        return self._replace(parts=tuple(p.replace("{" + self.axis + "}", str(index)) for p in self.parts), axis="")

    def rows(self, out: int, inp: int, config: Mapping[str, Any]) -> list[Rows]:
        """Return which rows of a weight (out, inp) each part is, in the part's own order."""
        if self.swap:
            half, rest = divmod(out, 2)
            if rest or len(self.parts) > 1:
                raise MismatchError(f"{out} rows have no two halves", where=self.path)
            return [(range(half, out), range(half))]
        ends = list(accumulate(native.heights(self.heights, out, inp, self.parts, config)))
        return [(range(start, end),) for start, end in zip([0, *ends], ends, strict=False)]


class Slot(NamedTuple):
    """A place in a 3-D parameter of the live model: its path, the number, and the canonical parts that lie there."""

    parameter: str
    number: int
    parts: tuple[str, ...]
    unmarked: bool = False  # see layers.Experts
