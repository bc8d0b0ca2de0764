"""Whatever plain PyTorch code does with `layer.weight`, a quantized weight answers as its dequantized tensor would."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfold.errors import UsageError
from bitfold.methods.quantize import quantize_tensor
from bitfold.nn import QEmbedding, QLinear, QWeight
from bitfold.transforms import Hadamard

N, K = 48, 64


def made(format: str = "int8", *, transposed: bool = False, hadamard: bool = False, experts: int = 0) -> QWeight:
    """A quantized weight (48, 64), or so many of them."""
    shape = (experts, N, K) if experts else (N, K)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    transform = Hadamard(K, 0) if hadamard else None
    q = quantize_tensor(w if transform is None else transform.weights(w), format)
    return QWeight(q, transposed=transposed, transform=transform)


X = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
Y = torch.randn(5, N, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[3, 0], [7, 47]])

# Of a weight (48, 64): `w` is a tensor or stands for one.
USES: dict[str, Callable[[Any], Any]] = {
    "F.linear": lambda w: F.linear(X, w),
    "F.linear by name": lambda w: F.linear(input=X, weight=w, bias=torch.ones(N)),
    "F.linear cast": lambda w: F.linear(X.bfloat16(), w.to(torch.bfloat16)).float(),
    "x @ w.T": lambda w: X @ w.T,
    "x @ w.t()": lambda w: X @ w.t(),
    "x @ w.mT": lambda w: X @ w.mT,
    "x @ w.transpose": lambda w: X @ w.transpose(0, 1),
    "x @ w.transpose, from the end": lambda w: torch.matmul(X, w.transpose(-1, -2)),
    "x @ w.permute": lambda w: X @ w.permute(1, 0),
    "x @ torch.t(w)": lambda w: X @ torch.t(w),
    "x.mm": lambda w: X.mm(w.T),
    "vector @ w.T": lambda w: X[0] @ w.T,
    "y @ w": lambda w: Y @ w,
    "w @ x": lambda w: w @ X.T,
    "w @ batch": lambda w: w @ X.T[None].expand(3, -1, -1),
    "w.matmul": lambda w: w.matmul(X.T),
    "torch.matmul(w, x)": lambda w: torch.matmul(w, X.T),
    "addmm": lambda w: torch.addmm(torch.ones(N), X, w.t()),
    "einsum": lambda w: torch.einsum("bk,nk->bn", X, w),
    "bmm": lambda w: torch.bmm(X[None], w.t()[None]),
    "view": lambda w: w.view(4, 12, K),
    "reshape": lambda w: w.reshape(-1),
    "flatten": lambda w: w.flatten(),
    "unsqueeze": lambda w: F.conv1d(X.T[None], w.unsqueeze(-1)),
    "expand": lambda w: w.unsqueeze(0).expand(2, -1, -1),
    "chunk": lambda w: torch.stack(w.chunk(2, dim=0)),
    "split": lambda w: torch.stack(torch.split(w, 24)),
    "unbind": lambda w: torch.stack(w.unbind(0)),
    "row": lambda w: w[3],
    "last row": lambda w: w[-1],
    "rows": lambda w: w[5:9],
    "columns": lambda w: w[:, 3:7],
    "rows by ids": lambda w: w[IDS],
    "rows by negative ids": lambda w: w[IDS - N],
    "rows by mask": lambda w: w[torch.arange(N) % 3 == 0],
    "new dimension": lambda w: w[None, None],
    "one element": lambda w: w[2, 3],
    "index_select": lambda w: w.index_select(0, torch.tensor([1, 4])),
    "F.embedding": lambda w: F.embedding(IDS, w),
    "iteration": lambda w: torch.stack(list(w)),
    "len": len,
    "cat": lambda w: torch.cat([w, w]),
    "cat with another": lambda w: torch.cat([w, torch.ones(2, K)], dim=0),
    "cat of slices": lambda w: torch.cat((w[:4], w.t()[:, :4].t())),
    "stack": lambda w: torch.stack((w, w)),
    "linear with cat": lambda w: F.linear(X, torch.cat([w, w])),
    "block_diag": lambda w: torch.block_diag(w, w),
    "sum": lambda w: w.sum(),
    "norm": lambda w: torch.linalg.norm(w),
    "abs max": lambda w: w.abs().max(),
    "plus": lambda w: w + 1,
    "two of them": lambda w: w + w,
    "from the right": lambda w: 1 - w,
    "times": lambda w: 2 * w * 0.5,
    "by": lambda w: w / 3,
    "square": lambda w: w**2,
    "negative": lambda w: -w,
    "equal": lambda w: w == w[3],
    "less": lambda w: w < 0,
    "where": lambda w: torch.where(w > 0, w, torch.zeros(())),
    "softmax": lambda w: F.softmax(w, dim=-1),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "detach": lambda w: w.detach() + 0,
    "data": lambda w: w.data[1],
    "to dtype": lambda w: w.to(torch.float16)[0],
    "to tensor": lambda w: w.to(X.bfloat16())[0],
    "type_as": lambda w: w.type_as(X.half()),
    "half": lambda w: w.half() + 0,
    "float": lambda w: w.float() + 0,
    "double": lambda w: w.double() + 0,
    "bfloat16": lambda w: w.bfloat16().sum(),
    "type": lambda w: w.type(torch.float16) + 0,
    "cpu": lambda w: w.cpu() + 0,
    "numpy": lambda w: torch.from_numpy(w.numpy().copy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "copy": lambda w: copy.copy(w) + 0,
    "deepcopy": lambda w: copy.deepcopy(w) + 0,
    "new_zeros": lambda w: w.new_zeros(3, 2),
    "zeros_like": lambda w: torch.zeros_like(w),
    "copied into": lambda w: torch.zeros(N, K).copy_(w + 0),
    "added into": lambda w: torch.zeros(N, K).add_(w),
    "out": lambda w: torch.add(w, w, out=torch.empty(N, K)),
}
FACTS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda w: w.shape,
    "size()": lambda w: w.size(),
    "size(0)": lambda w: w.size(0),
    "size(-1)": lambda w: w.size(-1),
    "dim": lambda w: w.dim(),
    "ndim": lambda w: w.ndim,
    "numel": lambda w: w.numel(),
    "nelement": lambda w: w.nelement(),
    "element_size": lambda w: w.element_size(),
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "layout": lambda w: w.layout,
    "type": lambda w: w.type(),
    "is_floating_point": lambda w: w.is_floating_point(),
    "torch.is_floating_point": lambda w: torch.is_floating_point(w),
    "is_cuda": lambda w: w.is_cuda,
    "is_meta": lambda w: w.is_meta,
    "is_sparse": lambda w: w.is_sparse,
    "is_leaf": lambda w: w.is_leaf,
    "requires_grad": lambda w: w.requires_grad,
    "grad": lambda w: w.grad,
    "shape after T": lambda w: w.T.shape,
    "dtype after to": lambda w: w.to(torch.bfloat16).dtype,
    "bool of a guard": lambda w: w is not None and not hasattr(w, "quant_state") and not hasattr(w, "SCB"),
}
WEIGHTS: dict[str, Callable[[], QWeight]] = {
    "int8": made,
    "int4-asym-g16": lambda: made("int4-asym-g16"),
    "nf4-g16-dq": lambda: made("nf4-g16-dq"),
    "trellis": lambda: made("trellis-2", hadamard=True),
}


def same(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    """Equal but for the order of summation of products."""
    if not isinstance(wanted, torch.Tensor):
        assert found == wanted
        return
    assert isinstance(found, torch.Tensor)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    loose = max(tolerance, float(torch.finfo(wanted.dtype).eps)) if wanted.is_floating_point() else 0
    assert torch.allclose(found.double(), wanted.double(), rtol=loose, atol=loose * float(wanted.double().abs().max()))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("use", USES)
def test_uses(use: str, kind: str) -> None:
    w = WEIGHTS[kind]()
    loose = 2e-2 if "cast" in use else 1e-4
    same(USES[use](w), USES[use](w.dequantize()), loose)


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_facts(fact: str, dtype: torch.dtype) -> None:
    w = made().to(dtype)
    assert FACTS[fact](w) == FACTS[fact](w.dequantize())


STACKED: dict[str, Callable[[Any], Any]] = {
    "slice": lambda w: F.linear(X, w[2]),
    "slice by a tensor": lambda w: F.linear(X, w[torch.tensor(1)]),
    "last slice": lambda w: F.linear(X, w[-1]),
    "bmm with mT": lambda w: torch.bmm(X[None].expand(4, -1, -1), w.mT),
    "bmm with transpose": lambda w: torch.bmm(X[None].expand(4, -1, -1), w.transpose(1, 2)),
    "matmul": lambda w: X[None].expand(4, -1, -1) @ w.transpose(-2, -1),
    "matmul, one for all": lambda w: X @ w.transpose(-2, -1),
    "bmm from the left": lambda w: torch.bmm(w, X.T[None].expand(4, -1, -1)),
    "einsum": lambda w: torch.einsum("tk,enk->etn", X, w),
    "several": lambda w: w[torch.tensor([1, 1, 3])],
    "some rows of one": lambda w: w[1, 3:5],
    "iteration": lambda w: torch.stack([F.linear(X, part) for part in w]),
    "cast": lambda w: F.linear(X.bfloat16(), w.to(torch.bfloat16)[1]).float(),
}


@pytest.mark.parametrize("use", STACKED)
def test_stacks(use: str) -> None:
    w = made(experts=4)
    same(STACKED[use](w), STACKED[use](w.dequantize()), 2e-2 if use == "cast" else 1e-4)


def test_a_stack_with_its_inputs_second() -> None:
    """Llama 4 multiplies x (experts, tokens, k) by (experts, k, n)."""
    w = made(experts=4, transposed=True)
    assert w.shape == (4, K, N)
    x = X[None].expand(4, -1, -1)
    same(torch.bmm(x, w), torch.bmm(x, w.dequantize()))
    same(X @ w[3], X @ w[3].dequantize())


@pytest.mark.parametrize("use", ["F.linear", "x @ w.T", "F.linear cast", "F.embedding", "rows by ids"])
def test_products_stay_packed(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No float copy of the weight is made for what a kernel or a look-up can do."""
    w = made()
    monkeypatch.setattr(QWeight, "dequantize", lambda *_: pytest.fail("dequantized"))
    USES[use](w)


@pytest.mark.parametrize("scale", [lambda w: w.div_(4), lambda w: w.mul_(0.25), lambda w: w.mul_(torch.tensor(0.25))])
def test_scaled_in_place(scale: Callable[[Any], Any]) -> None:
    """RWKV-4 divides some of its weights before it runs, and multiplies them again before it trains."""
    layer, plain = QLinear(made().qtensor), nn.Linear(K, N, bias=False)
    plain.weight.data = layer.weight.dequantize()
    for module in (layer, plain):
        with torch.no_grad():
            scale(module.weight)
    same(layer(X), plain(X).detach())
    same(layer.weight.dequantize(), plain.weight.detach())
    same(layer.weight.T + 0, plain.weight.detach().T)
    same(copy.deepcopy(layer)(X), plain(X).detach())
    same(layer.weight[IDS], plain.weight.detach()[IDS])
    with pytest.raises(UsageError, match=r"multiplied by 0\.25 in place"):
        layer.state_dict()
    layer.weight *= 4
    assert layer.state_dict().keys() == QLinear(made().qtensor).state_dict().keys()


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(N, K)),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(N, K)),
    "zero_": lambda w: w.zero_(),
    "mul_ by row": lambda w: w.mul_(torch.ones(N, 1)),
    "set item": lambda w: w.__setitem__(0, 1.0),
    "set data": lambda w: setattr(w, "data", torch.zeros(N, K)),
    "out": lambda w: torch.add(X, X, out=w),
    "init": lambda w: nn.init.zeros_(w),
    "pickle": lambda w: pickle.dumps(w),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused_in_words(write: str) -> None:
    with pytest.raises(UsageError, match=r"quantized weight"):
        WRITES[write](made())


def test_a_layer_in_a_model(tmp_path: Any) -> None:
    """Casting, moving, saving, iterating, autocast: as with a layer in floating point."""
    model = nn.Sequential(QEmbedding(made().qtensor), QLinear(made("int4-asym-g16").qtensor, torch.ones(N)))
    plain = nn.Sequential(nn.Embedding(N, K), nn.Linear(K, N))
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight.dequantize())
        plain[1].weight.copy_(model[1].weight.dequantize())
        plain[1].bias.fill_(1)
    assert [p.dtype for p in model.parameters()] == [torch.float32]
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, lambda m: m.to(torch.bfloat16)):
        a, b = cast(copy.deepcopy(model)), cast(copy.deepcopy(plain))
        same(a(IDS), b(IDS).detach(), 2e-2)
        assert a[1].weight.dtype == b[1].weight.dtype
    with torch.autocast("cpu", torch.bfloat16):
        same(model(IDS), plain(IDS).detach(), 2e-2)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(model)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(again(IDS), model(IDS))
    assert model.to("meta")(IDS.to("meta")).shape == (2, 2, N)


def test_the_weight_of_a_layer_replaced() -> None:
    """A layer that is given an ordinary tensor multiplies by that."""
    layer = QLinear(made().qtensor)
    layer.weight = nn.Parameter(torch.ones(N, K))  # type: ignore[assignment]
    same(layer(X).detach(), F.linear(X, torch.ones(N, K)))


@pytest.mark.parametrize("name", ["int8", "nf4-g16-dq", "fp8-e4m3"])
def test_on_the_meta_device_shapes_come_out(name: str) -> None:
    w, x = made(name).to("meta"), X.to("meta")
    assert F.linear(x, w).shape == (x @ w.T).shape == (5, N)
    assert (w @ x.T).shape == (N, 5)
    for out in (w.view(-1), w[3:5], torch.cat([w, w]), F.embedding(IDS.to("meta"), w)):
        assert out.is_meta
