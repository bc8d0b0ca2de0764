"""ggml's blocks under error feedback: valid blocks, less loss than rounding, scales that suit their codes."""

from __future__ import annotations

import pytest
import torch

from bitfold.errors import FormatError
from bitfold.formats.families import ggml_layouts as layouts
from bitfold.formats.families.ggml import GGML
from bitfold.formats.families.ggml_scales import STRUCTURES
from bitfold.methods.gptq import ldlq, proxy_loss
from bitfold.methods.hessian import BlockDiagonal, product_columns
from bitfold.methods.quantize import quantize_tensor

N, K = 48, 512


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def moments(k: int = K, seed: int = 1) -> torch.Tensor:
    """Of inputs that depend on each other, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(k, k, generator=generator) * torch.linspace(2, 0.1, k)[:, None] / k**0.5
    x = torch.randn(4 * k, k, generator=generator) @ mixed * torch.randn(k, generator=generator).exp()
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", STRUCTURES)
def test_feedback_loses_less_than_rounding(name: str) -> None:
    w, h, format = weight(), moments(), GGML[name]
    rounded = quantize_tensor(w, name)
    plain = ldlq(w, h, format, None, refit=False)  # type: ignore[arg-type]
    refit = quantize_tensor(w, name, method="ldlq", hessian=h)
    losses = [proxy_loss(w, q.dequantize(), h) for q in (rounded, plain, refit)]
    assert losses[1] < 0.6 * losses[0]
    assert losses[2] < losses[1]
    assert {f: t.shape for f, t in refit.fields.items()} == {f: i.shape for f, i in format.layout((N, K)).items()}


@pytest.mark.parametrize("name", STRUCTURES)
def test_without_data_it_is_rounding_under_the_searched_scales(name: str) -> None:
    """What the coder says a column decodes to is what the blocks decode to."""
    w, format = weight(), GGML[name]
    start = format.coder
    assert start is not None
    coder = start(w, None, None)
    said = torch.cat([coder.encode(w[:, at : at + 32], at) for at in range(0, K, 32)], 1)
    found = format.decode(coder.fields(), (N, K))
    # Two ways of writing scale * code + shift: a few roundings of float32 apart.
    torch.testing.assert_close(said, found, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        found, format.decode({"blocks": STRUCTURES[name].write(w.view(-1, format.block[0])).view(N, -1)}, (N, K))
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_with_no_hessian_it_is_rtn(name: str) -> None:
    rounded, fed = (quantize_tensor(weight(), name, method=method, fit="mse") for method in ("rtn", "ldlq"))
    assert torch.equal(rounded.fields["blocks"], fed.fields["blocks"])


@pytest.mark.parametrize("name", STRUCTURES)
def test_important_columns_lose_less(name: str) -> None:
    w, importance = weight(3), torch.ones(K)
    importance[::4] = 100.0
    format = GGML[name]
    assert format.coder is not None
    for_all, for_some = (format.coder(w, None, x) for x in (None, importance))
    losses = []
    for coder in (for_all, for_some):
        coder.encode(w, 0)
        error = (format.decode(coder.fields(), (N, K)) - w).square()
        losses.append(float((error * importance).sum()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "iq4_xs", "q2_k"])
def test_weights_that_are_no_numbers_of_their_own(name: str) -> None:
    """Rows and blocks of zeros, constants, inputs that never come, huge and tiny rows: finite, and zeros stay zeros."""
    w, h = weight(), moments()
    w[0], w[1, :256], w[2], w[3] = 0.0, 0.0, 0.01, w[3] * 1e4
    w[4] *= 1e-7
    h[:, 5] = h[5] = 0.0
    found = quantize_tensor(w, name, method="ldlq", hessian=h).dequantize()
    assert torch.isfinite(found).all()
    assert not found[0].any()
    assert (found[3] - w[3]).norm() < 0.5 * w[3].norm()


def test_in_ranges_of_columns_and_in_order_of_energy() -> None:
    w, h = weight(), moments()
    parts = BlockDiagonal((h[:256, :256].contiguous(), h[256:, 256:].contiguous()))
    for method in ("ldlq", "gptq"):
        for given in (h, parts):
            q = quantize_tensor(w, "q4_k", method=method, hessian=given)  # type: ignore[arg-type]
            assert proxy_loss(w, q.dequantize(), h) < proxy_loss(w, quantize_tensor(w, "q4_k").dequantize(), h)


def test_products_with_some_columns() -> None:
    h, x = moments(), weight()
    parts = BlockDiagonal((h[:256, :256], h[256:, 256:]))
    columns = slice(256, 288)
    torch.testing.assert_close(product_columns(x, h, columns), x @ h[:, columns])
    torch.testing.assert_close(product_columns(x, parts, columns), x[:, 256:] @ h[256:, columns])
    torch.testing.assert_close(product_columns(x[:, columns], parts, columns), x[:, columns] @ h[columns, columns])
    with pytest.raises(ValueError, match="not within"):
        product_columns(x, parts, slice(250, 260))


def test_iq4_xs_is_taken_apart_as_it_was_put_together() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (9, 256), generator=generator, dtype=torch.int32)
    scale = torch.randint(0, 64, (9, 8), generator=generator, dtype=torch.int32)
    d = torch.rand(9, 1, generator=generator).half().float()
    parts = layouts.split_iq4_xs(layouts.join_iq4_xs(codes, scale, d))
    assert torch.equal(parts.codes.view(9, 256), torch.tensor(layouts.IQ4_VALUES)[codes.long()].float())
    assert torch.equal(parts.scale[..., 0], d * (scale.float() - 32))


def test_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(FormatError, match="multiple of 256"):
        quantize_tensor(weight()[:, :300], "q4_k", method="ldlq", hessian=moments(300))


@pytest.mark.parametrize("name", STRUCTURES)
def test_importance_moves_the_errors_to_where_they_cost_little(name: str) -> None:
    format, w = GGML[name], weight()
    importance = torch.exp(2 * torch.randn(K, generator=torch.Generator().manual_seed(1)))
    cost = {}
    for what, blocks in (("plain", format.weighted(w, None)), ("weighed", format.weighted(w, importance))):
        cost[what] = float(((format.decode(blocks, (N, K)) - w).square() * importance).sum())
    assert cost["weighed"] <= cost["plain"]
    if format.levels != 256:  # eight bits: nothing to be gained
        assert cost["weighed"] < 0.97 * cost["plain"]
