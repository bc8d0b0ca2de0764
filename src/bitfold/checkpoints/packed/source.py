"""A folder whose weights another program packed, as a `Source` of ordinary tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.checkpoints.base import StoredAs
from bitfold.checkpoints.packed.base import Packed
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.checkpoints.schema import Content, Entry
from bitfold.errors import CheckpointError, FormatError
from bitfold.formats import AnyFormat
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import TensorInfo

# Files in which programs say how they packed the weights: beside plain ones they would be lies.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
# Numbers of activations and of caches, which are computed in floating point here.
_OF_ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
    ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".prob_output_scale",
)  # fmt: skip


class PackedSource:
    """A folder that another program quantized: packed weights come out dequantized, in float32, under plain names.

    Args:
        stored: the folder as it lies on the disk.
        program: who wrote it, as the config has it.
        weights: what is packed in it, by the names of the model's tensors.
        config: contents of its config.json without a word of quantization.
    """

    read_rows: None = None  # rows of packed codes are not rows of bytes
    model_dtype: None = None
    quantization: None = None  # of bitfold's folders

    def __init__(
        self, stored: SafetensorsSource, program: str, weights: Mapping[str, Packed], config: dict[str, Any]
    ) -> None:
        self.path, self.config, self.program = stored.path, config, program
        self._stored, self._weights = stored, weights
        self._formats: dict[str, AnyFormat | None] = {}
        self._of = {part: name for name, packed in weights.items() for part in packed.parts.values()}

    @property
    def files(self) -> list[Path]:
        """See `Source`."""
        return self._stored.files

    def names(self) -> list[str]:
        """Names of the model's tensors, packed or not, in the order of the files."""
        left_out = self.folded()
        return list(dict.fromkeys(self._of.get(n, n) for n in self._stored.names() if n not in left_out))

    def info(self, name: str) -> TensorInfo:
        """float32 for packed weights, what is stored for the others."""
        if (packed := self._weights.get(name)) is None:
            return self._stored.info(name)
        return TensorInfo(torch.float32, packed.model_shape)

    def packed(self, name: str) -> QTensor | Tensor:
        """A tensor as one of our formats, where that holds the very same numbers; else as `read` gives it.

        A QTensor has inputs last, whatever the model has.
        """
        if (found := self._weights.get(name)) is None:
            return self._stored.read(name)
        decoded = self._decode(name, found)
        return decoded if isinstance(decoded, QTensor) else self._as_model(found, decoded)

    def read(self, name: str) -> Tensor:
        """The tensor, dequantized if it is packed."""
        if (found := self._weights.get(name)) is None:
            return self._stored.read(name)
        decoded = self._decode(name, found)
        return self._as_model(found, decoded.dequantize() if isinstance(decoded, QTensor) else decoded)

    def content(self, name: str) -> Content:
        """See `Source`; which of our formats holds the numbers is found out by reading them."""
        packed = self._weights.get(name)
        if packed is None:
            return self._stored.info(name)
        if name not in self._formats:
            decoded = self._decode(name, packed)
            self._formats[name] = decoded.format if isinstance(decoded, QTensor) else None
        form = self._formats[name]
        return self.info(name) if form is None else Entry(form, packed.shape, transposed=packed.transposed)

    def fields(self, name: str) -> dict[str, Tensor]:
        """See `Source`."""
        decoded = self._decode(name, self._weights[name])
        assert isinstance(decoded, QTensor), name
        return dict(decoded.fields)

    def _decode(self, name: str, packed: Packed) -> QTensor | Tensor:
        try:
            return packed.decode({part: self._stored.read(stored) for part, stored in packed.parts.items()})
        except FormatError as error:
            raise CheckpointError(f"{name} is not what {self.program} writes: {error}", where=str(self.path)) from error

    @staticmethod
    def _as_model(packed: Packed, w: Tensor) -> Tensor:
        return w.mT.contiguous() if packed.transposed else w

    def quantized(self) -> dict[str, StoredAs]:
        """See `Source`; all that lies in the files for a weight counts."""
        return {
            name: StoredAs(packed.label, 8 * self._bytes(packed) / prod(packed.shape))
            for name, packed in self._weights.items()
        }

    def _bytes(self, packed: Packed) -> int:
        return sum(self._stored.info(part).nbytes for part in packed.parts.values())

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of every tensor of the model as it is stored, and of those that `folded` names."""
        plain = self._stored.stored_bytes()
        packed = {name: self._bytes(packed) for name, packed in self._weights.items()}
        return {(whole := self._of.get(name, name)): packed.get(whole, size) for name, size in plain.items()}

    def folded(self) -> dict[str, str]:
        """Scales of activations, which are not quantized here."""
        others = (name for name in self._stored.names() if name not in self._of and name not in self._weights)
        return {name: "of quantized activations" for name in others if name.endswith(_OF_ACTIVATIONS)}

    def data_bytes(self) -> int:
        """Sizes of the files without their headers."""
        return self._stored.data_bytes()

    def unread(self) -> list[str]:
        """Files of weights that do not belong to it."""
        return self._stored.unread()

    def fingerprint(self) -> dict[str, Any]:
        """As of any folder of safetensors."""
        return self._stored.fingerprint()

    def copy_side_files(self, out_dir: Path) -> list[str]:
        """Tokenizer and the like; not the files that say how the weights were packed."""
        copied = self._stored.copy_side_files(out_dir)
        for name in SETTINGS_FILES:
            if name in copied:
                (Path(out_dir) / name).unlink()
        return [name for name in copied if name not in SETTINGS_FILES]

    def generation_config(self) -> dict[str, Any]:
        """See `Source`."""
        return self._stored.generation_config()

    def tokenizer(self, *, plain: bool = False) -> Any:
        """See `Source`."""
        return self._stored.tokenizer(plain=plain)

    def close(self) -> None:
        """Nothing stays open between reads."""
