"""What the peers' scripts share. Runs in their environments: torch and transformers only."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64


@dataclass
class Run:
    """One quantization by a peer.

    Args:
        options: what `arguments` read.
        started: when the work began (wall clock, CPU time), loading not counted.
        bits: stored bits of all quantized weights, and their number.
        took: wall-clock and CPU seconds of the work, once it is done.
        note: what else there is to say.
    """

    options: argparse.Namespace
    started: tuple[float, float] = (0.0, 0.0)
    bits: list[tuple[float, int]] = field(default_factory=list)
    took: tuple[float, float] | None = None
    note: str = ""

    @classmethod
    def begin(cls) -> Run:
        """Read the command line."""
        torch.manual_seed(0)
        return cls(arguments())

    def load(self) -> Any:
        """The model in float32; the clock starts."""
        model = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32).eval()
        self.start()
        return model

    def start(self) -> None:
        """The clock starts (again)."""
        self.started = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        """The clock stops before `finish`, where the result has to be saved and read first."""
        self.took = (time.perf_counter() - self.started[0], time.process_time() - self.started[1])

    def tokens(self) -> list[torch.Tensor]:
        """Calibration windows (1, seqlen), the first of the text, as bitfold takes them."""
        text = Path(self.options.calibration).read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(self.options.model)(text)["input_ids"]
        n = self.options.seqlen
        return [torch.tensor(ids[i * n : (i + 1) * n])[None] for i in range(min(self.options.nsamples, len(ids) // n))]

    def stored(self, tensors: list[Any], weights: int) -> None:
        """Note what one quantized weight would take on disk."""
        found = [t for t in tensors if isinstance(t, torch.Tensor)]
        self.bits.append((8.0 * sum(t.numel() * t.element_size() for t in found), weights))

    def nominal(self, bits: float, model: nn.Module) -> None:
        """Where the packed tensors cannot be had: bits per weight by the peer's own settings."""
        self.bits = [(bits * layer.weight.numel(), layer.weight.numel()) for _, layer in linears(model)]

    def finish(self, weights: dict[str, torch.Tensor]) -> None:
        """Write the original model with these weights in their places (float32), and say what it took."""
        memory = peak()  # the second copy of the model below is not the peer's
        if self.took is None:
            self.stop()
        assert self.took is not None
        seconds, cpu = self.took
        model = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)
        with torch.no_grad():
            for name, w in weights.items():
                model.get_submodule(name).weight.copy_(w)
        model.save_pretrained(self.options.out)
        AutoTokenizer.from_pretrained(self.options.model).save_pretrained(self.options.out)
        bpw = sum(b for b, _ in self.bits) / sum(n for _, n in self.bits)
        facts = {"seconds": seconds, "cpu": cpu, "peak_memory": memory, "bpw": bpw}
        print(json.dumps({**facts, "note": self.note} if self.note else facts), flush=True)


def arguments() -> argparse.Namespace:
    """The command line of all scripts."""
    parser = argparse.ArgumentParser()
    for name in ("model", "out", "method"):
        parser.add_argument(name)
    parser.add_argument("bits", type=int)
    parser.add_argument("--calibration")
    for name in ("--nsamples", "--seqlen", "--steps"):
        parser.add_argument(name, type=int)
    return parser.parse_args()


def linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers of the blocks; the output layer stays as it is, as bitfold leaves it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def others(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the norms of the blocks: methods with factors change them too."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if ".layers." in name and isinstance(weight, torch.Tensor) and weight.dim() == 1:
            yield name, weight.detach().float()


def peak() -> int:
    """Largest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
