"""QLoRA on a laptop: train the same adapters on a 16-bit base and on packed ones, and compare the losses.

    python examples/qlora.py MODEL_FOLDER [--steps 100] [--text notes.txt] [--save adapter]

Needs `pip install bitfold[finetune]`. A model of 135M parameters takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import bitfold
from bitfold.calibration import calibration_tokens

BASES = {
    "16-bit": None,
    "nf4-dq": {"format": "nf4-dq"},
    "trellis-3": {"format": "trellis-3", "transform": "hadamard"},
}


def load_base(model: str, options: dict[str, str] | None, folder: Path) -> torch.nn.Module:
    """The model as it is, or quantized into a folder first."""
    if options is None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    bitfold.quantize(model, folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder)


def add_adapters(model: torch.nn.Module) -> PeftModel:
    """Rank-8 adapters on all linear layers; the same start for every base."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(model: PeftModel, tokens: torch.Tensor, steps: int, batch: int) -> list[float]:
    """The loss of every step."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    losses = []
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(tokens)
        loss = model(input_ids=tokens[rows], labels=tokens[rows]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the frozen base: parameters without gradient, and packed fields."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(t.numel() * t.element_size() for t in [*frozen, *model.buffers()])


def main() -> None:
    """Train on each base in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="default", help="a .txt file (default: the text that comes with bitfold)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    parser.add_argument("--save", type=Path, help="folder for the adapter trained on nf4-dq")
    options = parser.parse_args()
    windows = min(options.steps, 8) * options.batch  # a small text, read several times
    tokens = calibration_tokens(Path(options.model), options.text, nsamples=windows, seqlen=options.tokens)
    print(f"{'base':<10} {'MB':>6} {'first loss':>10} {'last loss':>10} {'s/step':>7}")
    for name, quantization in BASES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = add_adapters(load_base(options.model, quantization, Path(folder) / "base"))
            started = time.perf_counter()
            losses = train(model, tokens, options.steps, options.batch)
            seconds = (time.perf_counter() - started) / options.steps
            last = sum(losses[-windows // options.batch :]) / len(losses[-windows // options.batch :])
            print(
                f"{name:<10} {weight_bytes(model) / 1e6:>6.0f} {losses[0]:>10.4f} {last:>10.4f} {seconds:>7.2f}",
                flush=True,
            )
            if options.save is not None and name == "nf4-dq":
                model.save_pretrained(options.save)


if __name__ == "__main__":
    main()
