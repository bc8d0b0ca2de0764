"""Where the damage sits: what each quantized tensor lost, by itself.

Three numbers for a tensor W that became W', from weak to strong evidence:

* the relative weight error |W - W'|^2 / |W|^2;
* the relative output error |x W^T - x W'^T|^2 / |x W^T|^2 under the inputs x that the original model gives the layer;
* the KL divergence of the original model with this one tensor swapped in from the original model.

The original is in memory whole, the quantized tensors one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.checkpoints import Source, open_source
from bitfold.errors import CheckpointError, ModelError, UsageError
from bitfold.evaluation.reading import CausalPassages
from bitfold.evaluation.scoring import divergence
from bitfold.models.model_ref import Model, ModelRef, read_dtype
from bitfold.models.sites import LINEAR, Site, find_sites
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.system import backend, progress
from bitfold.text import windows as texts
from bitfold.text.start import start_name, text_start

ALL = -1
_QUANTIZE = "`bitfold quantize` makes folders that are; GGUF files of block types are"


@dataclass
class LayerError:
    """One quantized tensor.

    Args:
        tensor: its name.
        format: of the quantized weight.
        shape: as the model has it.
        bpw: stored bits per weight.
        weight_error: relative square error of the weight.
        output_error: relative square error of the layer's output; None for what is no linear layer, or never ran.
        swap_kl: mean KL divergence, nats a token, when only this tensor is swapped; None when it was not tried.
    """

    tensor: str
    format: str
    shape: tuple[int, ...]
    bpw: float
    weight_error: float
    output_error: float | None = None
    swap_kl: float | None = None


@dataclass
class LayerErrors:
    """All quantized tensors of a model.

    Args:
        layers: one for each tensor, in the order of the model.
        text: name of the text.
        start_token: what each window begins with; None for nothing.
        tokens: under how many tokens output errors were measured.
        swap_tokens: on how many predictions a swap was measured.
    """

    text: str
    start_token: str | None
    tokens: int
    swap_tokens: int = 0
    layers: list[LayerError] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys as the attributes."""
        return {**asdict(self), "layers": [{**asdict(e), "shape": list(e.shape)} for e in self.layers]}


def layer_errors(
    model: str | Path,
    reference: Model,
    text: str | PathLike[str] | None = None,
    *,
    context: int = 512,
    max_tokens: int = 2048,
    swaps: int = 0,
    swap_tokens: int = 512,
    dtype: str = "float32",
    tokenizer: Any = None,
    start_token: bool = True,
    device: str | torch.device = "cpu",
) -> LayerErrors:
    """Compare every quantized tensor of a folder with the original one.

    Args:
        model: a folder that bitfold wrote, its Hub repository, or a GGUF file.
        reference: the original, a causal language model: folder, repository or module.
        text: see `text.documents.text_pieces`; None: the text that quantizing calibrates on by default.
        context, max_tokens: tokens of a window, and in all, for output errors.
        swaps: how many tensors to swap, spread evenly over the model; -1: all. Each is a forward pass.
        swap_tokens: on how many tokens a swap is measured.
        dtype: of the original's arithmetic.
        tokenizer: for a reference that is a module.
        start_token: windows begin as the tokenizer begins a text.
        device: where the original runs and errors are added up, in numbers of 64 bits.

    Raises:
        CheckpointError: nothing in it is quantized.
        ModelError: the reference does not have the tensors of the model.
        UsageError: too little text.
    """
    place = backend.find_device(device)
    backend.require_doubles(place, "the sum of errors")
    subject, against = ModelRef.of(model), ModelRef.of(reference)
    assert subject.path is not None
    source = open_source(subject.path)
    if not source.quantized():
        raise CheckpointError("holds nothing that is quantized", where=subject.name, hint=_QUANTIZE)
    against.require_causal("layer errors are for causal language models")
    tokenizer = against.tokenizer() if tokenizer is None else tokenizer
    text = texts.CALIBRATION if text is None else text
    ids = texts.read_tokens(text, tokenizer, enough=max_tokens)
    start = text_start(tokenizer, start_token)
    context = min(context, max_tokens, against.longest or context)
    windows = texts.cut(ids, context, None, max_tokens, start)
    original = against.load("AutoModelForCausalLM", read_dtype(dtype), decoded=True, device=place)
    refuse_unknown_tokens(original, windows.ids, tokenizer)
    sites = _matching(original, source, subject.name)
    result = LayerErrors(texts.text_name(text), start_name(start, tokenizer), windows.ids.numel())
    with backend.within_memory(place):
        result.layers = list(_weight_errors(original, source, sites))
        outputs = _output_errors(original, source, sites, windows.ids)
        for layer in result.layers:
            layer.output_error = outputs.get(layer.tensor)
        if swaps:
            result.swap_tokens = _swap(original, source, result.layers, (swaps, windows.head(swap_tokens)))
    return result


def _matching(original: nn.Module, source: Source, name: str) -> dict[str, Site]:
    """Sites of the original by tensor name; ModelError when it lacks a quantized tensor."""
    sites = {n: site for site in find_sites(original) for n in (site.tensor, *site.aliases)}
    for tensor in source.quantized():
        if tensor not in sites or sites[tensor].shape != source.info(tensor).shape:
            raise ModelError(
                f"the reference has no tensor {tensor} of shape {source.info(tensor).shape}",
                where=name,
                hint="give the unquantized original as --reference",
            )
    return sites


def _parameter(model: nn.Module, site: Site) -> torch.Tensor:
    return model.get_parameter(site.tensor).detach()


def _weight_errors(original: nn.Module, source: Source, sites: dict[str, Site]) -> Iterator[LayerError]:
    stored = source.quantized()
    with progress.bar("weights", len(stored)) as bar:
        for name, how in stored.items():
            w = _parameter(original, sites[name])
            square, norm = _square(w - source.read(name).to(w)), _square(w)
            error = square / norm if norm > 0 else 0.0
            yield LayerError(name, how.format, tuple(w.shape), how.bpw, error)
            bar.advance(1, name)


def _square(x: torch.Tensor) -> float:
    """Sum of squares, a few rows at a time in double precision."""
    return sum(float(part.double().square().sum()) for part in torch.split(x, 1024))


@torch.no_grad()
def _output_errors(original: nn.Module, source: Source, sites: dict[str, Site], ids: torch.Tensor) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    linear = [name for name in source.quantized() if sites[name].kind == LINEAR]
    with progress.bar("outputs", len(linear)) as bar, ExitStack() as stack:
        for name in linear:
            hook = _measuring(original, source, sites[name], sums.setdefault(name, [0.0, 0.0]), bar)
            handle = original.get_submodule(sites[name].module).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        _hidden_states(original, ids)
    return {name: loss / norm for name, (loss, norm) in sums.items() if norm > 0}


def _measuring(
    original: nn.Module, source: Source, site: Site, sums: list[float], bar: progress.Bar
) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x, w = inputs[0].reshape(-1, inputs[0].shape[-1]), _parameter(original, site)
        change = w - source.read(site.tensor).to(w)
        for i, matrix in enumerate((change, w)):
            sums[i] += _square(x @ (matrix if site.transposed else matrix.T))
        bar.advance(1, site.tensor)

    return hook


def _hidden_states(model: nn.Module, ids: torch.Tensor) -> None:
    """Run the model for its hooks; the logits are of no interest."""
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    body(input_ids=ids.to(device), use_cache=False)


@torch.no_grad()
def _swap(original: nn.Module, source: Source, layers: list[LayerError], how: tuple[int, texts.Windows]) -> int:
    count, windows = how
    passages = CausalPassages(windows)
    if count != ALL and count < 1:
        raise UsageError(f"cannot swap {count} tensors", where="--swaps", hint="a number, or -1 for all")
    step = 1.0 if count == ALL or count >= len(layers) else len(layers) / count
    chosen = sorted({int((i + 0.5) * step) for i in range(int(len(layers) / step))})
    before = [torch.log_softmax(piece.logits, -1) for piece in passages.read(original, len(windows))]
    with progress.bar("swap one tensor", len(chosen)) as bar:
        for i in chosen:
            with _swapped(original, layers[i].tensor, source.read(layers[i].tensor)):
                pieces = passages.read(original, len(windows))
                kl = [
                    divergence(p, torch.log_softmax(b.logits, -1), "swap") for p, b in zip(before, pieces, strict=True)
                ]
            layers[i].swap_kl = float(torch.cat(kl).double().mean())
            bar.advance(1, layers[i].tensor)
    return passages.total


@contextmanager
def _swapped(model: nn.Module, name: str, w: torch.Tensor) -> Iterator[None]:
    parameter = model.get_parameter(name)
    kept = parameter.data
    parameter.data = w.to(kept)
    try:
        yield
    finally:
        parameter.data = kept
