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

from bitfold.checkpoints import Source, open_source
from bitfold.checkpoints.gguf.parts import part_paths
from bitfold.checkpoints.safetensors import read_config
from bitfold.errors import ModelError, UsageError
from bitfold.models import skeleton
from bitfold.models.limits import positions
from bitfold.models.load import load_folder, load_packed, load_plain, placed
from bitfold.system import backend

Model = str | Path | nn.Module
DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": None,
}

_STREAMED = ("AutoModelForCausalLM", "AutoModelForMaskedLM")
_CAUSAL = _STREAMED[0]
# Endings of classes that predict the next token; some of them look at pictures as well.
_PREDICT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForVisionText2Text", "ForImageTextToText")
_ANSWERS = (
    "what was lost stands in the folder, tensor by tensor (bitfold report); what it writes can be compared with what"
    " the original writes (bitfold generate)"
)
_NOT_CAUSAL = "masked language models: bitfold eval --metric masked; other encoders: --metric embedding"


@dataclass(frozen=True)
class ModelRef:
    """A model, not loaded before it is needed.

    Args:
        path: its folder or GGUF file, or None.
        module: the model itself, or None.
        config: contents of its config.json, of what another program packed what it amounts to; empty for a module.
        packed: it is a GGUF file or a folder that another program packed, and runs on the packed weights.
    """

    path: Path | None
    module: nn.Module | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False
    _open: list[Source] = field(default_factory=list, repr=False, compare=False)

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
        from bitfold.checkpoints.hub.fetch import resolve

        path = resolve(model, revision=revision)
        source = open_source(path)  # before texts are read or a tokenizer is asked for
        own = source.quantization is not None
        config = read_config(source.path) if own else source.config
        return cls(source.path, None, config, source.packed is not None, [source])

    def source(self) -> Source:
        """The checkpoint, open: as it was found, until `load` has closed it, and opened anew after that."""
        assert self.path is not None
        if not self._open:
            self._open.append(open_source(self.path))
        return self._open[0]

    def close(self) -> None:
        """Release the checkpoint; what was read of it stays."""
        while self._open:
            self._open.pop().close()

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path) if self.path is not None else type(self.module).__name__

    @property
    def longest(self) -> int | None:
        """Positions that the model was built for; None when its config does not say."""
        if self.module is not None:
            config = getattr(self.module, "config", None)
        else:
            config = skeleton.config_object(self.config, self.name)
        return None if config is None else positions(config)

    def require_causal(self, hint: str) -> None:
        """ModelError for a folder whose architecture does not predict the next token.

        Without it, transformers would put a random head on an encoder.
        """
        name = self._architecture()
        if name is None:
            return
        if self.encodes_first():
            what = f"{name} is an encoder-decoder: it answers a text, and does not go on with it"
            raise ModelError(what, where=self.name, hint=_ANSWERS)
        if not name.endswith(_PREDICT):
            raise ModelError(f"{name} does not predict the next token", where=self.name, hint=hint)

    def require_generation(self, hint: str) -> None:
        """ModelError for a folder whose architecture writes no text, whether it goes on with one or answers it."""
        found = None if self.path is None else skeleton.model_class(self.config)
        if found is not None and not found.can_generate():
            raise ModelError(f"{found.__name__} generates no text", where=self.name, hint=hint)

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
        if names := skeleton.architectures(self.config):
            return names[0]
        found = skeleton.model_class(self.config)
        return None if found is None else str(found.__name__)

    def encodes_first(self) -> bool:
        """Whether it has an encoder beside its decoder: its config says so, or its text model's, or their defaults."""
        found = skeleton.config_object(self.config, self.name) if self.config.get("model_type") else None
        parts = [found, getattr(found, "text_config", None)]
        said = [self.config.get("is_encoder_decoder"), *(getattr(part, "is_encoder_decoder", None) for part in parts)]
        return any(value is True for value in said)

    def tokenizer(self, plain: bool = False) -> Any:
        """The tokenizer of the checkpoint; UsageError for a module. `plain`: see `Source.tokenizer`."""
        if self.path is None:
            raise UsageError("a module has no tokenizer", where=self.name, hint="pass tokenizer=")
        return self.source().tokenizer(plain=plain)

    def load(
        self, auto_class: str, dtype: torch.dtype | None, *, decoded: bool = False, device: torch.device = backend.CPU
    ) -> nn.Module:
        """The model, in evaluation mode.

        Args:
            auto_class: how transformers calls the kind of model, such as "AutoModelForCausalLM".
            dtype: what plain weights are computed in; None: as they are stored.
            decoded: what is `packed` becomes a model of ordinary parameters.
            device: where it is to run.

        Raises:
            ModelError: transformers cannot build it, or tensors are missing.
            UsageError: a module that is to run somewhere else than it is.
        """
        if self.module is not None:
            if device.type not in ("cpu", next(self.module.parameters()).device.type):
                raise UsageError("a module runs where it is", where=self.name, hint=f"model.to({str(device)!r})")
            return self.module.eval()
        assert self.path is not None
        try:
            if is_bitfold(self.config):
                return placed(load_folder(self.path, dtype=dtype), device)
            if self.packed:
                model = (load_plain if decoded else load_packed)(self.source(), dtype)
            else:
                model = _load_plain(self.source(), auto_class, dtype)
        finally:
            self.close()
        model = placed(model, device)
        if auto_class == _CAUSAL:
            _require_text_alone(model, self.name)
        return model

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


def is_bitfold(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that bitfold quantized the checkpoint."""
    return (config.get("quantization_config") or {}).get("quant_method") == "bitfold"


def weight_files(path: Path) -> list[Path]:
    """Of a folder its safetensors files, or all files with weights when it has none; of a GGUF file all its parts."""
    if path.is_file():
        return part_paths(path)
    files = sorted(path.glob("*.safetensors"))
    return files or sorted(f for f in path.iterdir() if f.suffix in (".bin", ".gguf", ".pt"))


def _load_plain(source: Source, auto_class: str, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    path, config = source.path, source.config

    # The class of the checkpoint itself, where one knows how it is to be judged: transformers' AutoModelForCausalLM has
    # no place for models of text and images, and would make others of some.
    own = skeleton.model_class(config) if auto_class in _STREAMED else None
    if own is not None and not own.__name__.endswith((*_PREDICT, "ForMaskedLM")):
        own = None  # BertForPreTraining, say, is judged as BertForMaskedLM
    if own is not None:
        return load_plain(source, dtype)
    wanted: torch.dtype | str = "auto" if dtype is None else dtype
    loader = own or getattr(transformers, auto_class)
    try:
        with _quiet_transformers(), _without_adapters():
            model, report = loader.from_pretrained(path, dtype=wanted, output_loading_info=True)
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


@torch.no_grad()
def _require_text_alone(model: Any, name: str) -> None:
    """ModelError for a model that does not run on tokens alone, as one that wants a picture with each text."""
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    except Exception as error:  # whatever its forward pass stumbles over
        what = f"{type(model).__name__} does not run on text alone: {_line(error)}"
        raise ModelError(
            what, where=name, hint="only its language part can be judged, as a model of its own"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != ids.shape:
        raise ModelError(f"{type(model).__name__} gives no prediction for each token", where=name)


@contextmanager
def _without_adapters() -> Iterator[None]:
    """The model alone: transformers would put an adapter on it that lies beside, as trainers leave merged ones."""
    import transformers.modeling_utils as modeling

    module: Any = modeling
    before = module.maybe_load_adapters
    module.maybe_load_adapters = lambda path, _download, **adapter: (None, path, adapter)
    try:
        yield
    finally:
        module.maybe_load_adapters = before


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
