"""A smaller student of a quantized teacher: half of its blocks, trained on what it predicts.

    python examples/distillation.py TEACHER_FOLDER -o OUT [--minutes 10] [--keep 2]

TEACHER_FOLDER is one that `bitfold quantize` made: it predicts with its packed weights. The student is made of every
second block of it, in floating point, with its embedding and head, and learns by the KL divergence to the teacher on
the text that comes with bitfold. What is written is an ordinary folder, to be quantized in its turn.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitfold
from bitfold.calibration import calibration_tokens

HELD_OUT = 4  # windows


def student_of(folder: Path, keep: int) -> Any:
    """Every `keep`-th block of a packed model and the last one, in floating point."""
    bitfold.load(folder)  # refuses in words what is no such folder
    small: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = small.model.layers
    chosen = sorted({*range(0, len(layers), keep), len(layers) - 1})
    config = copy.deepcopy(small.config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in chosen]
    del config.quantization_config
    made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {}
    for name, module in small.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            packed = hasattr(weight, "dequantize") and not isinstance(weight, nn.Parameter)
            state[f"{name}.weight"] = weight.dequantize(torch.float32) if packed else weight.detach()
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            state[f"{name}.bias"] = bias.detach()
    place = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(chosen)}
    wanted = made.state_dict()
    for name, value in state.items():
        block = ".".join(name.split(".")[:3]) + "."
        if name.startswith("model.layers.") and block not in place:
            continue
        wanted[name.replace(block, place.get(block, block), 1)].copy_(value)
    made.tie_weights()
    return made


@torch.no_grad()
def judge(model: Any, teacher: Any, windows: torch.Tensor) -> str:
    """KL to the teacher and perplexity."""
    kl, loss = 0.0, 0.0
    for ids in windows:
        logits = model(ids[None]).logits
        kl += float(bitfold.kl_loss(logits, teacher(ids[None]).logits)) / len(windows)
        loss += float(nn.functional.cross_entropy(logits[0, :-1], ids[1:])) / len(windows)
    return f"held-out KL {kl:.3f}, perplexity {math.exp(min(loss, 50.0)):.1f}"


def train(model: Any, teacher: Any, windows: torch.Tensor, seconds: float, rate: float) -> int:
    """Adam on the blocks, a window a step, for so long; the number of steps."""
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    begun, step = time.monotonic(), 0
    while (spent := time.monotonic() - begun) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(10 * spent / seconds, 1.0) * (1 - spent / seconds)
        ids = windows[step % len(windows)][None]
        with torch.no_grad():
            wanted = teacher(ids).logits
        loss = bitfold.kl_loss(model(ids).logits, wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"  step {step}: {float(loss):.3f}", file=sys.stderr, flush=True)
    return step


def main() -> None:
    """Make the student, judge it, train it, judge it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--keep", type=int, default=2, help="every so many blocks, one is kept")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--rate", type=float, default=3e-4)
    options = parser.parse_args()
    student = student_of(options.teacher, options.keep)
    teacher = bitfold.load(options.teacher, dtype=torch.float32)
    windows = calibration_tokens(options.teacher, "default", nsamples=1 << 12, seqlen=options.tokens)
    held_out, windows = windows[-HELD_OUT:], windows[:-HELD_OUT]
    count = sum(p.numel() for p in student.parameters()) / 1e6
    print(f"student: {len(student.model.layers)} blocks, {count:.0f} M parameters", flush=True)
    print(f"before:  {judge(student, teacher, held_out)}", flush=True)
    steps = train(student, teacher, windows, 60 * options.minutes, options.rate)
    print(f"after:   {judge(student, teacher, held_out)} ({steps} steps of {options.tokens} tokens)")
    student.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(options.teacher).save_pretrained(options.output)
    print(f"written to {options.output}; bitfold quantize makes it smaller still")


if __name__ == "__main__":
    try:
        main()
    except bitfold.errors.BitfoldError as error:
        sys.exit(f"error: {error}")
