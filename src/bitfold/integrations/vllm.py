"""bitfold's own folders in vLLM: on a CPU through our operators, elsewhere decoded as they are loaded.

    layer.weight        a module with a parameter for each field, under the names of the files (X.weight.codes ...);
                        what vLLM reads for them is put aside until all of a layer is there
    afterwards          the part of each weight that this rank has, as a QWeight, which one operator multiplies by;
                        where there is no CPU, a plain parameter and vLLM's own products

Of layers that vLLM merges (q, k, v; gate, up) each keeps its own format and transform. Rows are cut at whole tiles;
inputs at whole groups, and never through a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from bitfold.checkpoints.schema import QUANT_METHOD, Entry, read_entries
from bitfold.errors import FormatError, ModelError
from bitfold.nn import QWeight
from bitfold.qtensor import QTensor, cut_columns, cut_rows

_HEAD = "lm_head.weight"
_TABLES = ("embed_tokens.weight", "wte.weight", "embeddings.weight", "embed_in.weight")
_OTHER = "bitfold convert --to safetensors FOLDER OUT, or quantize with --export compressed-tensors"
_HELD: list[list[QWeight]] = []  # by the number that the operator is told: weights are no arguments of a graph
Range = tuple[int, int]


class BitfoldConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a folder, as vLLM sees it.

    Args:
        entries: of every quantized tensor, by its name in the folder.
        kept: names of those that stay plain.

    Raises:
        ModelError: stacks of experts.
    """

    def __init__(self, entries: Mapping[str, Entry], kept: Sequence[str] = ()) -> None:
        super().__init__()
        self.entries, self.kept = dict(entries), set(kept)
        if stacks := [name for name, entry in entries.items() if len(entry.shape) == 3]:
            raise ModelError("stacks of experts are not loaded by vLLM's plug-in", where=stacks[0], hint=_OTHER)

    def get_name(self) -> Any:
        """See vLLM."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Products are computed in float32 and given in the dtype of the activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """None of a GPU is needed: weights are decoded there."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitfoldConfig:
        """See vLLM; CheckpointError for a config that makes no sense."""
        return cls(read_entries(config), list(config.get("kept", ())))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names as vLLM's model has them."""
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)
        self.kept = set(hf_to_vllm_mapper.apply_list(list(self.kept)))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer of vLLM's model is made."""
        if isinstance(layer, VocabParallelEmbedding):
            entry = self._embedding(prefix, head=isinstance(layer, ParallelLMHead))
            return None if entry is None else PackedEmbedding(prefix, entry)
        if not isinstance(layer, LinearBase):
            return None
        names = self._parts(prefix)
        found = [self.entries[name] for name in names if name in self.entries]
        if not found:
            return UnquantizedLinearMethod()
        if len(found) < len(names):
            plain = next(name for name in names if name not in self.entries)
            what = f"is not quantized and {names[0]} and others are: vLLM makes one layer of them"
            raise ModelError(what, where=plain, hint="quantize all of them, or none")
        return PackedLinear(prefix, found)

    def _parts(self, prefix: str) -> list[str]:
        """The weights that a layer is made of."""
        path, _, last = prefix.rpartition(".")
        merged = self.packed_modules_mapping.get(last, [last])
        if f"{prefix}.weight" in self.entries or not path:
            merged = [last]
        return [f"{path}.{part}.weight" if path else f"{part}.weight" for part in merged]

    def _embedding(self, prefix: str, *, head: bool) -> Entry | None:
        """The entry of a table, which some models give no name; of a head that is tied to it, that of the table."""
        entry = self.entries.get(f"{prefix}.weight")
        plain = f"{prefix}.weight" in self.kept or (head and any(name.endswith(_HEAD) for name in self.kept))
        if entry is not None or plain or (prefix and not head):
            return entry
        return next((e for name, e in self.entries.items() if name.endswith(_TABLES)), None)


class Fields(nn.Module):
    """The fields of the weights of one layer, while they are loaded.

    Args:
        entries: of the weights.
        shards: what vLLM calls each of them.
    """

    def __init__(self, entries: Sequence[Entry], shards: Sequence[int | str]) -> None:
        super().__init__()
        self._entries, self._shards = entries, list(shards)
        self._loaded: list[dict[str, torch.Tensor]] = [{} for _ in entries]
        for name, info in {n: i for entry in entries for n, i in entry.layout().items()}.items():
            place = nn.Parameter(torch.empty(0, dtype=info.dtype, device="cpu"), requires_grad=False)
            place.weight_loader = self._loader(name)  # type: ignore[attr-defined]
            self.register_parameter(name, place)

    def _loader(self, field: str) -> Any:
        def load(place: nn.Parameter, value: torch.Tensor, shard: int | str | None = None) -> None:
            found = getattr(value, "shard_id", None) if shard is None else shard
            self._loaded[0 if found is None else self._shards.index(found)][field] = value

        return load

    def weight(self, part: int, where: str) -> tuple[Entry, QTensor, dict[str, torch.Tensor]]:
        """A weight as it is stored, and what stands beside it; ModelError where fields are missing."""
        entry, loaded = self._entries[part], self._loaded[part]
        if missing := sorted(set(entry.layout()) - set(loaded)):
            raise ModelError(f"the folder has no {missing[0]} of its weight", where=where)
        names = entry.format.layout(entry.shape)
        q = QTensor(entry.format, entry.shape, {name: loaded[name] for name in names})
        return entry, q, {name: value for name, value in loaded.items() if name not in names}


@dataclass(frozen=True)
class _Cut:
    """Rows and inputs of a weight that this rank has."""

    part: int
    rows: tuple[Range, ...]
    inputs: Range


class PackedLinear(LinearMethodBase):  # type: ignore[misc]
    """A linear layer of vLLM, perhaps merged of several, on packed weights.

    Args:
        where: the layer, for messages.
        entries: of its weights, in the order of their outputs.
    """

    def __init__(self, where: str, entries: Sequence[Entry]) -> None:
        self._where, self._entries = where, entries
        self._plain = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Places for the fields; and what this rank is to have of them.

        Raises:
            ModelError: a cut that the format or the rotation does not allow.
        """
        found: Any = layer
        rank, ranks = int(found.tp_rank), int(found.tp_size)
        first = rank * input_size_per_partition if input_size_per_partition != input_size else 0
        inputs = (first, first + input_size_per_partition)
        if len(self._entries) == len(output_partition_sizes):
            sizes = zip(self._entries, output_partition_sizes, strict=True)
            self._cuts = [_Cut(i, (_rows(e.shape[0], size, rank, ranks),), inputs) for i, (e, size) in enumerate(sizes)]
        else:
            self._cuts = [_Cut(0, self._within(output_partition_sizes, rank, ranks), inputs)]
        if current_platform.is_cpu():
            self._refuse_cut_rotation(input_size_per_partition, input_size)
        merged = ("q", "k", "v") if hasattr(layer, "num_kv_head_replicas") else range(len(self._entries))
        found.weight, self._dtype = Fields(self._entries, list(merged)), params_dtype

    def _within(self, sizes: Sequence[int], rank: int, ranks: int) -> tuple[Range, ...]:
        """Rows of a weight that is stored merged."""
        n = self._entries[0].shape[0]
        if sum(sizes) * ranks != n and sum(sizes) != n:
            raise ModelError(f"its {n} rows cannot be cut for {ranks} ranks", where=self._where, hint=_OTHER)
        found, at = [], 0
        for size in sizes:
            whole = size if sum(sizes) == n else size * ranks
            first, stop = _rows(whole, size, rank, ranks)
            found.append((at + first, at + stop))
            at += whole
        return tuple(found)

    def _refuse_cut_rotation(self, here: int, whole: int) -> None:
        for entry in self._entries:
            if here != whole and entry.transform is not None:
                what = f"tensor parallelism would cut the rotation of its {whole} inputs"
                hint = "--tensor-parallel-size 1; or quantize with --transform none; or pipelines in place of tensors"
                raise ModelError(what, where=self._where, hint=hint)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """What this rank has, ready to multiply; the rest is let go."""
        found: Any = layer
        fields: Fields = found.weight
        weights = [w for cut in self._cuts for w in self._weights(fields, cut)]
        del found.weight
        if current_platform.is_cpu():
            found.bitfold_held = len(_HELD)
            _HELD.append(weights)
            return
        decoded = torch.cat([w.dequantize(self._dtype) for w in weights])
        found.weight = nn.Parameter(decoded.to(current_platform.device_type), requires_grad=False)
        self._plain.process_weights_after_loading(layer)

    def _weights(self, fields: Fields, cut: _Cut) -> list[QWeight]:
        entry, q, sides = fields.weight(cut.part, self._where)
        if not current_platform.is_cpu():
            return [self._decoded(entry, q, sides, cut)]
        try:
            parts = [cut_columns(cut_rows(q, *rows), *cut.inputs) for rows in cut.rows]
        except FormatError as error:
            hint = "another number of ranks, or --tensor-parallel-size 1"
            raise ModelError(error.what, where=self._where, hint=hint) from error
        return [_qweight(entry, part, sides) for part in parts]

    def _decoded(self, entry: Entry, q: QTensor, sides: Mapping[str, torch.Tensor], cut: _Cut) -> QWeight:
        """Floats may be cut anywhere, after the rotation is undone."""
        whole = _qweight(entry, q, sides).dequantize(self._dtype)
        rows = torch.cat([whole[first:stop] for first, stop in cut.rows])[:, slice(*cut.inputs)].contiguous()
        return _Plain(rows)  # type: ignore[return-value]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., inputs) -> (..., outputs of this rank)."""
        found: Any = layer
        y: torch.Tensor
        if not current_platform.is_cpu():
            y = self._plain.apply(layer, x, bias)
            return y
        rows = sum(stop - first for cut in self._cuts for first, stop in cut.rows)
        y = torch.ops.bitfold.held_linear(x, found.bitfold_held, rows)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class _Plain:
    """A weight that is decoded already."""

    w: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.w.to(dtype)


class PackedEmbedding(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """A table, or an output head, that is stored packed; decoded when it is loaded where there is no CPU.

    Args:
        where: the layer, for messages.
        entry: of the table.
    """

    def __init__(self, where: str, entry: Entry) -> None:
        self._where, self._entry = where, entry

    def create_weights(self, layer: nn.Module, *sizes: Any, params_dtype: torch.dtype, **extra: Any) -> None:
        """Places for the fields."""
        found: Any = layer
        found.weight, self._dtype = Fields([self._entry], [0]), params_dtype

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The rows of this rank; in floats also zeros for what the vocabulary is filled up with."""
        found: Any = layer
        entry, q, sides = found.weight.weight(0, self._where)
        first, stop = found.shard_indices.org_vocab_start_index, found.shard_indices.org_vocab_end_index
        self._fill = found.num_embeddings_per_partition - (stop - first)
        del found.weight
        if current_platform.is_cpu():
            try:
                part = cut_rows(q, first, stop)
            except FormatError as error:
                hint = "another number of ranks, or --tensor-parallel-size 1"
                raise ModelError(error.what, where=self._where, hint=hint) from error
            found.bitfold_held = len(_HELD)
            weight = _qweight(entry, part, sides)
            weight.dtype = self._dtype
            _HELD.append([weight])
            return
        rows = _qweight(entry, q, sides).dequantize(self._dtype)[first:stop]
        table = nn.functional.pad(rows, (0, 0, 0, self._fill)).to(current_platform.device_type)
        found.weight = nn.Parameter(table, requires_grad=False)
        super().process_weights_after_loading(layer)

    def embedding(self, layer: nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        found: Any = layer
        y: torch.Tensor
        if not current_platform.is_cpu():
            y = super().embedding(layer, input_)
        else:
            y = torch.ops.bitfold.held_rows(input_, found.bitfold_held, self._entry.shape[1], self._dtype)
        return y

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (..., vocabulary of this rank), zeros where it is filled up."""
        found: Any = layer
        y: torch.Tensor
        if not current_platform.is_cpu():
            y = super().apply(layer, x, bias)
            return y
        y = torch.ops.bitfold.held_linear(x, found.bitfold_held, found.num_embeddings_per_partition - self._fill)
        y = nn.functional.pad(y, (0, self._fill))
        return y if bias is None else y + bias


def _rows(n: int, size: int, rank: int, ranks: int) -> Range:
    """Rows of n that a rank has, `size` of them; several ranks may have the same."""
    if n % size:
        raise ModelError(f"{n} rows cannot be cut into parts of {size}")
    first = rank * (n // size) // ranks * size
    return first, first + size


def _qweight(entry: Entry, q: QTensor, sides: Mapping[str, torch.Tensor]) -> QWeight:
    weight = QWeight(q, act=entry.act, transform=entry.transform)
    weight._buffers.update(sides)
    return weight


@torch.library.custom_op("bitfold::held_linear", mutates_args=(), device_types="cpu")
def _held_linear(x: torch.Tensor, held: int, rows: int) -> torch.Tensor:
    return torch.cat([weight.linear(x) for weight in _HELD[held]], -1)


@_held_linear.register_fake
def _held_linear_shape(x: torch.Tensor, held: int, rows: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("bitfold::held_rows", mutates_args=(), device_types="cpu")
def _held_rows(ids: torch.Tensor, held: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return _HELD[held][0].lookup(ids).to(dtype)


@_held_rows.register_fake
def _held_rows_shape(ids: torch.Tensor, held: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*ids.shape, width, dtype=dtype, device=ids.device)
