"""GGUF files as a source of Hugging Face tensors.

llama.cpp's converter renames tensors, permutes the query and key rows of Llama models, adds 1 to Gemma's norms and
folds the config into metadata; `GgufSource` undoes all of it, tensor by tensor, so that the rest of bitfold sees an
ordinary checkpoint. Block types are decoded to float32; F32, F16 and BF16 come as they are stored.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.checkpoints.base import StoredAs
from bitfold.checkpoints.gguf.arch import CONFIG_TENSORS, Facts, find_arch, hf_config
from bitfold.checkpoints.gguf.file import GgufTensor
from bitfold.checkpoints.gguf.parts import GgufParts
from bitfold.checkpoints.gguf.tokenizer import generation_config, tokenizer_of
from bitfold.checkpoints.safetensors import file_facts, write_json
from bitfold.checkpoints.schema import Content, Entry
from bitfold.errors import CheckpointError, UsageError
from bitfold.formats.families.ggml import GGML
from bitfold.qtensor import QTensor
from bitfold.system.collector import uncollected
from bitfold.system.tensorinfo import TensorInfo, require_rows
from bitfold.text.tokenizer import read_tokenizer

_PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_CHUNK = 1 << 21  # weights dithered at a time


class GgufSource:
    """A GGUF file open for reading (implements `Source`); tensors are named as in Hugging Face checkpoints.

    Args:
        path: the file; any part of a model in several.
        dither_seed: if given, block-quantized weights get uniform noise within half a step of their own block, from
            this seed: a plausible draw of the weights before they were quantized. The file's 4-bit lattice would
            otherwise flatter every 4-bit format that is measured on it.
        pre_tokenizer: by which rule its tokenizer cuts text, whatever the file says.
        weights_alone: do not look at the tokenizer, whose check takes longer than all else.

    Raises:
        CheckpointError: a damaged file, an architecture that is not supported, tensors that are missing or unknown.
    """

    quantization: None = None

    def __init__(
        self,
        path: str | Path,
        dither_seed: int | None = None,
        pre_tokenizer: str | None = None,
        *,
        weights_alone: bool = False,
    ) -> None:
        self.path = Path(path)
        with uncollected():
            self._file = GgufParts(path)
            try:
                self._read_facts(dither_seed)
                read = None if weights_alone else tokenizer_of(self._file.metadata, str(self.path), pre_tokenizer)
                self._tokenizer = read
            except BaseException:
                self._file.close()
                raise

    def _read_facts(self, dither_seed: int | None) -> None:
        tensors = self._file.tensors
        values = {n: self._plain(tensors[n]).float().tolist() for n in CONFIG_TENSORS if n in tensors}
        shapes = {name: t.shape for name, t in tensors.items()}
        facts = Facts(self._file.metadata, shapes, values, str(self.path))
        self._facts, self._arch = facts, find_arch(facts)
        if dither_seed is not None and self._arch.experts:
            raise UsageError("mixtures of experts cannot be dithered", where=str(self.path))
        self.config: dict[str, Any] = hf_config(self._arch, facts)
        self.config["dtype"] = _dtype_name(tensors.values())
        self._names = self._hf_names()
        self._check_complete()
        for name in self._names:
            self.info(name)  # refuses types that cannot be decoded
        self._noise = None if dither_seed is None else _Noise(dither_seed, _quantized(self._file))

    @property
    def model_dtype(self) -> torch.dtype:
        """What the model computes in: kept tensors are stored so, although `read` yields float32 for block types."""
        dtype: torch.dtype = getattr(torch, self.config["dtype"])
        return dtype

    def names(self) -> list[str]:
        """All tensor names, in the order of the file, or of the noise if the weights are dithered."""
        if self._noise is not None:
            return sorted(self._names, key=lambda name: self._names[name].name)
        return sorted(self._names, key=lambda name: self._file.place(self._names[name]))

    def info(self, name: str) -> TensorInfo:
        """dtype (float32 for block types) and shape; CheckpointError for a ggml type that cannot be decoded."""
        tensor = self._names[name]
        if tensor.type not in _PLAIN and tensor.type not in GGML:
            hint = f"decoded are {', '.join([*_PLAIN, *GGML])}"
            raise CheckpointError(f"ggml type {tensor.type} cannot be decoded", where=self._at(tensor), hint=hint)
        return TensorInfo(_PLAIN.get(tensor.type, torch.float32), tensor.shape)

    def read(self, name: str) -> Tensor:
        """The tensor as its Hugging Face model holds it."""
        self.info(name)
        tensor = self._names[name]
        w = self._plain(tensor) if tensor.type in _PLAIN else self._decoded(tensor)
        if self._arch.norm_offset and tensor.name.endswith("norm.weight"):
            w = w - self._arch.norm_offset
        heads = self._heads(tensor)
        return self._unpermute(tensor, w, heads) if heads else w

    def packed(self, name: str) -> QTensor | Tensor:
        """The tensor as it lies in the file: blocks that are not decoded, or plain numbers.

        It is a view of the mapped file, but for rows that come in another order than the model's.
        """
        self.info(name)
        tensor = self._names[name]
        dtype, heads = _PLAIN.get(tensor.type), self._heads(tensor)
        if self._noise is not None or (self._arch.norm_offset and tensor.name.endswith("norm.weight")):
            return self.read(name)
        raw = torch.frombuffer(self._file.view(tensor), dtype=dtype or torch.uint8)
        if dtype is not None:
            w = raw.view(tensor.shape)
            return self._unpermute(tensor, w, heads) if heads else w
        ggml = GGML[tensor.type]
        blocks = raw.view(ggml.layout(tensor.shape)["blocks"].shape)
        return QTensor(ggml, tensor.shape, {"blocks": self._unpermute(tensor, blocks, heads) if heads else blocks})

    def content(self, name: str) -> Content:
        """See `Source`: blocks, in the order of the model's rows."""
        info, kind = self.info(name), self._names[name].type
        return info if kind in _PLAIN else Entry(GGML[kind], info.shape)

    def fields(self, name: str) -> dict[str, Tensor]:
        """See `Source`."""
        tensor = self._names[name]
        blocks, heads = self._blocks(tensor), self._heads(tensor)
        return {"blocks": self._unpermute(tensor, blocks, heads) if heads else blocks}

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """`read(name)[rows]` of a matrix or a stack; only the bytes of these rows are read.

        Dithered weights are made whole first: their noise is one stream.

        Raises:
            UsageError: a row that it does not have.
        """
        require_rows(rows, self.info(name).shape[0], name)
        tensor = self._names[name]
        if self._noise is not None or len(tensor.shape) < 2:
            return self.read(name)[rows]
        places = rows
        if heads := self._heads(tensor):
            places = self._unpermute(tensor, torch.arange(tensor.shape[0]), heads)[rows]
        width = tensor.nbytes // max(1, tensor.shape[0])
        parts = [self._file.raw(tensor, a * width, (b - a) * width) for a, b in _runs(places.tolist())]
        raw = parts[0] if len(parts) == 1 else bytearray().join(parts)
        shape = (len(rows), *tensor.shape[1:])
        if tensor.type in _PLAIN:
            return torch.frombuffer(raw, dtype=_PLAIN[tensor.type]).view(shape)
        blocks = torch.frombuffer(raw, dtype=torch.uint8)
        ggml = GGML[tensor.type]
        return ggml.decode({"blocks": blocks.view(ggml.layout(shape)["blocks"].shape)}, shape)

    def quantized(self) -> dict[str, StoredAs]:
        """See `Source`: the block types."""
        blocks = {name: t for name, t in self._names.items() if t.type not in _PLAIN}
        return {name: StoredAs(t.type, 8 * t.nbytes / prod(t.shape)) for name, t in blocks.items()}

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the file."""
        return self._names[name].name

    def ggml_type(self, name: str) -> str:
        """Name of the ggml type in which a tensor is stored (`q4_1`, `f32` ...)."""
        return self._names[name].type

    def steps(self, name: str) -> Tensor | None:
        """Distance between neighbouring representable values around each weight, float32 of the tensor's shape in the
        row order of the file; None if it is stored as plain floating point."""
        self.info(name)
        tensor = self._names[name]
        if tensor.type in _PLAIN:
            return None
        return GGML[tensor.type].steps({"blocks": self._blocks(tensor)}, tensor.shape)

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of every tensor in the file; those that went into the config under their own names."""
        here: dict[str, dict[str, int]] = {}
        for name, tensor in self._names.items():
            here.setdefault(tensor.name, {})[name] = tensor.nbytes
        found: dict[str, int] = {}
        for tensor in self._file.tensors.values():
            found |= here.get(tensor.name, {tensor.name: tensor.nbytes})
        return found

    def folded(self) -> dict[str, str]:
        """Tensors that became part of the config (rope factors), or that every reader computes (rotary embeddings)."""
        offered = {tensor.name for tensor in self._names.values()}
        return {name: "part of the config" for name in self._file.tensors if name not in offered}

    def data_bytes(self) -> int:
        """The sizes of the files without what precedes the tensors and without the padding between them."""
        return self._file.data_bytes()

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self._file.paths

    def unread(self) -> list[str]:
        """None: the file, or its parts, are the checkpoint."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        """Of each file its size, time and first bytes."""
        return {path.name: file_facts(path) for path in self._file.paths}

    def copy_side_files(self, out_dir: Path) -> list[str]:
        """Write the tokenizer with its chat template and special tokens, and generation_config.json."""
        written = [] if self._tokenizer is None else self._tokenizer.write(Path(out_dir))
        write_json(Path(out_dir) / "generation_config.json", self.generation_config())
        return [*written, "generation_config.json"]

    def generation_config(self) -> dict[str, Any]:
        """See `Source`: begin, pad and all end tokens."""
        return generation_config(self._file.metadata)

    def tokenizer(self, *, plain: bool = False) -> Any:
        """See `Source`."""
        if self._tokenizer is None:
            hint = "use a file with the vocabulary in it, or the original folder"
            raise CheckpointError("the file carries no tokenizer", where=str(self.path), hint=hint)
        if plain:
            with uncollected():
                return self._tokenizer.plain(self.tokenizer)
        with tempfile.TemporaryDirectory(prefix="bitfold-tokenizer-") as folder:
            self._tokenizer.write(Path(folder))
            write_json(Path(folder) / "config.json", self.config)  # transformers looks there for the kind of model
            return read_tokenizer(Path(folder), name=str(self.path))

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _at(self, tensor: GgufTensor) -> str:
        return f"{self.path}: tensor {tensor.name!r}"

    def _hf_names(self) -> dict[str, GgufTensor]:
        names: dict[str, GgufTensor] = {}
        for tensor in self._file.tensors.values():
            if tensor.name in CONFIG_TENSORS or ".attn_rot_embd." in tensor.name:
                continue
            if (experts := self._experts(tensor)) is not None:
                names |= experts
                continue
            name = self._arch.hf_name(tensor.name)
            if name is None:
                what = f"models of type {self.config['model_type']} have no such tensor"
                raise CheckpointError(what, where=self._at(tensor), hint="a variant that is not supported")
            names[name] = tensor
        return names

    def _experts(self, tensor: GgufTensor) -> dict[str, GgufTensor] | None:
        """The tensors of a stack of experts, each where it lies; None for others."""
        count = int(self._facts.get("expert_count", 0) or 0)
        if len(tensor.shape) == 3 and count != tensor.shape[0]:
            what = f"holds {tensor.shape[0]} experts, and {count} are announced"
            raise CheckpointError(what, where=self._at(tensor), hint="the file is damaged")
        names = self._arch.expert_names(tensor.name, count) if len(tensor.shape) == 3 else None
        if names is None:
            return None
        size = tensor.nbytes // count
        return {
            name: replace(tensor, shape=tensor.shape[1:], start=tensor.start + i * size, nbytes=size)
            for i, name in enumerate(names)
        }

    def _check_complete(self) -> None:
        count = self.config["num_hidden_layers"]
        if count > len(self._names):  # before a list is made for a damaged file's billion
            what = f"{count} layers are announced, and there are {len(self._names)} tensors"
            raise CheckpointError(what, where=str(self.path), hint="a damaged file, or an unsupported variant")
        parts = [*self._arch.layer.values(), *(name.format(0) for name in self._arch.experts.values())]
        needed = [f"model.layers.{i}.{part}.weight" for i in range(count) for part in parts]
        missing = [n for n in ("model.embed_tokens.weight", "model.norm.weight", *needed) if n not in self._names]
        if missing:
            what = f"{len(missing)} tensors are missing, the first is {missing[0]}"
            raise CheckpointError(what, where=str(self.path), hint="a damaged file, or an unsupported variant")
        for name, tensor in self._names.items():
            if name.startswith("model.layers.") and int(name.split(".")[2]) >= count:
                raise CheckpointError(f"the model has only {count} layers", where=self._at(tensor))

    def _plain(self, tensor: GgufTensor) -> Tensor:
        if tensor.type not in _PLAIN:
            raise CheckpointError(f"must be floating point, not {tensor.type}", where=self._at(tensor))
        return torch.frombuffer(self._file.raw(tensor), dtype=_PLAIN[tensor.type]).view(tensor.shape)

    def _blocks(self, tensor: GgufTensor) -> Tensor:
        raw = torch.frombuffer(self._file.raw(tensor), dtype=torch.uint8)
        return raw.view(GGML[tensor.type].layout(tensor.shape)["blocks"].shape)

    def _decoded(self, tensor: GgufTensor) -> Tensor:
        ggml, blocks = GGML[tensor.type], self._blocks(tensor)
        if self._noise is None:
            return ggml.decode({"blocks": blocks}, tensor.shape)
        raw = blocks.view(-1, ggml.block[1])
        w = torch.empty(len(raw), ggml.block[0])
        per = _CHUNK // ggml.block[0]
        for i, noise in enumerate(self._noise.draw(tensor.name, per * ggml.block[0])):
            rows = slice(i * per, (i + 1) * per)
            values, steps = ggml.expand(raw[rows])
            w[rows] = values + noise.view_as(values) * steps
        return w.view(tensor.shape)

    def _heads(self, tensor: GgufTensor) -> int:
        """Of a tensor whose rows come in another order than Hugging Face's; 0 for all others."""
        if self._arch.interleaved and ".attn_q." in tensor.name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if self._arch.interleaved and ".attn_k." in tensor.name else 0

    def _unpermute(self, tensor: GgufTensor, w: Tensor, heads: int) -> Tensor:
        """Rows from interleaved rotary order (pairs side by side) to Hugging Face's (halves apart)."""
        if w.shape[0] % (2 * heads):
            raise CheckpointError(f"{w.shape[0]} rows do not make {heads} heads", where=self._at(tensor))
        rows = w.view(heads, w.shape[0] // heads // 2, 2, *w.shape[1:])
        return rows.transpose(1, 2).reshape(w.shape)


def _dtype_name(tensors: Any) -> str:
    """The floating point type that the model is best held in: that of most weights, bfloat16 if they are quantized."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += prod(tensor.shape)
    most = sizes.most_common(1)[0][0] if sizes else "bf16"
    return str(_PLAIN.get(most, torch.bfloat16)).removeprefix("torch.")


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """First and last-but-one of each run of consecutive numbers."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i


def _quantized(file: GgufParts) -> list[GgufTensor]:
    return [t for t in file.tensors.values() if t.type not in _PLAIN]


class _Noise:
    """One uniform number in [-0.5, 0.5) for each block-quantized weight, drawn in the order of the tensors' names.

    Every tensor has its fixed place in one stream of a Mersenne twister, whatever order the tensors are read in; the
    states at the starts of tensors are kept so that each number is generated about once.
    """

    def __init__(self, seed: int, tensors: list[GgufTensor]) -> None:
        ordered = sorted(tensors, key=lambda t: t.name)
        self._order = {t.name: i for i, t in enumerate(ordered)}
        self._sizes = [prod(t.shape) for t in ordered]
        self._states = {0: torch.Generator().manual_seed(seed).get_state()}

    def draw(self, name: str, chunk: int) -> Iterator[Tensor]:
        """The tensor's noise, float32, in pieces of `chunk` numbers."""
        index = self._order[name]
        known = sorted(self._states)
        start = known[bisect_right(known, index) - 1]
        generator = torch.Generator()
        generator.set_state(self._states[start])
        for skipped in range(start, index):
            for _ in self._numbers(generator, self._sizes[skipped], chunk):
                pass
            self._states[skipped + 1] = generator.get_state()
        yield from self._numbers(generator, self._sizes[index], chunk)
        self._states[index + 1] = generator.get_state()

    @staticmethod
    def _numbers(generator: torch.Generator, count: int, chunk: int) -> Iterator[Tensor]:
        for start in range(0, count, chunk):
            yield torch.rand(min(chunk, count - start), generator=generator) - 0.5
