"""Any readable checkpoint -> an ordinary Hugging Face folder of plain floating point weights.

Streams tensor by tensor into a folder aside, which takes its final name only when it is complete.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bitfold.checkpoints.base import Source, TensorInfo
from bitfold.checkpoints.staging import open_output, written_aside
from bitfold.checkpoints.targets import FOLDER, open_target
from bitfold.errors import CheckpointError, UsageError
from bitfold.system import progress

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert(
    src: str | Path,
    out_dir: str | Path,
    dtype: str = "bfloat16",
    dither_seed: int | None = None,
    max_shard_bytes: int | None = None,
    pre_tokenizer: str | None = None,
) -> Path:
    """Write `src` as an unquantized Hugging Face checkpoint: sharded safetensors, config, tokenizer, a short card.

    Args:
        src: a GGUF file, a bitfold folder (which is dequantized) or a Hugging Face folder.
        out_dir: the new folder; must not exist or be empty.
        dtype: of all floating point tensors: "bfloat16", "float16", "float32", or "auto": as they are read.
        dither_seed: for GGUF files: noise within the quantization steps, see `GgufSource`; the card says so.
        max_shard_bytes: size at which a new file is begun; None: SHARD_BYTES.
        pre_tokenizer: for GGUF files, see `open_source`.

    Returns: the folder.

    Raises:
        UsageError: an unknown dtype, or dithering of something that is not a GGUF file.
        CheckpointError: an output that exists, a source that cannot be read, a weight that float16 cannot hold.
    """
    if dtype not in (*_DTYPES, "auto"):
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join([*_DTYPES, 'auto'])}")
    out = open_output(out_dir, Path(src))
    source = _open(Path(src), dither_seed, pre_tokenizer)
    try:
        with written_aside(out) as folder:
            _write(source, folder, _DTYPES.get(dtype), max_shard_bytes)
            (folder / "README.md").write_text(_card(out.name, source, dtype, dither_seed), encoding="utf-8")
    finally:
        source.close()
    return out


def _open(src: Path, dither_seed: int | None, pre_tokenizer: str | None) -> Source:
    from bitfold.checkpoints import find_checkpoint, open_source

    if dither_seed is None:
        return open_source(src, pre_tokenizer=pre_tokenizer)
    src = find_checkpoint(src)
    if not src.is_file():
        raise UsageError("only the weights of a GGUF file can be dithered", where=str(src))
    from bitfold.checkpoints.gguf.source import GgufSource

    return GgufSource(src, dither_seed, pre_tokenizer)


def _write(source: Source, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int | None) -> None:
    infos = {name: source.info(name) for name in source.names()}  # raises before anything is written
    target = open_target(FOLDER, folder, max_shard_bytes)
    target.layout({name: _cast_info(info, dtype) for name, info in infos.items()})
    with progress.bar("convert", sum(info.numel for info in infos.values())) as bar:
        for name, info in infos.items():
            target.write(name, [_cast(source.read(name), dtype, name)])
            bar.advance(info.numel, name)
    source.copy_side_files(folder)
    config = {k: v for k, v in source.config.items() if k != "torch_dtype"}
    target.finish(config if dtype is None else {**config, "dtype": str(dtype).removeprefix("torch.")})


def _cast_info(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return info if dtype is None or not info.dtype.is_floating_point else TensorInfo(dtype, info.shape)


def _cast(w: torch.Tensor, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    if dtype is None or not w.is_floating_point():
        return w
    cast = w.to(dtype)
    if dtype == torch.float16 and (torch.isinf(cast) & ~torch.isinf(w)).any():
        raise CheckpointError("a weight exceeds the range of float16", where=name, hint="use bfloat16")
    return cast


def _card(title: str, source: Source, dtype: str, dither_seed: int | None) -> str:
    text = f"# {title}\n\nWritten by `bitfold` from `{source.path.name}`, weights in {dtype}.\n"
    if dither_seed is None:
        return text
    return text + (
        f"\nThe source is quantized; uniform noise within half a step of its block (seed {dither_seed}) was added to\n"
        "each weight, so that they do not lie on its lattice. They are a plausible draw of the original weights, not\n"
        "the original weights: compare quantized versions with this folder, not with the published model.\n"
    )
