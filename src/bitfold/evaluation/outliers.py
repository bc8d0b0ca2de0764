"""Outliers: a few hidden dimensions far larger than the rest, which is what makes activations hard to quantize.

After LLM.int8() (Dettmers et al. 2022): a feature is a hidden dimension that exceeds 6 in magnitude, among the inputs
of the projections into attention and feed-forward; it counts as an outlier feature of the model when it does so in at
least 25 % of these inputs and at 6 % of the positions of the sequence. Beside that, for the inputs of every layer:
kurtosis (3 for a Gaussian) and largest over median magnitude, as they are, after a randomised Hadamard rotation, and
after the scaling of SmoothQuant (Xiao et al. 2023: s_j = sqrt(max |x_j| / max |w_j|)); and the same two numbers for the
weights.

Two passes over the text: the scaling needs the maxima of all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import nn

from bitfold.errors import ModelError
from bitfold.evaluation.reading import CausalPassages
from bitfold.evaluation.scoring import perplexity
from bitfold.models.model_ref import Model, ModelRef, read_dtype
from bitfold.models.sites import LINEAR, find_sites
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.nn import QLinear
from bitfold.system import progress
from bitfold.text import windows as texts
from bitfold.text.start import start_name, text_start
from bitfold.transforms import Hadamard

THRESHOLD, LAYER_SHARE, POSITION_SHARE = 6.0, 0.25, 0.06
BASES = ("none", "hadamard", "smooth")
_SAMPLE = 1 << 16  # magnitudes that a median is taken of, for each layer and window
_SEED = 0  # of the rotation
Numbers = dict[str, float]
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one or more linear layers that share them.

    Args:
        layers: paths of the layers.
        width: dimensions.
        beyond: dimensions that exceed 6 somewhere.
        kurtosis, ratio, largest: by basis ("none", "hadamard", "smooth"): fourth moment over squared variance; largest
            over median magnitude; largest magnitude.
    """

    layers: tuple[str, ...]
    width: int
    beyond: int
    kurtosis: Numbers
    ratio: Numbers
    largest: Numbers


@dataclass(frozen=True)
class Feature:
    """A hidden dimension that exceeds 6.

    Args:
        dimension: its index.
        layers: share of the projections into attention and feed-forward at whose inputs it does.
        positions: share of the sequence positions at which it does, in any layer.
        largest: magnitude.
        systematic: at least 25 % of the layers and 6 % of the positions.
    """

    dimension: int
    layers: float
    positions: float
    largest: float
    systematic: bool


@dataclass(frozen=True)
class WeightSpikes:
    """One weight: kurtosis and largest over median magnitude, by basis ("none", "hadamard")."""

    tensor: str
    kurtosis: Numbers
    ratio: Numbers


@dataclass
class Outliers:
    """What was found in one model.

    Args:
        model: its name.
        parameters: how many it has, packed ones counted as weights.
        perplexity: on the text.
        text, start_token, tokens: what it read, and what each window began with (None: nothing).
        hidden: width of the hidden states.
        layers_affected: share of these projections whose inputs exceed 6 in an outlier feature.
        positions_affected: share of positions at which an outlier feature exceeds 6.
        features: all dimensions beyond 6, the most widespread first.
        inputs, weights: layer by layer.
    """

    model: str
    parameters: int
    perplexity: float
    text: str
    start_token: str | None
    tokens: int
    hidden: int
    layers_affected: float
    positions_affected: float
    features: list[Feature] = field(default_factory=list)
    inputs: list[LayerInputs] = field(default_factory=list)
    weights: list[WeightSpikes] = field(default_factory=list)

    @property
    def systematic(self) -> int:
        """How many outlier features it has, in the sense of LLM.int8()."""
        return sum(f.systematic for f in self.features)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        inputs = [{**asdict(i), "layers": list(i.layers)} for i in self.inputs]
        return {**asdict(self), "systematic": self.systematic, "inputs": inputs}


@dataclass
class _LayerGroup:
    """Layers with one input, and what is counted of it."""

    layers: list[str]
    weights: list[torch.Tensor]
    width: int
    largest: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    magnitudes: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    tops: Numbers = field(default_factory=dict)

    def reads(self, hidden: int) -> bool:
        """Whether the input is the hidden state itself, and not the heads' outputs, which may be as wide."""
        return self.width == hidden and (len(self.layers) > 1 or self.weights[0].shape[0] != hidden)

    def smooth(self) -> Change:
        """x -> x / s with the scaling of SmoothQuant at alpha = 1/2; dimensions that are always zero stay."""
        strongest = torch.stack([w.float().abs().amax(0) for w in self.weights]).amax(0)
        s = (self.largest / strongest).sqrt()
        s = torch.where(torch.isfinite(s) & (s > 0), s, torch.ones_like(s))
        return lambda x: x / s

    def add(self, basis: str, x: torch.Tensor) -> None:
        """Count inputs (tokens, width) in a basis."""
        square = x * x
        sums = [y.sum(dtype=torch.float64) for y in (x, square, square * x, square * square)]
        powers = torch.stack([torch.tensor(float(x.numel()), dtype=torch.float64), *sums])
        self.moments[basis] = self.moments.get(basis, torch.zeros(5, dtype=torch.float64)) + powers
        self.tops[basis] = max(self.tops.get(basis, 0.0), float(x.abs().max()))
        flat = x.flatten()
        self.magnitudes.setdefault(basis, []).append(flat[:: -(-flat.numel() // _SAMPLE)].abs())

    def result(self) -> LayerInputs:
        """The numbers."""
        medians = {b: float(torch.cat(parts).median()) for b, parts in self.magnitudes.items()}
        return LayerInputs(
            tuple(self.layers),
            self.width,
            int((self.largest >= THRESHOLD).sum()),
            {b: _kurtosis(m) for b, m in self.moments.items()},
            {b: top / max(medians[b], 1e-30) for b, top in self.tops.items()},
            dict(self.tops),
        )


def _kurtosis(powers: torch.Tensor) -> float:
    """Fourth central moment over squared variance, from the sums of x^0 ... x^4; 0 for a constant."""
    count, a, b, c, d = powers.tolist()
    mean, b, c, d = a / count, b / count, c / count, d / count
    variance = b - mean**2
    fourth = d - 4 * mean * c + 6 * mean**2 * b - 3 * mean**4
    return fourth / variance**2 if variance > 1e-30 else 0.0


def find_outliers(
    model: Model,
    text: str | PathLike[str] | None = None,
    *,
    context: int = 512,
    max_tokens: int = 4096,
    dtype: str = "float32",
    tokenizer: Any = None,
    revision: str | None = None,
    start_token: bool = True,
) -> Outliers:
    """Look for outliers in a causal language model, quantized or not.

    Args:
        model: folder, Hub repository or module; the whole of it is in memory.
        text: see `text.documents.text_pieces`.
        context, max_tokens: tokens of a window, and in all.
        dtype: of the arithmetic.
        tokenizer: for a module.
        revision: of the repository.
        start_token: windows begin as the tokenizer begins a text.

    Raises:
        ModelError: not a causal language model, or one without linear layers.
        UsageError: too little text.
    """
    subject = ModelRef.of(model, revision=revision)
    subject.require_causal("activations are inspected in causal language models")
    tokenizer = tokenizer or subject.tokenizer()
    ids = texts.read_tokens(text, tokenizer, enough=max_tokens)
    start = text_start(tokenizer, start_token)
    windows = texts.cut(ids, min(context, max_tokens, subject.longest or context), None, max_tokens, start)
    loaded = subject.load("AutoModelForCausalLM", read_dtype(dtype))
    refuse_unknown_tokens(loaded, windows.ids, tokenizer)
    name = subject.path.name if subject.path is not None else subject.name
    with torch.no_grad():
        groups = _groups(loaded, windows.ids[:1, :8])
        if not groups:
            raise ModelError("has no linear layers to look at", where=name)
        hidden = _hidden_size(loaded, groups)
        seen = _Seen(hidden, windows.ids.numel())
        value = _first_pass(loaded, groups, windows, seen)
        _second_pass(loaded, groups, windows.ids)
        features, layers, positions = seen.features()
        weights = [spikes for group in groups for spikes in _spikes(group)]
    read = (texts.text_name(text), start_name(start, tokenizer), windows.ids.numel())
    result = Outliers(name, _parameters(loaded), value, *read, hidden, layers, positions)
    result.features, result.inputs, result.weights = features, [g.result() for g in groups], weights
    return result


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and weight (n, k) of the linear layers, output heads left out."""
    for site in find_sites(model):
        if site.kind == LINEAR and site.keep is None:
            w = model.get_parameter(site.tensor).detach()
            yield site.module, w.T if site.transposed else w
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    for path, module in model.named_modules():
        if isinstance(module, QLinear) and module is not head:
            w = module.weight.dequantize()
            yield path, w.T if module.weight.transposed else w


def _groups(model: nn.Module, ids: torch.Tensor) -> list[_LayerGroup]:
    """Layers that run, grouped by their input, in the order of their execution."""
    weights = dict(_linear_layers(model))
    found: dict[tuple[int, int], _LayerGroup] = {}
    alive: list[torch.Tensor] = []  # keeps the inputs, so that no two of them get the same address

    def note(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            alive.append(x)
            width = x.shape[-1]
            group = found.setdefault((x.data_ptr(), width), _LayerGroup([], [], width, torch.zeros(width)))
            if layer not in group.layers:
                group.layers.append(layer)
                group.weights.append(weights[layer])

        return hook

    _run(model, ids, {layer: note(layer) for layer in weights})
    return list(found.values())


def _run(model: nn.Module, ids: torch.Tensor, hooks: dict[str, Callable[..., None]]) -> None:
    with ExitStack() as stack:
        for layer, hook in hooks.items():
            stack.callback(model.get_submodule(layer).register_forward_pre_hook(hook).remove)
        body = getattr(model, "base_model", model)
        body(input_ids=ids.to(next(model.parameters()).device), use_cache=False)


def _hidden_size(model: nn.Module, groups: list[_LayerGroup]) -> int:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    size = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None)
    return int(size) if size else groups[0].width


class _Seen:
    """Which dimensions of the hidden states exceed the threshold, where."""

    def __init__(self, hidden: int, tokens: int) -> None:
        self.where = torch.zeros(tokens, hidden, dtype=torch.bool)
        self.layers: list[torch.Tensor] = []
        self.largest = torch.zeros(hidden)

    def features(self) -> tuple[list[Feature], float, float]:
        """Features, and the shares of layers and of positions that the systematic ones affect."""
        by_layer = torch.stack(self.layers) if self.layers else torch.zeros(1, len(self.largest), dtype=torch.bool)
        layers, positions = by_layer.double().mean(0), self.where.double().mean(0)
        systematic = (layers >= LAYER_SHARE) & (positions >= POSITION_SHARE)
        features = [
            Feature(j, float(layers[j]), float(positions[j]), float(self.largest[j]), bool(systematic[j]))
            for j in by_layer.any(0).nonzero().flatten().tolist()
        ]
        features.sort(key=lambda f: (-f.layers, -f.positions))
        touched = by_layer[:, systematic].any(1), self.where[:, systematic].any(1)
        return features, float(touched[0].double().mean()), float(touched[1].double().mean())


def _first_pass(model: nn.Module, groups: list[_LayerGroup], windows: texts.Windows, seen: _Seen) -> float:
    """Maxima of every dimension, and the perplexity."""
    at = [0] * len(groups)
    hidden = len(seen.largest)
    beyond = {i: torch.zeros(hidden, dtype=torch.bool) for i, g in enumerate(groups) if g.reads(hidden)}

    def watch(index: int, group: _LayerGroup) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, group.width).float().abs().cpu()
            group.largest = torch.maximum(group.largest, x.amax(0))
            if index in beyond:
                over = x >= THRESHOLD
                beyond[index] |= over.any(0)
                if at[index] + len(x) <= len(seen.where):  # experts see some of the tokens only: they have no place
                    seen.where[at[index] : at[index] + len(x)] |= over
                at[index] += len(x)

        return hook

    nll, passages = 0.0, CausalPassages(windows)
    with ExitStack() as stack, progress.bar("activations", passages.total) as bar:
        for i, group in enumerate(groups):
            hook = watch(i, group)
            stack.callback(model.get_submodule(group.layers[0]).register_forward_pre_hook(hook).remove)
        for piece in passages.read(model, 1):
            nll -= torch.log_softmax(piece.logits, -1).gather(1, piece.targets[:, None]).double().sum().item()
            bar.advance(len(piece.targets))
    seen.layers = [beyond[i] for i in sorted(beyond)]
    seen.largest = torch.stack([groups[i].largest for i in sorted(beyond)] or [seen.largest]).amax(0)
    if not math.isfinite(nll):
        raise ModelError("NaN or infinity in its predictions", where=type(model).__name__)
    return perplexity(nll, passages.total)


def _second_pass(model: nn.Module, groups: list[_LayerGroup], ids: torch.Tensor) -> None:
    def measure(group: _LayerGroup) -> Callable[..., None]:
        rotate, smooth = Hadamard(group.width, _SEED), group.smooth()

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, group.width).float().cpu()
            for basis, y in zip(BASES, (x, rotate(x), smooth(x)), strict=True):
                group.add(basis, y)

        return hook

    hooks = {group.layers[0]: measure(group) for group in groups}
    with progress.bar("transforms", len(ids)) as bar:
        for window in ids:
            _run(model, window[None], hooks)
            bar.advance()


def _spikes(group: _LayerGroup) -> Iterator[WeightSpikes]:
    rotate = Hadamard(group.width, _SEED)
    for layer, w in zip(group.layers, group.weights, strict=True):
        numbers: list[Numbers] = [{}, {}]
        for basis, y in (("none", w.float()), ("hadamard", rotate(w.float()))):
            scratch = _LayerGroup([], [], group.width, group.largest)
            scratch.add(basis, y)
            numbers[0][basis] = _kurtosis(scratch.moments[basis])
            numbers[1][basis] = scratch.tops[basis] / max(float(scratch.magnitudes[basis][0].median()), 1e-30)
        yield WeightSpikes(f"{layer}.weight", *numbers)


def _parameters(model: nn.Module) -> int:
    packed = {id(m.weight): math.prod(m.weight.qshape) for m in model.modules() if isinstance(m, QLinear)}
    return sum(p.numel() for p in model.parameters() if p.is_floating_point()) + sum(packed.values())
