"""The files beside the weights that belong to a model: carried over whole, folders too.

Tokenizers, vocabularies, processors, templates, pooling and normalization (`1_Pooling/`), pictures of the card. Not the
weights, and no config whose weights stay behind: it would make the output another model, or none that can be loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from bitfold.checkpoints.base import Source
from bitfold.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
WEIGHTS = (
    *(".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".tflite", ".mlmodel", ".pte"),
    *PICKLES,
)
_INDEX = re.compile(r".*\.(?:safetensors|bin|h5|msgpack|pt|pth)\.index(?:\.[\w-]+)?\.json")
# What bitfold writes itself, and what says that the folder is an adapter: transformers would look for its base model.
_LEFT = ("config.json", "README.md", "bitfold_manifest.json", "bitfold_report.json", "adapter_config.json")
_PICKLED = (b"PK\x03\x04", b"\x80")  # how PyTorch's files and other pickles begin
_NAMED_WEIGHTS = re.compile(
    r"(?:pytorch_|adapter_|openvino_|tf_|flax_)?(?:model|weights)\b.*|optimizer.*|training_args.*"
)


def side_files(names: Iterable[str], modules: Iterable[str] = ()) -> list[str]:
    """The files to carry over, of all files of a model.

    Args:
        names: paths from the model's folder, with slashes.
        modules: folders that are modules of a sentence-transformers model, see `module_folders`: their weights belong
            to the model.

    A folder that holds weights is another packing of the model, another model or an adapter (`onnx/`, `original/`,
    `checkpoint-500/`): nothing of it is carried over, unless it is a module.
    """
    names, own = sorted(names), set(modules)
    foreign = {top for name in names if (top := _top(name)) and top not in own and _is_other(name)}
    return [name for name in names if _carried(name, own, foreign)]


def _carried(name: str, own: set[str], foreign: set[str]) -> bool:
    parts, top = PurePosixPath(name).parts, _top(name)
    if top in foreign or any(part.startswith(".") or part == "__pycache__" for part in parts):
        return False
    if "tfevents" in parts[-1]:
        return False
    if top in own:
        return True
    return not is_weights(parts[-1]) and not (top is None and name in _LEFT)


def _top(name: str) -> str | None:
    """The folder directly below the model's in which a file is; None for the files of the model's folder itself."""
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else None


def _is_other(name: str) -> bool:
    file = PurePosixPath(name).name
    return file == "adapter_config.json" or is_weights(file)


def is_weights(file: str) -> bool:
    """Whether a file of that name holds weights, or says where they are; `.bin` only under the names of weights."""
    if file.endswith((".bin", ".npz")):
        return _NAMED_WEIGHTS.fullmatch(file) is not None
    return file.endswith(WEIGHTS) or _INDEX.fullmatch(file) is not None


def module_folders(modules_json: str) -> list[str]:
    """The folders that a sentence-transformers modules.json names; none when it makes no sense."""
    try:
        paths = [str(module["path"]) for module in json.loads(modules_json)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return [path for path in paths if path and _top(f"{path}/x") == path]


def copy_side_files(source: Path, out_dir: Path) -> list[str]:
    """Copy the files beside the weights (not config.json, not the model card); names of what was copied.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    modules = source / "modules.json"
    try:
        own = module_folders(modules.read_text(encoding="utf-8", errors="replace")) if modules.is_file() else []
        copied = [name for name in side_files(_files(source), own) if not _is_pickle(source / name, own)]
        for name in copied:
            (out_dir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, out_dir / name)
    except OSError as error:
        raise CheckpointError(f"cannot be copied: {error}", where=error.filename or str(source)) from error
    return copied


def tokenizer_folder(source: Source, scratch: Path) -> Path:
    """Where the tokenizer of a checkpoint is: its folder; what a file carries inside is written into `scratch`."""
    if source.path.is_dir():
        return source.path
    scratch.mkdir(exist_ok=True)
    source.copy_side_files(scratch)
    (scratch / "config.json").write_text(json.dumps(source.config), encoding="utf-8")
    return scratch


def _files(folder: Path) -> Iterator[str]:
    """All files below a folder; links to folders are not followed, they may lead anywhere."""
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(at, name).relative_to(folder).as_posix() for name in files if Path(at, name).is_file())


def _is_pickle(file: Path, own: list[str]) -> bool:
    """Whether a `.bin` file of whatever name is pickled; those of language models for speech are not."""
    if file.suffix != ".bin" or file.parent.name in own:
        return False
    with file.open("rb") as stream:
        return stream.read(4).startswith(_PICKLED)
