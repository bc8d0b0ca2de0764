"""Training in few bits: what rounding to nearest loses, and what training through the rounding learns back.

    python examples/qat.py MODEL_FOLDER -o OUT [--format int2-g64] [--blocks 4] [--minutes 5]

The teacher is the model itself, in floating point, the loss the KL divergence to it, the text the one that comes with
bitfold. `--blocks N` takes the first N blocks alone, teacher and all: then the numbers say how well a function is kept
and nothing about language, and a few minutes show the effect. It ends at a packed folder, read back and judged.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitfold
from bitfold import Recipe
from bitfold.calibration import calibration_tokens

HELD_OUT = 4  # windows


def first_blocks(model: Any, count: int | None) -> Any:
    """The model with its first blocks alone."""
    if count is not None:
        model.model.layers = model.model.layers[:count]
        model.config.num_hidden_layers = len(model.model.layers)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:count]
    return model


@torch.no_grad()
def divergence(model: Any, teacher: Any, windows: torch.Tensor) -> float:
    """Mean KL to the teacher, nats a token."""
    found = [bitfold.kl_loss(model(ids[None]).logits, teacher(ids[None]).logits) for ids in windows]
    return float(sum(found)) / len(found)


def train(model: Any, teacher: Any, windows: torch.Tensor, seconds: float, rate: float) -> int:
    """Adam on the blocks' weights for so long, a window a step; the number of steps."""
    # The embedding, the head and the norms stay: the packed weights are what has something to learn back.
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".original"))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    begun, step = time.monotonic(), 0
    while (spent := time.monotonic() - begun) < seconds:
        for group in optimiser.param_groups:  # up within the first tenth, then down to nothing
            group["lr"] = rate * min(10 * spent / seconds, 1.0) * (1 - spent / seconds)
        ids = windows[step % len(windows)][None]
        with torch.no_grad():
            wanted = teacher(ids).logits
        loss = bitfold.kl_loss(model.train()(ids).logits, wanted)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"  step {step}: {float(loss):.4f}", file=sys.stderr, flush=True)
    return step


def main() -> None:
    """Round, train, pack, and judge each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--format", default="int2-g64")
    parser.add_argument("--transform", default="none", choices=["none", "hadamard"])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--every", type=int, default=1, help="steps after which weights are rounded anew")
    options = parser.parse_args()
    teacher = first_blocks(AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), options.blocks)
    windows = calibration_tokens(options.model, "default", nsamples=1 << 12, seqlen=options.tokens)
    held_out, windows = windows[-HELD_OUT:], windows[:-HELD_OUT]
    model = copy.deepcopy(teacher)
    recipe = Recipe.of(options.format, transform=options.transform)
    bitfold.prepare_qat(model, recipe, every=options.every)
    print(f"rounded:  held-out KL {divergence(model.eval(), teacher, held_out):.4f}", flush=True)
    steps = train(model, teacher, windows, 60 * options.minutes, options.rate)
    print(f"trained:  held-out KL {divergence(model.eval(), teacher, held_out):.4f} after {steps} steps", flush=True)
    bitfold.convert_qat(model, options.output, tokenizer=AutoTokenizer.from_pretrained(options.model))
    packed = bitfold.load(options.output)
    print(f"packed:   held-out KL {divergence(packed, teacher, held_out):.4f}, in {options.output}")


if __name__ == "__main__":
    try:
        main()
    except bitfold.errors.BitfoldError as error:
        sys.exit(f"error: {error}")
