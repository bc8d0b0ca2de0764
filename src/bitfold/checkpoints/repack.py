"""From one container into another: codes go over as they are where both hold the same numbers, else rounded anew.

Streams tensor by tensor. What will be rounded is known, and said, before anything is written; what it lost afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitfold.checkpoints.base import Source
from bitfold.checkpoints.gguf.described import describe_model
from bitfold.checkpoints.gguf.imatrix import Importance, read_imatrix
from bitfold.checkpoints.gguf.mixtures import Facts, Typed, base_type, typed
from bitfold.checkpoints.packed.written import is_embedding
from bitfold.checkpoints.schema import Content, Entry, describe
from bitfold.checkpoints.staging import found_at, open_output, written_aside
from bitfold.checkpoints.targets import ENGINES, FOLDER, GGUF, open_target
from bitfold.errors import CheckpointError, UsageError
from bitfold.formats import get_format
from bitfold.qtensor import QTensor
from bitfold.system import progress
from bitfold.system.tensorinfo import TensorInfo
from bitfold.system.units import size_text

BITFOLD = "bitfold"
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_NAMED = {"float32": torch.float32, "float16": torch.float16}
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Repacked:
    """What was written.

    Args:
        path: the file (of several the first) or folder.
        nbytes: of its files of weights.
        exact: tensors whose numbers are those of the source, bit for bit.
        losses: |w - w'|^2 / |w|^2 of the others.
    """

    path: Path
    nbytes: int
    exact: int
    losses: Mapping[str, float] = field(default_factory=dict)


Judge = Callable[[Path, Mapping[str, float]], None]


def repack(
    src: str | Path,
    out: str | Path,
    to: str,
    pre_tokenizer: str | None = None,
    judge: Judge | None = None,
    imatrix: str | Path | None = None,
    max_shard_bytes: int | None = None,
) -> Repacked:
    """Write a checkpoint in another container.

    Args:
        src: a GGUF file, a bitfold folder or a Hugging Face folder.
        out: the file (GGUF) or folder (bitfold) to make; must not exist.
        to: "gguf": every tensor in the type that it has; "gguf:Q4_K_M" and the like: in the types of that mixture,
            rounded without data where they are others; "bitfold": a bitfold folder with every tensor in the type that
            it has; "compressed-tensors", "gptq", "awq", "auto-round": codes as they are, for other engines.
        pre_tokenizer: for GGUF files, see `open_source`.
        judge: told where the result lies and what its tensors lost before it gets its name; what it raises undoes it.
        imatrix: a file that says how much the inputs of each tensor matter, see `read_imatrix`; what is rounded anew is
            rounded accordingly.
        max_shard_bytes: size at which a new file is begun; None: SHARD_BYTES in folders, and one GGUF file.

    Raises:
        UsageError: an unknown kind, or an importance matrix where nothing is rounded.
        CheckpointError: an output that exists, a source that cannot be read, or that the container cannot hold.
    """
    from bitfold.checkpoints import open_source

    kind, _, mixture = to.partition(":")
    if kind not in (GGUF, BITFOLD, *ENGINES) or (kind != GGUF and mixture):
        hint = f"bitfold, gguf, gguf:TYPE as in gguf:Q4_K_M, {', '.join(ENGINES)}"
        raise UsageError(f"unknown kind of checkpoint {to!r}", hint=hint)
    if mixture:
        base_type(mixture)
    elif imatrix is not None:
        raise UsageError("nothing is rounded anew, so nothing is weighed", where="--imatrix", hint="--to gguf:Q4_K_M")
    importance = {} if imatrix is None else read_imatrix(imatrix).entries
    target = FOLDER if kind == BITFOLD else kind
    place = open_output(out, Path(src), single=kind == GGUF)
    source = open_source(Path(src), pre_tokenizer=pre_tokenizer)
    try:
        stored = {name: source.content(name) for name in source.names() if not _repeats(source, name)}
        contents = types_of(source, stored, mixture) if mixture else stored
        contents = _for_engines(source, contents) if kind in ENGINES else contents
        single = "model.gguf" if kind == GGUF else None
        with written_aside(place, single) as folder:
            made = _Repacking(source, stored, contents, importance)
            nbytes, first = made.write(f"{target}:{mixture}" if mixture else target, folder, max_shard_bytes)
            if judge is not None:
                judge(folder if single is None else first, made.losses)
    finally:
        source.close()
    return Repacked(found_at(place) or place, nbytes, len(contents) - len(made.losses), made.losses)


def _for_engines(source: Source, stored: Mapping[str, Content]) -> dict[str, Content]:
    """With plain embeddings, and a plain output head where its format is not that of the other layers: engines know
    linear layers of one kind of integers."""
    formats = [content.format for content in stored.values() if isinstance(content, Entry)]
    usual = max(formats, key=formats.count, default=None)
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    dtype = _NAMED.get(str(named), torch.bfloat16)
    found = dict(stored)
    for name, content in stored.items():
        if isinstance(content, Entry) and (is_embedding(name) or (name == _HEAD and content.format != usual)):
            found[name] = TensorInfo(dtype, content.model_shape)
    return found


def _repeats(source: Source, name: str) -> bool:
    """An output head that is written beside the embedding to which it is tied."""
    return name == _HEAD and bool(source.config.get("tie_word_embeddings")) and len(source.names()) > 1


def types_of(source: Source, stored: Mapping[str, Content], mixture: str) -> dict[str, Content]:
    """What every tensor is in a mixture, by the name that it has in the model.

    Raises:
        CheckpointError: a model, or a tensor, that GGUF has no place for.
    """
    shapes = {
        name: content.model_shape if isinstance(content, Entry) else content.shape for name, content in stored.items()
    }
    found = contents_of(mixture_of(source, shapes, mixture), shapes)
    same = {name for name, now in found.items() if isinstance(now, Entry) and _equal(stored[name], now)}
    return {name: stored[name] if name in same else now for name, now in found.items()}


def _equal(before: Content, now: Entry) -> bool:
    return isinstance(before, Entry) and before.to_dict() == now.to_dict()


def contents_of(types: Mapping[str, Typed], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Content]:
    """Tensors of these types."""
    return {
        name: TensorInfo(_DTYPES[choice.type], shapes[name])
        if choice.type in _DTYPES
        else Entry(get_format(choice.type), shapes[name])
        for name, choice in types.items()
    }


def mixture_of(source: Source, shapes: Mapping[str, tuple[int, ...]], mixture: str) -> dict[str, Typed]:
    """The ggml type of every tensor of a model.

    Args:
        source: whose config counts.
        shapes: of its tensors, by their names in the model.
        mixture: by name.
    """
    model = describe_model(source.config, "", str(source.path))
    heads, kv_heads = model.heads
    experts = int(model.metadata.get(f"{model.name}.expert_count", 0))
    facts = Facts(int(model.metadata[f"{model.name}.block_count"]), heads // kv_heads, experts, _HEAD not in shapes)
    return {name: typed(mixture, model.gguf_name(name) or name, shape, facts) for name, shape in shapes.items()}


def importance_by_tensor(
    source: Source, importance: Mapping[str, Importance], contents: Mapping[str, Content]
) -> dict[str, torch.Tensor]:
    """By what the errors of each tensor are weighed, column by column, by the names of the model.

    Raises:
        CheckpointError: an entry of another width than its tensor: the matrix is of another model.
    """
    if not importance:
        return {}
    model, found = describe_model(source.config, "", str(source.path)), {}
    for name, content in contents.items():
        shape = content.shape
        place = next(iter(model.arch.places(name)), None)
        entry = importance.get(name if place is None else place.name)
        if entry is None or len(shape) < 2:
            continue
        weights = entry.weights
        if place is not None and place.expert is not None and weights.dim() == 2 and place.expert < len(weights):
            weights = weights[place.expert]
        if weights.shape[-1] != shape[-1] or (weights.dim() == 2 and len(weights) != shape[0]):
            what = f"the importance matrix has {tuple(weights.shape)} inputs of a weight {tuple(shape)}"
            raise CheckpointError(what, where=name, hint="it is of another model")
        found[name] = weights if weights.dim() == 1 else weights[:, None]
    if not found:
        raise CheckpointError("the importance matrix knows no tensor of this model", where=str(source.path))
    return found


def fallbacks(types: Mapping[str, Typed], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """In words, what rows get another type than the mixture wants, and how many."""
    counts: dict[tuple[str, str, int], int] = {}
    for name, choice in types.items():
        if choice.instead_of is not None:
            key = (choice.instead_of, choice.type, shapes[name][-1])
            counts[key] = counts.get(key, 0) + 1
    return [
        f"{count} tensors with rows of {columns} are {got.upper()} instead of {wanted.upper()}, whose blocks of 256 do"
        " not divide them"
        for (wanted, got, columns), count in sorted(counts.items())
    ]


class _Repacking:
    """One source on its way.

    Args:
        source: open.
        stored: how every tensor is stored in it.
        contents: how every tensor is to be stored.
        importance: of inputs, by the names of GGUF.
    """

    def __init__(
        self,
        source: Source,
        stored: Mapping[str, Content],
        contents: Mapping[str, Content],
        importance: Mapping[str, Importance],
    ) -> None:
        self._source, self._stored, self._contents = source, stored, contents
        self._importance = importance_by_tensor(source, importance, contents)
        self.losses: dict[str, float] = {}

    def write(self, kind: str, folder: Path, max_shard_bytes: int | None) -> tuple[int, Path]:
        """Write all tensors; returns the bytes of the files of weights, and the first."""
        target = open_target(kind, folder, max_shard_bytes, self._source)
        contents = {name: c if isinstance(c, Entry) else target.plain(c) for name, c in self._contents.items()}
        target.layout(contents)
        nbytes = target.size(contents)
        again = [name for name, content in contents.items() if not self._same(name, content)]
        first = f", such as {again[0]}" if again else ""
        exact = f"exact but for {target.but_for}" if target.but_for else "exact: nothing is rounded"
        what = f"{len(again)} of {len(contents)} tensors are rounded anew{first}" if again else exact
        progress.say(f"{size_text(nbytes)}; {what}")
        with progress.bar("convert", len(contents)) as bar:
            for name, content in contents.items():
                if isinstance(content, Entry):
                    target.pack(name, self._packed(name, content))
                else:
                    target.write(name, [self._plain(name, content)])
                bar.advance(1, name)
        self.losses |= target.rounded
        entries = {name: content for name, content in contents.items() if isinstance(content, Entry)}
        if target.single is None:
            self._source.copy_side_files(folder)
        kept = {name: "as it was" for name in contents if name not in entries}
        target.finish(self._source.config, describe(entries, kept) if entries else None)
        return nbytes, folder / target.files[0]

    def _same(self, name: str, content: Content) -> bool:
        """Whether a tensor keeps its numbers whatever they are."""
        before = self._stored[name]
        if isinstance(content, Entry) or isinstance(before, Entry):
            return content is before or content == before
        return before.dtype == content.dtype or torch.promote_types(before.dtype, content.dtype) == content.dtype

    def _packed(self, name: str, content: Entry) -> Mapping[str, torch.Tensor]:
        if self._same(name, content):
            return self._source.fields(name)
        w = self._source.read(name).float()
        encode = content.format.weighted
        assert encode is not None  # what is rounded anew is a type of ggml
        q = QTensor(content.format, content.shape, encode(w.view(content.shape), self._importance.get(name)))
        self._lost(name, w, q.dequantize().view(w.shape))
        return q.fields

    def _plain(self, name: str, content: TensorInfo) -> torch.Tensor:
        w = self._source.read(name)
        cast = w.to(content.dtype)
        if not self._same(name, content):
            self._lost(name, w, cast)
        return cast

    def _lost(self, name: str, w: torch.Tensor, found: torch.Tensor) -> None:
        difference, whole = (w.double() - found.double()).square().sum(), w.double().square().sum()
        if (loss := float(difference / whole) if whole > 0 else 0.0) > 0:
            self.losses[name] = loss
