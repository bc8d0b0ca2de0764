"""Runs with executors, watched from outside: a small model, what is written so far, what came out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import forks
from bitfold.checkpoints.staging import partial_of
from bitfold.records.record import FILE as RECORD


def model(folder: Path) -> Path:
    """A random Llama whose layers take a trellis encoder some time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def content(out: Path) -> dict[str, str]:
    """Every file by its hash, but for the record of times and memory."""
    files = [out] if out.is_file() else sorted(f for f in out.iterdir() if f.name != RECORD)
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def started(source: Path, out: Path, *options: str) -> forks.Interpreter:
    """`bitfold quantize` in a process of its own."""
    return forks.Interpreter("-m", "bitfold", "quantize", source, "-o", out, *options)


def children(pid: int) -> list[int]:
    """Workers of a process: those children that multiprocessing started (Linux)."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            line = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [int(child)] if b"spawn_main" in line else []
    return found


def wait_for(truth: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until it is so."""
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def written(out: Path) -> list[str]:
    """Tensors that the journal of an unfinished run holds."""
    journal = partial_of(out) / "journal.jsonl"
    if not journal.is_file():
        return []
    lines = (line.partition(" ")[2] for line in journal.read_text().splitlines())
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["tensor"] for record in records if record["kind"] == "tensor"]
