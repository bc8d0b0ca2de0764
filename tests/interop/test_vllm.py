"""vLLM serves folders that are written for it, unedited, and bitfold's own by the plug-in, with the same answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
import tiny_lm
from interop_engines import IDS, SOURCES, log_probabilities, model, python_of, run, tolerance

# Small: one core for each worker, little memory.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
ASK = """
import json, sys
def main():
    asked = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams
    if asked["elsewhere"]:  # in this very process: the plug-in takes the machine for one without its kernels
        import bitfold.integrations.vllm as own
        class Elsewhere:
            device_type = "cpu"
            def is_cpu(self):
                return False
        own.current_platform = Elsewhere()
    llm = LLM(asked["folder"], dtype=asked["dtype"], enforce_eager=asked["eager"], max_model_len=128, max_num_seqs=2,
              tensor_parallel_size=asked["ranks"], skip_tokenizer_init=True)
    wanted = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=1, detokenize=False, ignore_eos=True)
    found = llm.generate({"prompt_token_ids": asked["ids"]}, wanted)[0]
    of_prompt = [p[i].logprob for p, i in zip(found.prompt_logprobs[1:], asked["ids"][1:])]
    json.dump({"of_prompt": of_prompt, "text": list(found.outputs[0].token_ids)}, open(asked["out"], "w"))
if __name__ == "__main__":
    main()
"""
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "compressed-tensors": ("compressed-tensors", {"bits": 4, "group_size": 32}),
    "compressed-tensors, zero points": ("compressed-tensors", {"format": "int4-asym-g32"}),
    "compressed-tensors, W8A8": ("compressed-tensors", {"bits": 8, "act": "int8"}),
    "gptq": ("gptq", {"bits": 4, "group_size": 32}),
    "awq": ("awq", {"bits": 4, "group_size": 32}),
}
OWN: dict[str, dict[str, Any]] = {
    "trellis": {"format": "trellis-3", "transform": "hadamard"},
    "integers": {"format": "int4-asym-g32"},
    "everything": {"recipe": bitfold.Recipe((bitfold.Rule("*", "int8"),))},
    "some plain": {"bits": 8, "ignore": ["*.mlp.*"]},
}


def plugin(place: Path) -> str:
    """PYTHONPATH of an installed bitfold: its sources, and the entry points that pip would note."""
    info = place / "installed" / f"bitfold-{bitfold.__version__}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bitfold\nVersion: {bitfold.__version__}\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nbitfold = bitfold.integrations.vllm_plugin:register\n"
    )
    return f"{SOURCES}{os.pathsep}{info.parent}"


def ask(
    folder: Path, place: Path, *, dtype: str, ranks: int = 1, eager: bool = True, elsewhere: bool = False
) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        pytest.skip(f"{ranks} ranks want as many cores")
    bound = "|".join(str(core) for core in cores[:ranks])
    settings = {"folder": str(folder), "ids": IDS, "dtype": dtype, "ranks": ranks, "eager": eager}
    settings["elsewhere"] = elsewhere
    one = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if elsewhere else {}
    environment = {**ENVIRONMENT, **one, "VLLM_CPU_OMP_THREADS_BIND": bound, "PYTHONPATH": plugin(place)}
    return run(python_of("vllm"), ASK, settings, place, **environment)


def same(found: dict[str, Any], folder: Path, dtype: str) -> None:
    expected = log_probabilities(folder)[:-1].gather(1, torch.tensor(IDS)[1:, None])[:, 0]
    off = float((torch.tensor(found["of_prompt"]) - expected).abs().max())
    assert off <= tolerance(dtype), f"off by {off}"


def greedy(folder: Path) -> list[int]:
    loaded: Any = bitfold.load(folder, dtype=torch.float32)
    text: torch.Tensor = loaded.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    return text[0, len(IDS) :].tolist()


@pytest.mark.parametrize("way", FOREIGN)
def test_folders_for_it_are_served_unedited(tmp_path: Path, way: str) -> None:
    python_of("vllm")
    kind, said = FOREIGN[way]
    bitfold.quantize(model(tmp_path / "m"), tmp_path / "q", export=kind, method="rtn", **said)
    same(ask(tmp_path / "q", tmp_path, dtype="bfloat16"), tmp_path / "q", "bfloat16")


@pytest.mark.parametrize("way", OWN)
def test_own_folders_through_the_plugin(tmp_path: Path, way: str) -> None:
    """In float32, with the very products that bitfold computes: the same text as well."""
    python_of("vllm")
    bitfold.quantize(model(tmp_path / "m"), tmp_path / "q", **OWN[way])
    found = ask(tmp_path / "q", tmp_path, dtype="float32")
    same(found, tmp_path / "q", "float32")
    assert found["text"] == greedy(tmp_path / "q")


@pytest.mark.parametrize("way", OWN)
def test_own_folders_decoded_as_they_are_loaded(tmp_path: Path, way: str) -> None:
    """As on a GPU, of which this machine has none: vLLM's own products of what the weights decode to."""
    python_of("vllm")
    bitfold.quantize(model(tmp_path / "m"), tmp_path / "q", **OWN[way])
    found = ask(tmp_path / "q", tmp_path, dtype="float32", elsewhere=True)
    same(found, tmp_path / "q", "float32")
    assert found["text"] == greedy(tmp_path / "q")


def test_tied_tables_and_compiled_graphs(tmp_path: Path) -> None:
    python_of("vllm")
    source = model(tmp_path / "m", tie_word_embeddings=True)
    bitfold.quantize(source, tmp_path / "q", recipe=bitfold.Recipe((bitfold.Rule("*", "int8"),)))
    same(ask(tmp_path / "q", tmp_path, dtype="float32", eager=False), tmp_path / "q", "float32")


# Widths that two ranks can cut: by tiles of 16 rows, by groups of inputs.
HALVES = {"hidden_size": 512, "intermediate_size": 512, "num_key_value_heads": 4}
CUT: dict[str, tuple[str, dict[str, Any]]] = {
    "integers": ("llama", {"format": "int4-asym-g32"}),
    "rotated, where inputs stay whole": (
        "qwen2",
        {
            "recipe": bitfold.Recipe(
                (
                    bitfold.Rule("*.o_proj.*", "int8"),
                    bitfold.Rule("*.down_proj.*", "int4-g32"),
                    bitfold.Rule("*.self_attn.*", "trellis-4", transform="hadamard"),
                    bitfold.Rule("*.mlp.*", "trellis-3", transform="hadamard"),
                    bitfold.Rule("*", "int8"),
                )
            )
        },
    ),
}


@pytest.mark.parametrize("way", CUT)
def test_two_ranks(tmp_path: Path, way: str) -> None:
    """Two processes, rows cut by whole tiles and inputs by whole groups: what one process says, within rounding."""
    python_of("vllm")
    family, said = CUT[way]
    bitfold.quantize(model(tmp_path / "m", family, **HALVES), tmp_path / "q", **said)
    two = ask(tmp_path / "q", tmp_path, dtype="float32", ranks=2)
    one = ask(tmp_path / "q", tmp_path, dtype="float32")
    off = (torch.tensor(two["of_prompt"]) - torch.tensor(one["of_prompt"])).abs().max()
    assert off <= tolerance("float32"), f"off by {off}"
    assert two["text"] == one["text"]
    same(two, tmp_path / "q", "float32")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"format": "trellis-3", "transform": "hadamard"}, "would cut the rotation of its 512 inputs"),
        ({"format": "trellis-3", "transform": "none"}, "trellis-3 is no format of codes with scales of rows"),
    ],
    ids=["rotation", "inputs of trellis codes"],
)
def test_two_ranks_refuse_to_cut(tmp_path: Path, said: dict[str, Any], why: str) -> None:
    python_of("vllm")
    bitfold.quantize(model(tmp_path / "m", **HALVES), tmp_path / "q", **said)
    with pytest.raises(AssertionError, match=why):
        ask(tmp_path / "q", tmp_path, dtype="float32", ranks=2)


# vLLM 0.32's attention uses the tiles of AMX in bfloat16 and does not ask Linux for them; a library that multiplies by
# them does, so that a first prompt too short for that (three tokens, say) ends the worker by an illegal instruction,
# whatever the model. bitfold's core asks when it is loaded.
SERVED: dict[str, tuple[dict[str, Any], Any]] = {
    "compressed-tensors": ({"export": "compressed-tensors", "bits": 4, "group_size": 32, "method": "rtn"}, IDS),
    "the plug-in": ({"format": "trellis-3", "transform": "hadamard"}, IDS[:3]),
}


@pytest.mark.parametrize("way", SERVED)
def test_openai_endpoint(tmp_path: Path, way: str) -> None:
    """`vllm serve FOLDER`, asked once."""
    python = python_of("vllm")
    said, prompt = SERVED[way]
    bitfold.quantize(model(tmp_path / "m"), tmp_path / "q", **said)
    tiny_lm.tokenizer().save_pretrained(tmp_path / "q")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "q"), "--port", str(port)]
    words += ["--host", "127.0.0.1", "--max-model-len", "128", "--max-num-seqs", "2", "--enforce-eager"]
    cores = sorted(os.sched_getaffinity(0))
    env = {**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(cores[0])}
    if "export" not in said:
        env["PYTHONPATH"] = plugin(tmp_path)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([python, *words], env=env, stdout=log, stderr=log)
    try:
        wanted = {"model": str(tmp_path / "q"), "prompt": prompt, "max_tokens": 5, "temperature": 0}
        body = json.dumps(wanted).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    said = json.load(answer)
                break
            except OSError:
                time.sleep(2)
        assert said["usage"]["completion_tokens"] == 5
    finally:
        server.terminate()
        server.wait(60)
