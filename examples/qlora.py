"""QLoRA on a laptop: train the same adapters on a 16-bit base and on packed ones, and compare the losses.

    python examples/qlora.py MODEL_FOLDER [--steps 72] [--text notes.txt] [--bases 16-bit trellis-3] [--work folder]

The task is to turn short notes into records; the script makes them up, no two alike (--text records). Or name a text
of your own. It is read in batches, several times over if there are more steps than batches; the first and the last loss
are means over a reading, or over a quarter of the steps where that is shorter. Needs `pip install bitfold[finetune]`.
"""

from __future__ import annotations

import argparse
import calendar
import json
import random
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

FIRST = ["Ada", "Bela", "Carla", "Elif", "Farid", "Greta", "Hugo", "Ines", "Kofi", "Lena", "Mara", "Noor"]
LAST = ["Adeyemi", "Berg", "Castro", "Dubois", "Fischer", "Garcia", "Haddad", "Ivanova", "Kaya", "Moreau"]
THINGS = ["lamps", "chairs", "tables", "shelves", "mirrors", "carpets", "stools", "benches"]
NOTES = (
    "{name} called on {day} {month} and ordered {a} {x} and {b} {y}.",
    "On {month} {day}, {a} {x} and {b} {y} were ordered by {name}.",
    "Please send {name} {a} {x} as well as {b} {y}, order of {day} {month}.",
)
CALIBRATION = Calibration(nsamples=8, seqlen=512, fisher=False)
BASES: dict[str, dict[str, Any] | None] = {
    "16-bit": None,
    "nf4-dq": {"method": "nf4"},
    "nf4-dq, calibrated": {"method": "ldlq", "format": "nf4-dq", "calibration": CALIBRATION},
    "trellis-3": {"method": "trellis", "bits": 3, "act": "float", "calibration": CALIBRATION},
}


def load_base(model: str, options: dict[str, Any] | None, folder: Path) -> torch.nn.Module:
    """The model as it is, or quantized into a folder first, if it is not there."""
    if options is None:  # 16-bit weights; float32 arithmetic, as on the packed bases
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if not folder.exists():
        bitfold.quantize(model, folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder)


def write_records(file: Path, count: int) -> Path:
    """Notes and the records that they should become."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            month, day = draw.randint(1, 12), draw.randint(1, 28)
            x, y = draw.sample(THINGS, 2)
            a, b = draw.randint(2, 30), draw.randint(2, 30)
            name = f"{draw.choice(FIRST)} {draw.choice(LAST)}"
            note = draw.choice(NOTES).format(name=name, day=day, month=calendar.month_name[month], a=a, b=b, x=x, y=y)
            record = json.dumps({"name": name, "date": f"{month:02}-{day:02}", "order": {x: a, y: b}})
            out.write(f"Note: {note}\nRecord: {record}\n\n")
    return file


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
    """Bytes of the frozen base: parameters without gradient, 16 bits each as they are stored, and packed fields."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(2 * p.numel() for p in frozen) + sum(b.numel() * b.element_size() for b in model.buffers())


def main() -> None:
    """Train on each base in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=list(BASES))
    parser.add_argument("--text", default="records", help='a .txt file, or "default": the text that comes with bitfold')
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--batches", type=int, help="of different text (default: as many as steps)")
    parser.add_argument("--batch", type=int, default=4, help="windows")
    parser.add_argument("--tokens", type=int, default=96, help="of a window")
    parser.add_argument("--work", type=Path, help="keep the quantized bases here (default: a temporary folder)")
    parser.add_argument("--save", type=Path, help="folder for the adapter trained on the last base")
    options = parser.parse_args()
    if min(options.steps, options.batch, options.tokens, options.batches or 1) < 1:
        parser.error("steps, batches and their sizes begin at 1")
    windows = (options.batches or options.steps) * options.batch
    with tempfile.TemporaryDirectory() as temporary:
        text = options.text
        if text == "records":
            text = str(write_records(Path(temporary, "records.txt"), windows * options.tokens // 40))
        tokens = calibration_tokens(Path(options.model), text, nsamples=windows, seqlen=options.tokens)
        batches = len(tokens) // options.batch
        if not batches:
            parser.error(f"the text has but {len(tokens)} windows of {options.tokens} tokens, less than a batch")
        tokens = tokens[: batches * options.batch]
        print(f"{'base':<20} {'MB':>6} {'first loss':>10} {'last loss':>10} {'s/step':>7}")
        for name in options.bases:
            folder = (options.work or Path(temporary)) / name.replace(", ", "-")
            model = add_adapters(load_base(options.model, BASES[name], folder))
            started = time.perf_counter()
            losses = train(model, tokens, options.steps, options.batch)
            seconds = (time.perf_counter() - started) / options.steps
            some = min(batches, max(options.steps // 4, 1))
            first, last = (sum(part) / len(part) for part in (losses[:some], losses[-some:]))
            print(
                f"{name:<20} {weight_bytes(model) / 1e6:>6.0f} {first:>10.4f} {last:>10.4f} {seconds:>7.2f}", flush=True
            )
    if options.save is not None:
        model.save_pretrained(options.save)


if __name__ == "__main__":
    try:
        main()
    except bitfold.errors.BitfoldError as error:
        sys.exit(f"error: {error}")
