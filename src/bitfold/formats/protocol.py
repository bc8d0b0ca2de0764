"""What every format can do, and what some can: the one face that the rest of the house sees.

Nothing outside `formats/` asks which class a format is, nor feels for attributes: what only some formats have is
declared here, and is None where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from bitfold.formats.base import Params, Scale
from bitfold.formats.columns import Coder
from bitfold.formats.grids import Grid
from bitfold.system.tensorinfo import TensorInfo

if TYPE_CHECKING:
    from bitfold.formats.families.viterbi import TrellisCode

Fields = Mapping[str, Tensor]
Shape = tuple[int, ...]


class AnyFormat(Protocol):
    """A number format: `name` and exact `bits` of a code, `bpw` of a weight, `span` at scale 1; bytes <-> numbers."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> Fraction: ...
    @property
    def bpw(self) -> Fraction: ...
    @property
    def span(self) -> tuple[float, float]: ...
    def layout(self, shape: Shape) -> dict[str, TensorInfo]: ...
    def encode(self, w: Tensor, params: Params | None) -> dict[str, Tensor]: ...
    def decode(self, fields: Fields, shape: Shape) -> Tensor: ...
    def decode_rows(self, fields: Fields, shape: Shape, index: Tensor) -> Tensor: ...
    def describe(self) -> dict[str, Any]: ...

    # What a format is made of.
    @property
    def plain(self) -> bool:
        """Whether its one field `values` is an ordinary tensor, which any program can read."""
        ...

    @property
    def scale(self) -> Scale | None:
        """Scales that a fit chooses; None where there are none, or the format chooses its own."""
        ...

    @property
    def grid(self) -> Grid | None:
        """The number that each code means; then the format is a `Format`, with everything that has."""
        ...

    @property
    def levels(self) -> int | None:
        """How many different values a weight can have at a given scale; None where codes name vectors."""
        ...

    @property
    def code(self) -> TrellisCode | None:
        """The code of a trellis."""
        ...

    @property
    def books(self) -> int | None:
        """How many additive codebooks a weight has."""
        ...

    @property
    def magnitudes(self) -> Callable[[], Tensor] | None:
        """The table that the low byte of a lattice's codes looks up."""
        ...

    @property
    def ggml(self) -> str | None:
        """The ggml type whose blocks the one field `blocks` holds."""
        ...

    # What it can do beyond the verbs.
    @property
    def coder(self) -> Callable[[Tensor, Params | None, Tensor | None], Coder] | None:
        """(w (n, k), scales, importance (k,) of the inputs) -> what codes its columns from left to right, for error
        feedback. The importance is for formats that choose their own scales."""
        ...

    @property
    def rows_at_once(self) -> int | None:
        """With how many rows for each thread that coder is as fast as it gets; None: more are always faster."""
        ...

    @property
    def rescaled(self) -> Callable[[Fields, Tensor], dict[str, Tensor]] | None:
        """(fields, factor (n, 1)) -> fields with the same codes and each row's scale times its factor."""
        ...

    @property
    def decode_columns(self) -> Callable[[Fields, Shape, Tensor], Tensor] | None:
        """(fields, shape (n, k), index) -> float32 columns (n, len(index)), the others not decoded."""
        ...

    @property
    def weighted(self) -> Callable[[Tensor, Tensor | None], dict[str, Tensor]] | None:
        """(w (n, k), importance float32 (k,) of the inputs or None) -> fields, the scales searched for such that errors
        cost least, each counting by the importance of its input. For formats that choose their own scales."""
        ...
