"""Jobs on threads behave as if the caller ran them in a loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
import torch

from bitfold.methods.quantize import quantize_tensor
from bitfold.system.parallel import parallel_map


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_callers_gradient_mode_holds_in_the_jobs(mode: type[AbstractContextManager[None]]) -> None:
    with mode():
        here = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        assert (
            parallel_map(lambda _: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()), range(4)) == [here] * 4
        )


def test_results_come_in_order_and_errors_come_through() -> None:
    assert parallel_map(lambda i: i * i, range(10)) == [i * i for i in range(10)]
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda i: 1 // i, [1, 0, 1])


def test_a_large_weight_decodes_in_inference_mode() -> None:
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    q = quantize_tensor(w, "int4-asym-g64", fit="absmax")
    with torch.inference_mode():
        inside = q.dequantize()
    assert torch.equal(inside, q.dequantize())
