"""From a loaded model to the native engine's plan: addresses, in the order in which a token meets them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.engine.families import FAMILIES, Family, Mixture
from bitfold.kernels import KERNELS
from bitfold.nn import QLinear, QWeight
from bitfold.system import memory, native
from bitfold.transforms import Diagonal, Hadamard, Transform
from bitfold.transforms.activations import read_act
from bitfold.transforms.rotation import rotation_plan

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LOOPS = (KERNELS["cpu"], KERNELS["ggml"], KERNELS["lattice"])  # kernels whose state has a native `weight`
_BAND = 32  # rows of a weight that one thread takes at least
_KEYS = 16  # a head must be a multiple of it
_ANGLES = 1024  # positions at a time: the allocator keeps for long what a module throws away at once
_DYNAMIC = ("dynamic", "longrope")  # rotary angles that change with the length of the text


class Unsupported(Exception):
    """Why the engine cannot run a model; its text follows "the engine does not run it: "."""


@dataclass
class _Plan:
    """A native plan in the making, and the tensors that it points to."""

    core: Any
    family: Family
    alive: list[Any] = field(default_factory=list)
    nbytes: int = 0  # of the weights that every token reads
    weights: int = 0

    def address(self, x: Tensor) -> int:
        """Of a tensor's numbers, which live as long as the plan."""
        x = x.detach().contiguous()
        self.alive.append(x)
        return x.data_ptr()

    def norm(self, module: nn.Module | None, config: Any, *, one_plus: bool) -> Any:
        if module is None:
            return self.core.Norm(0, 1e-6)
        weight = module.weight.detach().float()  # type: ignore[operator]
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or config.rms_norm_eps
        return self.core.Norm(self.address(weight + 1 if one_plus else weight), float(eps))

    def product(self, module: nn.Module, first: int) -> Any:
        """Rows `first` ... of the products of an input."""
        if type(module) not in (nn.Linear, QLinear) or module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported(f"a layer of another kind, {type(module).__name__}, or one with hooks")  # adapters
        made = self.rows(module.weight, first)
        bias = getattr(module, "bias", None)
        if bias is not None:
            made.add_bias(self.address(bias.float()))
        return made

    def rows(self, weight: Any, first: int, often: float = 1.0) -> Any:
        """The product with a weight (rows, columns); often: for how many of the tokens it is read."""
        self.nbytes += round(int(weight.nbytes) * often)
        self.weights += int(weight.shape[0] * weight.shape[1])
        return self._packed(weight, first) if isinstance(weight, QWeight) else self._plain(weight, first)

    def products(self, parent: nn.Module, names: tuple[str, ...]) -> list[Any]:
        found, first = [], 0
        for name in names:
            module = getattr(parent, name)
            found.append(self.product(module, first))
            first += int(module.weight.shape[0])
        return found

    def _packed(self, weight: QWeight, first: int) -> Any:
        act = read_act(weight.act)
        if act.static or act.threshold is not None:
            raise Unsupported(f"activations {weight.act} are not among what it rounds")
        loops = None if weight.transposed else next((k for k in _LOOPS if k.accepts(weight.qtensor, act.kernel)), None)
        if loops is None:
            raise Unsupported(f"it has no loops for {weight.format.name}")
        state = loops.prepack(weight.qtensor, act.kernel)
        self.alive.append(state)
        made = self.core.Product(state.weight, first, state.int8)
        self._turn(made, weight.transform, inverse=False)
        return made

    def _turn(self, made: Any, transform: Transform | None, *, inverse: bool) -> None:
        if isinstance(transform, Diagonal):
            if inverse:
                raise Unsupported("factors of an embedding are not undone")
            made.multiply(self.address(transform.fields()["input_scale"].float()))
        elif isinstance(transform, Hadamard):
            plan = rotation_plan(transform.size, transform.seed)
            self.alive.append(plan)
            made.rotation = plan.inverse if inverse else plan.forward
        elif transform is not None:
            raise Unsupported("a transform that it does not know")

    def _plain(self, weight: Tensor, first: int) -> Any:
        if weight.device.type != "cpu":
            raise Unsupported(f"weights on {weight.device.type}")
        if weight.dtype not in (torch.bfloat16, torch.float32):
            weight = weight.float()
        n, k = weight.shape
        return self.core.Product(self.address(weight), n, k, weight.dtype == torch.bfloat16, first)

    def embedding(self, module: nn.Module) -> Any:
        weight = module.weight
        if not isinstance(weight, QWeight):
            return self._plain(weight, 0)  # type: ignore[arg-type]
        made = self._packed(weight, 0)
        self._turn(made, weight.transform, inverse=True)
        return made


@dataclass(frozen=True)
class NativePlan:
    """What the core needs, what keeps its addresses valid, the bytes that every token reads, and more of the model.

    own_bytes: of the tensors in `alive` that are not the model's.
    """

    plan: Any
    alive: list[Any]
    positions: int
    nbytes: int
    weights: int
    biased_keys: bool
    own_bytes: int


def make_plan(model: nn.Module, positions: int) -> NativePlan:
    """The plan of a loaded causal language model for texts of up to `positions` tokens.

    Raises:
        Unsupported: a family, a format or a setting that the engine has no code for.
    """
    core = native.core()
    family = FAMILIES.get(type(model).__name__)
    if core is None:
        raise Unsupported("there is no native core here")
    if family is None:
        raise Unsupported(f"{type(model).__name__} is not among its families")
    config: Any = model.config
    body: Any = model.model
    made, plan = _Plan(core, family), core.Plan()
    _sizes(plan, core, family, config, body, positions)
    angles = _Angles(body, config, positions, made)
    plan.half = angles.half
    plan.embedding = made.embedding(body.embed_tokens)
    plan.last = made.norm(body.norm, config, one_plus=family.one_plus)
    plan.head = [made.product(model.lm_head, 0)]  # type: ignore[arg-type]
    plan.layers = [_layer(made, config, layer, i, angles) for i, layer in enumerate(body.layers)]
    biased = any(
        getattr(getattr(layer.self_attn, name, None), "bias", None) is not None
        for layer in body.layers
        for name in family.qkv
    )
    memory.trim()  # what was thrown away between what is kept can be as much again
    own = _own_bytes(made.alive, model)
    return NativePlan(plan, made.alive, positions, made.nbytes, made.weights, biased, own)


def _own_bytes(alive: Sequence[Any], model: nn.Module) -> int:
    """Memory of tensors, those in dataclasses and sequences as well, that the model does not hold anyway."""
    held, found = _storages([*model.parameters(), *model.buffers()]), _storages(alive)
    return sum(size for place, size in found.items() if place not in held)


def _storages(x: Any) -> dict[int, int]:
    """Address -> bytes."""
    if isinstance(x, Tensor):
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}
    if dataclasses.is_dataclass(x):
        x = [getattr(x, f.name) for f in dataclasses.fields(x)]
    if not isinstance(x, list | tuple):
        return {}
    return {place: size for part in x for place, size in _storages(part).items()}


def _sizes(plan: Any, core: Any, family: Family, config: Any, body: Any, positions: int) -> None:
    attention = body.layers[0].self_attn
    kind = getattr(config, "hidden_activation", None) or config.hidden_act
    if kind not in _ACTIVATIONS:
        raise Unsupported(f"the activation {kind}")
    widths = {module.shape[-1] for layer in body.layers for module in _downs(layer.mlp)}
    plan.hidden, plan.ffn, plan.vocabulary = config.hidden_size, max(widths), config.vocab_size
    plan.heads, plan.kv_heads, plan.dim = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    if plan.dim % _KEYS or plan.hidden % _KEYS or any(width % _BAND for width in widths):
        raise Unsupported(f"heads of {plan.dim}, {plan.hidden} or {', '.join(map(str, widths))} channels")
    if (plan.heads * plan.dim) % _BAND or (plan.kv_heads * plan.dim) % _BAND:
        raise Unsupported(f"{plan.heads} and {plan.kv_heads} heads of {plan.dim}")
    plan.positions = positions
    plan.activation = getattr(core.Activation, _ACTIVATIONS[kind])
    plan.score_scale = float(attention.scaling)
    plan.score_cap = float(getattr(config, "attn_logit_softcapping", None) or 0)
    plan.logit_cap = float(getattr(config, "final_logit_softcapping", None) or 0)
    scale = torch.tensor(family.embedding_scale(config))
    plan.embedding_scale = float(scale.to(body.embed_tokens.weight.dtype))  # as transformers rounds it
    plan.residual, plan.logit_scale = family.residual(config), family.logit_scale(config)


def _downs(mlp: nn.Module) -> list[Any]:
    """Weights that lead out of an MLP, or out of those of a mixture: (..., hidden, channels)."""
    found = [m.down_proj for m in mlp.modules() if hasattr(m, "down_proj")]
    return [getattr(x, "weight", x) if isinstance(x, nn.Linear | QLinear) else x for x in found]


class _Angles:
    """Cosines and sines of all positions, by the model's own rotary module, one table for each kind of layer."""

    def __init__(self, body: Any, config: Any, positions: int, made: _Plan) -> None:
        self._body, self._config, self._positions, self._made = body, config, positions, made
        self._tables: dict[str | None, tuple[int, int]] = {}
        self.half = 0
        self.of(0)

    def kind(self, index: int) -> str | None:
        """Of a layer: "sliding_attention", "full_attention", or None where all are alike."""
        kinds = getattr(self._config, "layer_types", None)
        return kinds[index] if kinds else None

    def of(self, index: int) -> tuple[int, int]:
        """Addresses of float32 (positions, half) cosines and sines of a layer."""
        kind = self.kind(index)
        if kind not in self._tables:
            self._tables[kind] = self._make(kind)
        return self._tables[kind]

    def _make(self, kind: str | None) -> tuple[int, int]:
        rotary = self._body.rotary_emb
        rope = rotary.rope_type
        kinds = rope if isinstance(rope, dict) else {None: rope}
        limit = getattr(self._config, "original_max_position_embeddings", None) or rotary.original_max_seq_len
        if any(r in _DYNAMIC for r in kinds.values()) and self._positions > limit:
            raise Unsupported(f"rotary angles that change beyond {limit} tokens")
        extra = (kind,) if isinstance(rope, dict) else ()
        tables: list[Tensor] = []
        for begin in range(0, self._positions, _ANGLES):
            where = torch.arange(begin, min(begin + _ANGLES, self._positions))[None]
            with torch.no_grad():
                pair = rotary(torch.zeros(1, 1, 1), where, *extra)
            self.half = pair[0].shape[-1] // 2
            tables = tables or [torch.empty(self._positions, self.half) for _ in pair]
            for table, values in zip(tables, pair, strict=True):
                table[begin : begin + _ANGLES] = values[0, :, : self.half]
        return self._made.address(tables[0]), self._made.address(tables[1])


def _layer(made: _Plan, config: Any, module: Any, index: int, angles: _Angles) -> Any:
    family, layer = made.family, made.core.Layer()
    for name in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
        norm = getattr(family, name)
        setattr(layer, name, made.norm(norm and getattr(module, norm), config, one_plus=family.one_plus))
    attention = module.self_attn
    if family.head_norms:
        layer.query = made.norm(attention.q_norm, config, one_plus=family.one_plus)
        layer.key = made.norm(attention.k_norm, config, one_plus=family.one_plus)
        layer.whole_norm = family.whole_norm
    layer.qkv, layer.out = made.products(attention, family.qkv), made.products(attention, ("o_proj",))
    if family.mixture is not None and hasattr(module.mlp, family.mixture.experts):
        layer.mixture = _mixture(made, config, module.mlp, family.mixture)
    else:
        layer.gate_up, layer.down = made.products(module.mlp, family.gate_up), made.products(module.mlp, ("down_proj",))
    layer.window = _window(config, angles.kind(index))
    layer.turn(*angles.of(index))
    return layer


def _mixture(made: _Plan, config: Any, module: Any, family: Mixture) -> Any:
    mixture, stacks = made.core.Experts(), getattr(module, family.experts)
    router, gate_up, down = getattr(module, family.router).weight, stacks.gate_up_proj, stacks.down_proj
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        raise Unsupported("a mixture of experts with hooks")
    if any(name not in ("gate_up_proj", "down_proj") for name, _ in stacks.named_parameters(recurse=False)):
        raise Unsupported("experts with biases")
    count = gate_up.shape[0]
    mixture.top, mixture.norm, mixture.shared = family.top(config), family.norm(config), family.shared is not None
    often, lists = mixture.top / count, []
    mixture.router = [made.rows(router, 0)]
    for i in range(count):
        lists.append(_expert(made, [made.rows(gate_up[i], 0, often)], [made.rows(down[i], 0, often)]))
    if family.shared is not None and family.shared_gate is not None:
        everybody = getattr(module, family.shared)
        mixture.router = [*mixture.router, made.product(getattr(module, family.shared_gate), count)]
        lists.append(
            _expert(made, made.products(everybody, made.family.gate_up), made.products(everybody, ("down_proj",)))
        )
    mixture.experts = lists
    return mixture


def _expert(made: _Plan, gate_up: list[Any], down: list[Any]) -> Any:
    expert = made.core.Expert()
    expert.gate_up, expert.down = gate_up, down
    return expert


def _window(config: Any, kind: str | None) -> int:
    """Positions that a token of such a layer sees, itself included; 0: all."""
    size = getattr(config, "sliding_window", None)
    if not size or kind == "full_attention" or (kind is None and getattr(config, "use_sliding_window", True) is False):
        return 0
    return int(size)
