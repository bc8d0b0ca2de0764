"""A GGUF file being written (implements `Target`): the inverse of `GgufSource`.

It is one file, or several that count as one, its head first, so config and tokenizer of the source are read when places
are given; tensors then come in any order, one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.base import Source
from bitfold.checkpoints.gguf.arch import Place
from bitfold.checkpoints.gguf.container import Laid, entry_name, plan_parts
from bitfold.checkpoints.gguf.described import Described, describe_model
from bitfold.checkpoints.gguf.parts import GgufParts
from bitfold.checkpoints.gguf.vocabulary import vocabulary_metadata
from bitfold.checkpoints.schema import Content, Entry
from bitfold.checkpoints.shards import PlannedWriter, ShardPlan, written_error
from bitfold.errors import CheckpointError, UsageError
from bitfold.system.tensorinfo import TensorInfo

PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
EMBEDDING = "model.embed_tokens.weight"
# general.file_type: what a file is said to be, for people; loaders go by the types of its tensors.
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11},
    **{"Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21},
    **{"IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28},
    **{"IQ2_M": 29, "IQ4_XS": 30, "BF16": 32, "TQ2_0": 37},
}
_MOSTLY = {"q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M", "iq2_s": "IQ2_M"}


class GgufModel:
    """See `Target`.

    Args:
        folder: an existing folder; the file in it is `model.gguf`, or model-00001-of-00003.gguf and so on.
        max_shard_bytes: size at which a new file is begun; None: it is one file.
        source: the checkpoint whose config and tokenizer go into it.
        variant: what the file is called (Q4_K_M ...), for general.file_type; empty = by what most of it is.

    Raises:
        UsageError: no source: weights alone make no GGUF file.
        CheckpointError: a model that GGUF has no words for.
    """

    single: str | None = "model.gguf"

    def __init__(
        self, folder: Path, max_shard_bytes: int | None, source: Source | None = None, variant: str = ""
    ) -> None:
        if source is None:
            raise UsageError("a GGUF file is made of a checkpoint: its config and tokenizer go into it")
        self.folder, self._source, self._variant = folder, source, variant
        self._max_bytes = max_shard_bytes
        self._model: Described = describe_model(source.config, _title(source.path), str(source.path))
        self._laid: dict[str, Laid] = {}
        self._words: dict[int, dict[str, Any]] = {}  # the tokenizer, for an embedding of so many rows
        self._writer: PlannedWriter | None = None
        self.but_for = ""
        self.rounded: dict[str, float] = {}

    @property
    def _open(self) -> PlannedWriter:
        assert self._writer is not None, "layout comes first"
        return self._writer

    @property
    def files(self) -> list[str]:
        """See `Target`."""
        return self._open.plan.files

    def plain(self, info: TensorInfo) -> TensorInfo:
        """See `Target`: llama.cpp wants vectors in float32."""
        return TensorInfo(torch.float32, info.shape) if len(info.shape) < 2 else info

    def engines(self) -> dict[str, str]:
        """See `Target`."""
        no = "no: it reads folders of safetensors"
        return {"llama.cpp": "yes", "transformers": "yes, decoded to floating point", "vLLM": no}

    def stored(self, contents: Mapping[str, Content]) -> dict[str, TensorInfo]:
        """See `Target`: the names of llama.cpp, each expert by itself."""
        found: dict[str, TensorInfo] = {}
        for name, laid in self._lay(contents).items():
            found |= laid.entries(name)
        return found

    def size(self, contents: Mapping[str, Content]) -> int:
        """See `Target`."""
        return self._plan(contents).nbytes

    def layout(self, contents: Mapping[str, Content]) -> None:
        """See `Target`.

        Raises:
            CheckpointError: a tensor that GGUF has no place or no type for, or what `vocabulary_metadata` raises.
        """
        self._laid = self._lay(contents)
        self._writer = PlannedWriter(self.folder, self._plan(contents))
        for name, values in self._model.tensors.items():
            self._writer.write(name, [values])

    def _plan(self, contents: Mapping[str, Content]) -> ShardPlan:
        assert self.single is not None
        laid = self._lay(contents)
        kind = FILE_TYPES.get(self._variant, FILE_TYPES[_mostly(laid.values())])
        rows = _rows(contents, str(self._source.path))
        if rows not in self._words:
            self._words[rows] = vocabulary_metadata(self._source, rows)
        self._model.put("vocab_size", rows)
        metadata = {**self._model.metadata, "general.file_type": kind, **self._words[rows]}
        return plan_parts(self.single, metadata, laid, self._max_bytes)

    def _lay(self, contents: Mapping[str, Content]) -> dict[str, Laid]:
        found = {name: Laid("f32", tuple(w.shape), _info(w)) for name, w in self._model.tensors.items()}
        experts: dict[str, dict[int, Laid]] = {}
        for name, content in contents.items():
            places, laid = self._places(name), _laid(name, content)
            for place in places:
                if place.expert is not None:
                    experts.setdefault(place.name, {})[place.expert] = laid
                    found.setdefault(place.name, laid)  # its turn is that of its first expert
                else:
                    found[place.name] = _share(laid, len(places))
        return found | {name: self._stack(name, some) for name, some in experts.items()}

    def _stack(self, name: str, some: Mapping[int, Laid]) -> Laid:
        """Experts that the checkpoint has one by one."""
        count, first = int(self._model.metadata[f"{self._model.name}.expert_count"]), next(iter(some.values()))
        if some.keys() != set(range(count)) or any(laid != first for laid in some.values()):
            what = f"{len(some)} experts of {count} are there, and GGUF has all of them in one tensor of one type"
            raise CheckpointError(what, where=name)
        return Laid(first.type, (count, *first.shape), TensorInfo(first.info.dtype, (count, *first.info.shape)), True)

    def _places(self, name: str) -> list[Place]:
        found = self._model.arch.places(name)
        if not found:
            what = f"GGUF has no place for it in a model of architecture {self._model.name!r}"
            raise CheckpointError(what, where=name, hint="a variant of the model that llama.cpp does not know")
        return found

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> dict[str, str]:
        """See `Target`; numbers are cast to what is planned."""
        places = self._places(name)
        if self._laid[places[0].name].stack:
            return self._write_experts(places, (part.to(self._laid[places[0].name].info.dtype) for part in parts))
        stored = places[0].name
        return {stored: self._open.write(stored, self._ordered(stored, self._offset(stored, parts)))}

    def pack(self, name: str, fields: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """See `Target`."""
        places = self._places(name)
        if fields.keys() != {"blocks"}:
            what = f"is packed as {sorted(fields)}, blocks were planned"
            raise CheckpointError(what, where=f"{self.folder}: {name}")
        if self._laid[places[0].name].stack:
            return self._write_experts(places, [fields["blocks"]])
        stored = places[0].name
        return {stored: self._open.write(stored, self._ordered(stored, [fields["blocks"]]))}

    def _write_experts(self, places: list[Place], parts: Iterable[torch.Tensor]) -> dict[str, str]:
        """One expert (n, k), or consecutive pieces of a stack (experts, n, k), its rows shared out to the places."""
        found, number = dict[str, str](), places[0].expert
        if number is not None:
            entry = entry_name(places[0].name, number)
            return {entry: self._open.write(entry, parts)}
        for count, expert in enumerate(expert for part in parts for expert in part):
            for place, rows in zip(places, expert.chunk(len(places)), strict=True):
                entry = entry_name(place.name, count)
                found[entry] = self._open.write(entry, [rows])
        return found

    def _offset(self, stored: str, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        laid, offset = self._laid[stored], self._model.arch.norm_offset
        for part in parts:
            if not part.is_floating_point():
                raise CheckpointError(f"{part.dtype} was not planned", where=stored)
            # The offset is added in float32: most numbers of a bfloat16 norm would be lost in the sum.
            shifted = part.float() + offset if offset and stored.endswith("norm.weight") else part
            yield shifted.to(laid.info.dtype)

    def _ordered(self, stored: str, parts: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Rows of queries and keys in the order of llama.cpp: pairs of the rotary embedding side by side."""
        query, key = self._model.heads
        heads = query if ".attn_q." in stored else key if ".attn_k." in stored else 0
        if not (heads and self._model.arch.interleaved):
            return parts
        w = torch.cat(list(parts))
        if w.shape[0] % (2 * heads):
            raise CheckpointError(f"{w.shape[0]} rows do not make {heads} heads", where=stored)
        return [w.view(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)]

    def digest(self, stored: str) -> str:
        """See `Target`."""
        return self._open.digest(stored)

    def held(self) -> dict[str, int]:
        """See `Target`."""
        file = GgufParts(self.folder / self.files[0])
        try:
            found: dict[str, int] = {}
            for name, tensor in file.tensors.items():
                if self._laid[name].stack:
                    found |= {entry_name(name, i): tensor.nbytes // tensor.shape[0] for i in range(tensor.shape[0])}
                else:
                    found[name] = tensor.nbytes
            return found
        finally:
            file.close()

    def sync(self) -> None:
        """See `Target`."""
        self._open.sync()

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
        """See `Target`: all of it is in the head already."""
        try:
            self.sync()
        except OSError as error:
            raise written_error(error, self.folder, "cannot be completed") from error


def _rows(contents: Mapping[str, Content], where: str) -> int:
    embedding = contents.get(EMBEDDING)
    if embedding is None:
        raise CheckpointError("the model has no embedding", where=where)
    return embedding.model_shape[0] if isinstance(embedding, Entry) else embedding.shape[0]


def _info(w: torch.Tensor) -> TensorInfo:
    return TensorInfo(w.dtype, tuple(w.shape))


def _title(path: Path) -> str:
    return path.stem if path.is_file() else path.resolve().name


def _share(laid: Laid, count: int) -> Laid:
    """Of a tensor whose rows become so many tensors: a stack (experts, n, k), or all of a matrix."""
    if len(laid.shape) < 3:
        return laid
    shape, info = ((a, n // count, *rest) for a, n, *rest in (laid.shape, laid.info.shape))
    return Laid(laid.type, shape, TensorInfo(laid.info.dtype, info), True)


def _laid(name: str, content: Content) -> Laid:
    """How a tensor lies in the file.

    Raises:
        CheckpointError: no ggml type can hold it as it is.
    """
    if isinstance(content, Entry):
        if content.format.ggml is None or content.sides() or content.transposed or content.flat:
            beside = "" if content.format.ggml is None else " with a transform, or in another orientation"
            what = f"{content.format.name}{beside} is no type of GGUF"
            raise CheckpointError(what, where=name, hint="name a type of GGUF, as in gguf:Q4_K_M")
        return Laid(content.format.ggml, content.shape, content.format.layout(content.shape)["blocks"])
    dtype = torch.float32 if len(content.shape) < 2 else content.dtype
    if not content.dtype.is_floating_point or dtype not in PLAIN:
        raise CheckpointError(f"{content.dtype} is no type of GGUF", where=name, hint="name one, as in gguf:F16")
    return Laid(PLAIN[dtype], content.shape, TensorInfo(dtype, content.shape))


def _mostly(tensors: Iterable[Laid]) -> str:
    sizes: Counter[str] = Counter()
    for laid in tensors:
        sizes[laid.type] += laid.info.nbytes
    most = sizes.most_common(1)[0][0] if sizes else "f32"
    name = _MOSTLY.get(most, most.upper())
    return name if name in FILE_TYPES else "F16"
