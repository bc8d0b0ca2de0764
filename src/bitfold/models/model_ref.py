"""A model to run: a folder, a Hub repository or a module that is already in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.checkpoints import open_source
from bitfold.errors import CheckpointError, ModelError, UsageError
from bitfold.nn import set_tensor

Model = str | Path | nn.Module
DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": None,
}

_STREAMED = ("AutoModelForCausalLM", "AutoModelForMaskedLM")
_QUANTIZED = "quantization_config"
_NOT_CAUSAL = "masked language models: bitfold eval --metric masked; other encoders: --metric embedding"


@dataclass(frozen=True)
class ModelRef:
    """A model, not loaded before it is needed.

    Args:
        path: its folder or GGUF file, or None.
        module: the model itself, or None.
        config: contents of its config.json, of a GGUF file what it amounts to; empty for a module.
    """

    path: Path | None
    module: nn.Module | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, *, revision: str | None = None) -> ModelRef:
        """Find the model; repositories are downloaded.

        Raises:
            UsageError: a file, or something that is not a model at all.
            CheckpointError, HubError: no such folder or repository, a folder without config.json or with files that
                cannot be read, or one that another program quantized.
        """
        if isinstance(model, nn.Module):
            return cls(None, model)
        if not isinstance(model, (str, Path)):
            raise UsageError(f"a model is a folder, a repository or a module, not {type(model).__name__}")
        from bitfold.checkpoints.hub.transfer import resolve

        path = resolve(model, revision=revision)
        source = open_source(path)  # before texts are read or a tokenizer is asked for
        source.close()
        return cls(source.path, None, read_config(source.path) if source.path.is_dir() else source.config)

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path) if self.path is not None else type(self.module).__name__

    @property
    def longest(self) -> int | None:
        """Positions that the model was built for; None when its config does not say."""
        config = self.config
        if self.module is not None and (own := getattr(self.module, "config", None)) is not None:
            config = own.to_dict()
        text_config = config.get("text_config") or config
        limit = text_config.get("max_position_embeddings") or text_config.get("n_positions")
        return int(limit) if limit else None

    def require_causal(self, hint: str) -> None:
        """ModelError for a folder whose architecture does not predict the next token.

        Without it, transformers would put a random head on an encoder.
        """
        name = self._architecture()
        if name is None:
            return
        causal = name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        if not causal or self.config.get("is_encoder_decoder"):
            raise ModelError(f"{name} does not predict the next token", where=self.name, hint=hint)

    def require_masked(self, hint: str) -> None:
        """ModelError for a folder whose architecture does not fill in hidden tokens."""
        name = self._architecture()
        if name is not None and not name.endswith(("ForMaskedLM", "ForPreTraining")):
            raise ModelError(f"{name} does not fill in masked tokens", where=self.name, hint=hint)

    def require_kind(self, auto_class: str) -> None:
        """`require_causal` or `require_masked`, whichever transformers' "AutoModelFor..." class is for."""
        if auto_class == "AutoModelForMaskedLM":
            self.require_masked("causal language models: bitfold eval --metric lm; other encoders: --metric embedding")
        else:
            self.require_causal(_NOT_CAUSAL)

    def _architecture(self) -> str | None:
        names = self.config.get("architectures")
        return str(names[0]) if names else None

    def tokenizer(self) -> Any:
        """The tokenizer of the folder; UsageError for a module."""
        if self.path is None:
            raise UsageError("a module has no tokenizer", where=self.name, hint="pass tokenizer=")
        source = open_source(self.path)
        try:
            return source.tokenizer()
        finally:
            source.close()

    def load(self, auto_class: str, dtype: torch.dtype | None) -> nn.Module:
        """The model, in evaluation mode.

        Args:
            auto_class: how transformers calls the kind of model, such as "AutoModelForCausalLM".
            dtype: what plain weights are computed in; None: as they are stored.

        Raises:
            ModelError: transformers cannot build it, or tensors are missing.
        """
        if self.module is not None:
            return self.module.eval()
        assert self.path is not None
        if is_bitfold(self.config):
            return _load_bitfold(self.path, dtype)
        return _load_plain(self.path, auto_class, dtype)

    def fingerprint(self) -> str:
        """Hash that changes when the weights or the config do: names, sizes and times of the files."""
        assert self.path is not None
        hasher = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in weight_files(self.path):
            state = file.stat()
            hasher.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        return hasher.hexdigest()


def read_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for "auto", which means: as stored. UsageError for others."""
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", hint=f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def is_bitfold(config: dict[str, Any]) -> bool:
    """Whether config.json says that bitfold quantized the checkpoint."""
    return (config.get("quantization_config") or {}).get("quant_method") == "bitfold"


def weight_files(folder: Path) -> list[Path]:
    """Its safetensors files, or all files with weights when it has none."""
    files = sorted(folder.glob("*.safetensors"))
    return files or sorted(f for f in folder.iterdir() if f.suffix in (".bin", ".gguf", ".pt"))


def _load_bitfold(path: Path, dtype: torch.dtype | None) -> nn.Module:
    from bitfold.models.load import load_folder

    return load_folder(path, dtype=dtype)


def _load_plain(path: Path, auto_class: str, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    if dtype is not None and auto_class in _STREAMED and (streamed := _stream(path, dtype)) is not None:
        return streamed
    wanted: torch.dtype | str = "auto" if dtype is None else dtype
    auto = getattr(transformers, auto_class)
    try:
        with _quiet_transformers():
            model, report = auto.from_pretrained(path, dtype=wanted, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"transformers cannot load it: {_line(error)}", where=str(path)) from error
    # The pooler of an encoder is drawn at random when the checkpoint comes from masked-language training; no metric
    # here looks at it.
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise ModelError(
            f"{len(missing)} tensors of {type(model).__name__} are missing, among them {missing[0]}", where=str(path)
        )
    module: nn.Module = model
    return module.eval()


def _stream(path: Path, dtype: torch.dtype) -> nn.Module | None:
    """The model, converted tensor by tensor: transformers would keep the whole file mapped beside the converted copy.

    None where the class that the config names is not known, or not that of a plain language model.
    """
    from bitfold.models import skeleton
    from bitfold.models.mapping import map_names
    from bitfold.models.opening import open_skeleton

    source = open_source(path)
    try:
        names = source.config.get("architectures") or [""]
        model: Any = None
        if names[0].endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")) and not source.config.get(_QUANTIZED):
            model = open_skeleton(source, dtype=dtype)
        if model is None:
            return None
        for target in map_names(source.names(), model):
            if target.used:
                for name, w in target.read(source.read, model).items():
                    set_tensor(model, name, w.to(dtype, copy=True) if w.is_floating_point() else w.clone())
        skeleton.retie(model)
    finally:
        source.close()
    if left := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ModelError(
            f"{len(left)} tensors of {type(model).__name__} are missing, among them {left[0]}", where=str(path)
        )
    if (path / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(path))
    module: nn.Module = model.eval()
    return module


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No second progress bar and no table of unused tensors on the terminal: we report what matters ourselves."""
    import transformers.utils.logging as logging_module

    logging: Any = logging_module
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    """First line of a message, for errors that must fit one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
