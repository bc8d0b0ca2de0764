"""Quantization-aware training: layers that round their weights in every forward pass, and train through it.

The gradient of rounding is taken to be one (the straight-through estimator: Bengio et al. 2013, arXiv 1308.3432; for
weights of networks Jacob et al. 2018, arXiv 1712.05877). Weights stay parameters in floating point, so any loop and any
optimizer trains them; what the forward pass multiplies with is what the packed folder will hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from bitfold.errors import UsageError
from bitfold.kernels.activations import quantize_tokens
from bitfold.methods.fits import NamedFit, get_fit
from bitfold.methods.quantize import quantize_tensor
from bitfold.models.save import save
from bitfold.models.sites import Site, find_sites
from bitfold.models.swap import decide, in_basis, swap, transform_of
from bitfold.nn import QEmbedding, QLinear
from bitfold.qtensor import QTensor
from bitfold.recipes.recipe import Recipe
from bitfold.recipes.scheme import DEFAULTS
from bitfold.transforms import Transform
from bitfold.transforms.activations import Act, read_act


class Rounding(nn.Module):
    """What a weight is in few bits, with gradients as if it had not been rounded.

    Args:
        site: the weight's place in the model.
        format, fit: into which numbers, by which scales; rounded to nearest, without data.
        transform: the basis in which it is rounded.
        act: how the layer's inputs come.
        seed, every: of solvers that draw numbers; in training it is rounded anew once the weight has changed so many
            times, and the rounded weight stays as it was in between.
    """

    def __init__(
        self, site: Site, format: Any, fit: NamedFit, transform: Transform | None, act: Act, how: tuple[int, int]
    ) -> None:
        super().__init__()
        self.site, self.format, self.fit, self.transform, self.act = site, format, fit, transform, act
        self.seed, self.every = how
        self._known: tuple[Any, ...] | None = None  # the weight of which `_rounded` is the rounding
        self._seen: tuple[Any, ...] | None = None
        self._age = 0
        self._rounded = torch.empty(0)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """The rounded weight, in the dtype and shape of the model's."""
        through: Any = _Through
        rounded: torch.Tensor = through.apply(w, self._current(w))
        return rounded

    @torch.no_grad()
    def code(self, w: torch.Tensor) -> QTensor:
        """The weight in codes, as it is stored."""
        oriented = in_basis(w.detach(), self.site, self.transform)
        return quantize_tensor(oriented.float(), self.format, fit=self.fit, seed=self.seed)

    @torch.no_grad()
    def _current(self, w: torch.Tensor) -> torch.Tensor:
        state = (w._version, w.data_ptr(), float(w.detach().sum(dtype=torch.float32)))
        if state != self._seen:
            self._seen, self._age = state, self._age + 1
        if state != self._known and (self._known is None or not self.training or self._age >= self.every):
            decoded = self.code(w).dequantize()
            back = decoded if self.transform is None else self.transform.inverse(decoded)
            self._rounded = self.site.restored(back).to(w.dtype).reshape(w.shape).contiguous()
            self._known, self._age = state, 0
        return self._rounded


class _Through(torch.autograd.Function):
    """w, its rounding -> the rounding; the gradient goes to w."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return grads[0], None


def prepare_qat(model: nn.Module, recipe: Recipe | str | None = None, *, seed: int = 0, every: int = 1) -> nn.Module:
    """Let the layers of a model round their weights whenever they run.

    Args:
        model: any module, changed in place; with a recipe one of floating point, without one a model of `bitfold.load`,
            whose packed linear layers become trainable and keep their formats.
        recipe: rules, or the name of one format for everything, as for `quantize_`. Its formats, fits and transforms
            count, and float or int8 activations.
        seed: of rotations.
        every: optimizer steps after which weights are rounded anew, for formats whose encoder takes its time (trellis).
            In evaluation they always are.

    Returns:
        The same module.

    Raises:
        UsageError: nothing in it is quantized, or a rule asks for more than rounding to nearest.
        FormatError: a format that cannot hold a weight, with its name.
    """
    if every < 1:
        raise UsageError(f"rounded anew after {every} steps", where="every", hint="1, or more for trellis formats")
    made = list(_of_packed(model, (seed, every)) if recipe is None else _of_recipe(model, recipe, (seed, every)))
    if not made:
        raise UsageError("has no layers to train in few bits", where=type(model).__name__, hint="give a recipe")
    for rounding in made:
        for name in (rounding.site.tensor, *rounding.site.aliases):
            path, _, parameter = name.rpartition(".")
            owner = model.get_submodule(path)
            getattr(owner, parameter).requires_grad_(True)
            parametrize.register_parametrization(owner, parameter, rounding, unsafe=True)
        if rounding.act.kernel == "int8":
            model.get_submodule(rounding.site.module).register_forward_pre_hook(_rounding_of_inputs(rounding))
    return model


def _of_recipe(model: nn.Module, recipe: Recipe | str, how: tuple[int, int]) -> Iterator[Rounding]:
    rules = Recipe.of(recipe) if isinstance(recipe, str) else recipe
    for site in find_sites(model):
        scheme, _ = decide(rules, site)
        if scheme is None or scheme.format.plain:
            continue
        if scheme.needs_text or scheme.solver.name != DEFAULTS["solver"]:
            what = "training rounds to nearest, without calibration text"
            raise UsageError(what, where=site.tensor, hint="a rule with method rtn, and a transform none or hadamard")
        act = read_act("float") if scheme.activations.measured else scheme.activations
        yield _checked(Rounding(site, scheme.format, scheme.fit, transform_of(scheme, site, how[0]), act, how))


def _of_packed(model: nn.Module, how: tuple[int, int]) -> Iterator[Rounding]:
    """Linear layers whose packed weight nothing else uses, made into ordinary ones."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, QEmbedding)}
    found = {path: m for path, m in model.named_modules() if isinstance(m, QLinear)}
    own = {p: m for p, m in found.items() if m._modules.get("weight") is m.weight and id(m.weight) not in tables}
    shared = [id(m.weight) for m in found.values()]
    for path, layer in own.items():
        if shared.count(id(layer.weight)) > 1:
            continue
        weight, (parent, _, child) = layer.weight, path.rpartition(".")
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.dequantize().contiguous())
        plain.register_parameter("bias", layer.bias)
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
        site = Site(f"{path}.weight", "linear", tuple(plain.weight.shape))
        yield _checked(
            Rounding(site, weight.format, get_fit(DEFAULTS["fit"]), weight.transform, read_act(weight.act), how)
        )


def _checked(rounding: Rounding) -> Rounding:
    act, basis = rounding.act, rounding.transform
    rotated = basis is None or basis.describe()["kind"] == "hadamard"
    if act.static or act.threshold is not None or (act.kernel == "int8" and not rotated):
        what = f"activations {act.name} cannot be trained with"
        raise UsageError(what, where=rounding.site.tensor, hint="act float or int8")
    return rounding


def _rounding_of_inputs(rounding: Rounding) -> Any:
    """What int8 kernels do to the inputs of a layer; gradients pass."""

    def hook(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, through = inputs[0], _Through
        with torch.no_grad():
            turned = x if rounding.transform is None else rounding.transform(x)
            codes, scale = quantize_tokens(turned.reshape(-1, turned.shape[-1]))
            back = (codes * scale).to(x.dtype).view(x.shape)
            back = back if rounding.transform is None else rounding.transform.inverse(back)
        return (through.apply(x, back.to(x.dtype)), *inputs[1:])  # type: ignore[no-untyped-call]

    return hook


def convert_qat(model: nn.Module, out: str | Path | None = None, *, tokenizer: Any = None) -> nn.Module:
    """Make a model of `prepare_qat` a packed one, and write it.

    Args:
        model: changed in place; what it computes in evaluation stays, to rounding.
        out: the folder to make, which `bitfold.load` reads; None: nothing is written.
        tokenizer: of transformers, saved along.

    Returns:
        The same module, with quantized layers.

    Raises:
        UsageError: it was not prepared.
        CheckpointError: the folder exists, or cannot be written.
    """
    places = [
        (module, name, part)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for name, parts in module.parametrizations.items()  # type: ignore[union-attr,operator]
        for part in parts
        if isinstance(part, Rounding)
    ]
    if not places:
        raise UsageError("was not prepared", where=type(model).__name__, hint="bitfold.prepare_qat(model, format)")
    done: dict[int, tuple[Rounding, QTensor]] = {}
    for module, name, rounding in places:
        if id(rounding) not in done:
            original: Any = module.parametrizations[name]  # type: ignore[index]
            done[id(rounding)] = rounding, rounding.code(original.original)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for rounding, q in done.values():
        swap(model, rounding.site, q, act=rounding.act.name, transform=rounding.transform)
    if out is not None:
        save(model, out)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(out))
    return model
