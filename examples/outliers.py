"""Real outliers: one input channel sixty times as large as it should be, and what repairs 8-bit activations.

    python examples/outliers.py MODEL_FOLDER [--factor 60] [--tokens 1024]

In every norm of the model one channel is multiplied, and the weights of the layers behind it divided: the same
function, but int8 activations now spend their range on one channel. Large language models grow such channels by
themselves (LLM.int8(), Dettmers et al. 2022).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitfold
from bitfold import Calibration
from bitfold.models import skeleton
from bitfold.models.folding import find_folds, folded_norm

CHANNEL = 7
WAYS: dict[str, dict[str, Any]] = {
    "8-bit weights, float activations": {"format": "int8"},
    "8-bit weights and activations": {"format": "int8", "act": "int8"},
    "the same, LLM.int8()": {"method": "llm-int8"},
    "the same, SmoothQuant": {"method": "smoothquant"},
    "the same, rotated inputs": {"format": "int8", "act": "int8", "transform": "hadamard"},
}


def with_outliers(source: str, out: Path, factor: float) -> int:
    """Write the model with one channel of each norm enlarged, the same function; returns how many norms."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    folds = find_folds(skeleton.build(type(model), model.config))
    norms = {norm: layers for norm, layers in folds.items() if model.get_submodule(norm).weight.dim() == 1}
    with torch.no_grad():
        for norm, layers in norms.items():
            module = model.get_submodule(norm)
            scale = torch.ones(len(module.weight))
            scale[CHANNEL] = factor
            found = folded_norm(module, scale)
            assert found is not None, f"{norm} does not scale with its weight"
            for name, value in found[0].items():
                module.get_parameter(name).copy_(value)
            for layer in layers:
                model.get_submodule(layer).weight[:, CHANNEL] /= factor
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return len(norms)


def main() -> None:
    """Quantize the model with outliers in every way and print what each loses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--factor", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=1024, help="of text to judge on")
    options = parser.parse_args()
    text = Calibration(nsamples=2)
    with tempfile.TemporaryDirectory() as temporary:
        source, work = Path(temporary) / "outliers", Path(temporary)
        norms = with_outliers(options.model, source, options.factor)
        print(f"channel {CHANNEL} of {norms} norms times {options.factor:g}")
        print(f"{'':<34} {'KL':>8} {'perplexity':>10}")
        for number, (name, how) in enumerate(WAYS.items()):
            folder = work / str(number)
            bitfold.quantize(source, folder, **how, calibration=text if how.get("method") == "smoothquant" else None)
            sizes = {"max_tokens": options.tokens, "context": min(128, options.tokens)}
            found = bitfold.evaluate(folder, options.model, **sizes, cache_dir=work / "reference")
            print(f"{name:<34} {found.kl_mean:>8.4f} {found.perplexity:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
