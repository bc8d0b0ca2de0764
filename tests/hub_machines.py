"""The two machines of the round trip over the Hub, each a process of its own: `python hub_machines.py large FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

REPO = "alice/tiny-llama-4bit"
PROMPT = torch.tensor([[1, 5, 9, 2, 7, 3, 8, 4]])


def large(folder: Path) -> None:
    """Make a model, quantize it, push it; leave its sizes and the logits of the quantized folder behind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import bitfold

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "original")
    bitfold.quantize(folder / "original", folder / "quantized", bits=4, fit="absmax", upload_repo=REPO)
    torch.save(logits(bitfold.load(folder / "quantized")), folder / "logits.pt")


def small(folder: Path) -> None:
    """Pull, load and run; print the rise of the peak memory by pulling and loading."""
    from transformers import LlamaForCausalLM  # noqa: F401 - imported so that its memory counts as baseline

    import bitfold
    from bitfold.models.load import load
    from bitfold.records.run_report import peak_memory

    torch.ones(64, 64) @ torch.ones(64, 64)
    before = peak_memory()
    model = load(REPO)
    after = peak_memory()
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    rise = None if before is None or after is None else after - before
    torch.save(logits(model), folder / "pulled.pt")
    print(json.dumps({"rise": rise, "meta": meta, "bitfold": bitfold.__version__}))


def through_transformers(folder: Path) -> None:
    """The same pull by transformers' own from_pretrained."""
    from transformers import AutoModelForCausalLM

    import bitfold  # noqa: F401 - registers the quantization method

    torch.save(logits(AutoModelForCausalLM.from_pretrained(REPO)), folder / "transformers.pt")


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits (tokens, vocabulary) of the fixed prompt."""
    result: torch.Tensor = model(PROMPT).logits[0]
    return result


if __name__ == "__main__":
    {"large": large, "small": small, "transformers": through_transformers}[sys.argv[1]](Path(sys.argv[2]))
