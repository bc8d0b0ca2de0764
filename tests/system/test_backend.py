"""Devices by name, and what is said of those that are not there."""

from __future__ import annotations

import pytest
import torch

from bitfold.errors import ResourceError, UsageError
from bitfold.system import backend, native


def test_the_cpu_is_always_there():
    assert backend.present()[0] == "cpu"
    assert backend.find_device("cpu") == backend.CPU
    assert backend.describe(backend.CPU).startswith("cpu, ")


@pytest.mark.parametrize("seen", [[], ["xpu"], ["cuda", "mps"]])
def test_auto_takes_the_accelerator_that_is_seen(seen, monkeypatch):
    monkeypatch.setattr(backend, "_is_there", lambda kind: kind in seen)
    assert backend.find_device("auto").type == (seen or ["cpu"])[0]


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps", "cuda:1"])
def test_a_device_that_is_not_there_is_one_clear_error(name, monkeypatch):
    monkeypatch.setattr(backend, "_is_there", lambda kind: False)
    with pytest.raises(UsageError) as error:
        backend.find_device(name)
    assert error.value.where == "--device"
    assert error.value.hint == "there is cpu"
    assert name in error.value.what


@pytest.mark.parametrize("name", ["gpu", "", "cpu:0", "cuda:x", "mps:0"])
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(UsageError, match="unknown device"):
        backend.find_device(name)


def test_the_core_takes_what_is_in_the_memory_of_the_cpu():
    assert backend.core_for(torch.zeros(1), None) is native.core()
    assert backend.core_for(torch.zeros(1), torch.zeros(1, device="meta")) is None


def test_a_ceiling_for_no_accelerator_is_refused():
    with pytest.raises(UsageError, match="nothing is done on an accelerator"):
        backend.set_ceiling(backend.CPU, 10**9)
    backend.set_ceiling(backend.CPU, None)


def test_a_ceiling_bounds_what_a_step_takes(monkeypatch):
    class Module:
        @staticmethod
        def get_device_properties(device):
            return type("P", (), {"total_memory": 4 << 30})

        @staticmethod
        def set_per_process_memory_fraction(share, *device):
            shares.append((share, *device))

    shares: list[tuple[object, ...]] = []
    device = torch.device("cuda")
    monkeypatch.setattr(backend, "_module", lambda kind: Module)
    monkeypatch.setattr(backend, "_CEILINGS", {})
    before = backend.scratch(device)
    backend.set_ceiling(device, 1 << 30)
    backend.set_ceiling(torch.device("cuda:1"), 1 << 30)
    assert shares == [(0.25,), (0.25, torch.device("cuda:1"))]  # never a device without a number
    assert backend.scratch(device) == (1 << 30) // 4 < before
    with pytest.raises(ResourceError, match=r"4\.29 GB, not 8\.59 GB"):
        backend.set_ceiling(device, 8 << 30)


def test_running_out_of_memory_ends_in_words():
    with pytest.raises(ResourceError, match="the memory of cuda"), backend.within_memory(torch.device("cuda")):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ResourceError, match="the memory of mps"), backend.within_memory(torch.device("mps")):
        raise RuntimeError("MPS backend out of memory")
    with pytest.raises(RuntimeError, match="something else"), backend.within_memory(torch.device("mps")):
        raise RuntimeError("something else")


def test_what_takes_doubles_is_refused_where_there_are_none():
    with pytest.raises(UsageError, match="64 bits"):
        backend.require_doubles(torch.device("mps"), "the factor of a Hessian")
    backend.require_doubles(torch.device("cuda"), "the factor of a Hessian")
