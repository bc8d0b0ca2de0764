"""What becomes of one tensor of a model: it is kept, tied to another, not used, packed already, or quantized."""

from __future__ import annotations

from dataclasses import dataclass

from bitfold.checkpoints.schema import Content, Entry
from bitfold.models.sites import Site
from bitfold.models.swap import transform_of
from bitfold.recipes.scheme import Scheme
from bitfold.records.run_report import TensorReport
from bitfold.system.tensorinfo import TensorInfo


@dataclass(frozen=True)
class _Decided:
    """What every decision knows.

    Args:
        tensor: name of the tensor in the model.
        info: dtype and shape in the source.
        reason: in words.
    """

    tensor: str
    info: TensorInfo
    reason: str

    @property
    def format_name(self) -> str | None:
        """The format it is stored in; None = as it was."""
        return None

    def content(self) -> Content | None:
        """What it is stored as; None = nothing is stored."""
        return self.info

    def nbytes(self) -> int:
        """Bytes it will take, exactly."""
        content = self.content()
        return 0 if content is None else content.nbytes

    def report(
        self,
        nbytes: int,
        *,
        error: float | None = None,
        output_error: float | None = None,
        flags: tuple[str, ...] = (),
    ) -> TensorReport:
        """What the run reports of it."""
        name, info = self.format_name, self.info
        return TensorReport(self.tensor, info.shape, name, self.reason, info.nbytes, nbytes, error, output_error, flags)


@dataclass(frozen=True)
class Kept(_Decided):
    """It goes into the output as it is."""


@dataclass(frozen=True)
class Unused(_Decided):
    """It is carried along, although the model class has no place for it."""


@dataclass(frozen=True)
class Tied(_Decided):
    """Another tensor stands for it, so nothing of it is stored.

    Args:
        to: that tensor.
    """

    to: str

    def content(self) -> None:
        """Nothing."""
        return


@dataclass(frozen=True)
class Packed(_Decided):
    """It is quantized in the source, and goes into the output code by code.

    Args:
        stored: what the source says of it.
    """

    stored: Entry

    @property
    def format_name(self) -> str:
        """The format it is stored in."""
        return self.stored.format.name

    def content(self) -> Content:
        """As it is."""
        return self.stored


@dataclass(frozen=True)
class Quantized(_Decided):
    """It is quantized.

    Args:
        site: where it sits in the model.
        scheme: how.
        fold: path of the norm or linear layer whose weight takes the factors of its input channels, where the scheme
            wants factors.
    """

    site: Site
    scheme: Scheme
    fold: str | None = None

    @property
    def format_name(self) -> str:
        """The format it is stored in."""
        return self.scheme.format.name

    def entry(self, seed: int, auto: str = "float") -> Entry | None:
        """The entry for the checkpoint's config, activations left to measurement being `auto`; None for plain ones."""
        scheme, site = self.scheme, self.site
        if scheme.format.plain:
            return None
        transform = transform_of(scheme, site, seed) if self.fold is None else None
        act = auto if scheme.activations.measured else scheme.activations.name
        return Entry(scheme.format, site.qshape, act, site.transposed, transform, site.experts is not None)

    def content(self) -> Content:
        """Packed; numbers for plain formats."""
        entry = self.entry(0)
        if entry is not None:
            return entry
        return TensorInfo(self.scheme.format.layout(self.site.qshape)["values"].dtype, self.info.shape)


Decision = Kept | Tied | Unused | Packed | Quantized
