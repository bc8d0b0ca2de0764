"""QLoRA on a laptop: train the same adapters on a 16-bit base and on packed ones, and compare the losses.

    python examples/qlora.py MODEL_FOLDER [--steps 96] [--text notes.txt] [--bases 16-bit trellis-3] [--work folder]

The text is read in batches, several times over if there are more steps than batches; the first and the last loss are
means over a reading, or over a quarter of the steps where that is shorter. Needs `pip install bitfold[finetune]`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import bitfold
from bitfold import Calibration
from bitfold.calibration import calibration_tokens

CALIBRATION = Calibration(nsamples=8, seqlen=512, fisher=False)
BASES: dict[str, dict[str, Any] | None] = {
    "16-bit": None,
    "nf4-dq": {"solver": "nf4"},
    "nf4-dq, calibrated": {"solver": "ldlq", "format": "nf4-dq", "calibration": CALIBRATION},
    "trellis-3": {"solver": "trellis", "bits": 3, "act": "float", "calibration": CALIBRATION},
}


def load_base(model: str, options: dict[str, Any] | None, folder: Path) -> torch.nn.Module:
    """The model as it is, or quantized into a folder first, if it is not there."""
    if options is None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    if not folder.exists():
        bitfold.quantize(model, folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder)


def add_adapters(model: torch.nn.Module) -> PeftModel:
    """Rank-8 adapters on all linear layers; the same start for every base."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(model: PeftModel, tokens: torch.Tensor, steps: int, batch: int) -> list[float]:
    """The loss of every step; means over each reading of the text, or over 12 steps, are shown as they come."""
    shown = min(len(tokens) // batch, 12)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    losses = []
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(tokens)
        loss = model(input_ids=tokens[rows], labels=tokens[rows]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if len(losses) % shown == 0:
            print(f"  step {len(losses)}: {sum(losses[-shown:]) / shown:.4f}", file=sys.stderr, flush=True)
    return losses


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the frozen base: parameters without gradient, and packed fields."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(t.numel() * t.element_size() for t in [*frozen, *model.buffers()])


def main() -> None:
    """Train on each base in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=list(BASES))
    parser.add_argument("--text", default="default", help="a .txt file (default: the text that comes with bitfold)")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--batches", type=int, default=12, help="of different text")
    parser.add_argument("--batch", type=int, default=2, help="windows")
    parser.add_argument("--tokens", type=int, default=96, help="of a window")
    parser.add_argument("--work", type=Path, help="keep the quantized bases here (default: a temporary folder)")
    parser.add_argument("--save", type=Path, help="folder for the adapter trained on the last base")
    options = parser.parse_args()
    windows = options.batches * options.batch
    tokens = calibration_tokens(Path(options.model), options.text, nsamples=windows, seqlen=options.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        print(f"{'base':<20} {'MB':>6} {'first loss':>10} {'last loss':>10} {'s/step':>7}")
        for name in options.bases:
            folder = (options.work or Path(temporary)) / name.replace(", ", "-")
            model = add_adapters(load_base(options.model, BASES[name], folder))
            started = time.perf_counter()
            losses = train(model, tokens, options.steps, options.batch)
            seconds = (time.perf_counter() - started) / options.steps
            some = min(options.batches, max(options.steps // 4, 1))
            first, last = (sum(part) / len(part) for part in (losses[:some], losses[-some:]))
            print(
                f"{name:<20} {weight_bytes(model) / 1e6:>6.0f} {first:>10.4f} {last:>10.4f} {seconds:>7.2f}", flush=True
            )
    if options.save is not None:
        model.save_pretrained(options.save)


if __name__ == "__main__":
    main()
