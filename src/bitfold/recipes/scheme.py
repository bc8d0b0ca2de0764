"""How a weight is quantized: what the words of a rule stand for, looked up once, where the words come in."""

from __future__ import annotations

from dataclasses import dataclass

from bitfold.errors import RecipeError, UsageError
from bitfold.formats import AnyFormat, get_format
from bitfold.methods.fits import NamedFit, get_fit
from bitfold.methods.pruning import Sparsity, read_sparsity
from bitfold.methods.solvers import Solver, get_solver
from bitfold.transforms import TransformSpec, transform_spec
from bitfold.transforms.activations import Act, read_act

# The words that stand where a rule and its method say nothing.
DEFAULTS = {"solver": "rtn", "fit": "mse", "transform": "none", "act": "float", "prune": "none"}


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized. Equal schemes do the same, whatever rule they come from.

    Args:
        format: what is stored.
        solver: chooses the codes.
        fit: chooses the scales.
        transform: the basis.
        activations: how the layer's inputs are treated at run time.
        sparsity: what becomes zero; None = nothing.
    """

    format: AnyFormat
    solver: Solver
    fit: NamedFit
    transform: TransformSpec
    activations: Act
    sparsity: Sparsity | None = None

    @property
    def needs_text(self) -> bool:
        """Whether calibration is needed to follow it."""
        data = self.sparsity is not None or self.transform.diagonal or self.activations.static
        return data or self.fit.needs_hessian or self.solver.needs_hessian

    @property
    def takes_ranges(self) -> bool:
        """Whether the inputs of a layer can be taken in ranges, see hessian.py."""
        plain = self.sparsity is None and not self.fit.needs_hessian and not self.transform.diagonal
        return plain and self.solver.feeds_errors


def read_scheme(
    format: str,
    solver: str = DEFAULTS["solver"],
    fit: str = DEFAULTS["fit"],
    transform: str = DEFAULTS["transform"],
    act: str = DEFAULTS["act"],
    prune: str = DEFAULTS["prune"],
) -> Scheme:
    """The scheme that these words mean, see `Rule`.

    Raises:
        FormatError: an unknown format.
        UsageError: an unknown solver or fit.
        RecipeError: anything else that is unknown, or words that contradict each other.
    """
    chosen, solve, choose = get_format(format), get_solver(solver), get_fit(fit)
    if chosen.plain and (transform, act) != ("none", "float"):
        raise RecipeError(f"{format} stores ordinary tensors, which know no transform and no activation type")
    try:
        found = Scheme(chosen, solve, choose, transform_spec(transform), read_act(act), read_sparsity(prune))
    except UsageError as error:
        raise RecipeError(error.what, hint=error.hint) from error
    if found.sparsity is not None and found.sparsity.on_the_way and not solve.feeds_errors:
        raise RecipeError("sparsegpt needs a solver that feeds errors forward", hint="--method ldlq or gptq")
    if found.activations.static and found.transform.rotates:
        raise RecipeError("static activation scales are known only without a rotation", hint="act int8")
    return found
