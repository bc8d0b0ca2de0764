"""Every family of language models that transformers has, small and random: what of bitfold works on it.

    python benchmarks/families.py [--families NAME ...] [--failures] [--results FILE] [--table docs/models.md]

For each class of transformers' mappings of causal, image-text and sequence-to-sequence models, a small model is saved,
and then, as a user would, quantized to 8 bits by rounding, quantized to 4 bits by the default method (calibrated on 64
tokens), loaded, and asked for three tokens. The logits of what is loaded are compared with those that transformers
computes from the original: rounding to 8 bits costs some thousandths, so that weights that were exchanged, transposed
or lost show.

Results are appended to a file of JSON lines; families that are there are not run again, unless they are named or, with
--failures, did not pass. A family runs in a process of its own, forked from one that has imported everything, each
step in another; a step may take --seconds and 16 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import family_page
import small_models
import torch
import transformers as hf
from family_page import Record, passed, problems
from transformers.models.auto import modeling_auto

import bitfold
from bitfold.cli import app
from bitfold.engine import Sampling, generate

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image and text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
PROMPT = "The quick brown fox"
MOST_BYTES = 16 << 30  # private mappings of files, made for each tensor, count as well


@dataclass(frozen=True)
class Family:
    """A model type of transformers and the class that a mapping has for it."""

    kind: str
    cls: str
    task: str

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.cls}"


def families() -> list[Family]:
    """All entries of the mappings, each pair of type and class once."""
    found: dict[str, Family] = {}
    for task, mapping in TASKS.items():
        for kind, cls in getattr(modeling_auto, mapping).items():
            family = Family(kind, cls, task)
            found.setdefault(family.key, family)
    return list(found.values())


def import_everything() -> None:
    """Run a Llama in this process, so that the forks find every module imported."""
    hf.T5ForConditionalGeneration, hf.LlavaForConditionalGeneration, hf.MixtralForCausalLM  # noqa: B018
    with tempfile.TemporaryDirectory() as place:
        original = _saved(Family("llama", "LlamaForCausalLM", "causal"), Path(place))[0]
        text = bitfold.Calibration(str(_text(Path(place))), nsamples=1, seqlen=32)
        bitfold.quantize(original, Path(place) / "four", bits=4, calibration=text)
        bitfold.quantize(original, Path(place) / "eight", bits=8)
        logits(bitfold.load(Path(place) / "four"), _ids())
        generate(Path(place) / "four", PROMPT, sampling=Sampling(2))


def isolated(function: Callable[..., Record], *args: Any, seconds: float) -> Record:
    """Call a function in a forked process; its record, or {"failed": why}."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setpgid(0, 0)
        _answer(writer, function, args)
    os.close(writer)
    data = b""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    status = os.waitpid(child, 0)[1]
    if data:
        answer: Record = json.loads(data)
        return answer
    return {"failed": f"killed by signal {os.WTERMSIG(status)} (after at most {seconds:g} s)"}


def _answer(writer: int, function: Callable[..., Record], args: Iterable[Any]) -> None:
    try:
        record = function(*args)
    except BaseException as error:
        record = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(json.dumps(record).encode())
    os._exit(0)


def command(log: Path, *args: str) -> Record:
    """A bitfold command in this process: {"out": what it printed}, or {"failed": its last words, "exit": code}."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    stdout, stderr = log.with_suffix(".out"), log.with_suffix(".err")
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ["BITFOLD_DEBUG"] = "1"
    code: Any = 0
    try:
        app(list(args), prog_name="bitfold")
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        return {"failed": _last_words(stderr.read_text()), "exit": code}
    return {"out": stdout.read_text()}


def _last_words(text: str) -> str:
    """The error of a command, without its traceback and its hints."""
    lines = [line.strip() for line in text.strip().splitlines()]
    found = [line for line in lines if line.startswith(("error:", "unexpected error:"))]
    return (found or lines or ["nothing was said"])[-1][:500]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a text alone; an encoder-decoder gets it on both sides."""
    extra = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    torch.manual_seed(0)  # a model of diffusion draws noise
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
    return result.logits.float()  # type: ignore[no-any-return]


def compared(folder: Path, ids: torch.Tensor, reference: torch.Tensor) -> Record:
    """Load a quantized folder; relative error of its logits."""
    found = logits(bitfold.load(folder), ids)
    if not bool(torch.isfinite(found).all()):
        return {"failed": "logits are not finite"}
    return {"error": float((found - reference).norm() / reference.norm())}


def converted(eight: Path, plain: Path, cls: str, ids: torch.Tensor) -> Record:
    """How far the loaded folder is from what transformers makes of the same weights, converted to plain ones."""
    reference = logits(getattr(hf, cls).from_pretrained(plain), ids)
    return compared(eight, ids, reference)


def survey(family: Family, seconds: float) -> Record:
    """Everything about one family."""
    record: Record = {"kind": family.kind, "class": family.cls, "task": family.task}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            original, parameters = _saved(family, folder)
        except Exception as error:
            return {**record, "build": {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}}
        record["build"] = {"parameters": parameters}
        record.update(_steps(original, folder, family.cls, seconds))
    return record


def _saved(family: Family, folder: Path) -> tuple[Path, int]:
    """A folder like those of the Hub; how many parameters there are."""
    model: Any = small_models.small_model(small_models.small_config(family.kind), family.cls)
    model.save_pretrained(folder / "original")
    small_models.byte_tokenizer().save_pretrained(folder / "original")
    return folder / "original", sum(p.numel() for p in model.parameters())


def _text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("".join(f"Line {i}: {PROMPT} jumps over {i * i} lazy dogs.\n" for i in range(60)))
    return file


def _ids() -> torch.Tensor:
    return torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(2))


def _steps(original: Path, folder: Path, cls: str, seconds: float) -> Record:
    ids, text = _ids(), str(_text(folder))
    steps: Record = {}
    reference = None
    try:
        reference = logits(getattr(hf, cls).from_pretrained(original), ids)
        steps["original"] = {}
    except Exception as error:  # some want images, or are broken in transformers: nothing to compare with
        steps["original"] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}

    def run(name: str, *args: str) -> Record:
        return isolated(command, folder / name, *args, seconds=seconds)

    eight, four = str(folder / "eight"), str(folder / "four")
    steps["rtn"] = run("rtn", "quantize", str(original), "-o", eight, "--bits", "8", "--method", "rtn", "--json")
    calibrated = ["--calibration", text, "--bits", "4", "--nsamples", "2", "--seqlen", "32", "--json"]
    steps["calibrated"] = run("calibrated", "quantize", str(original), "-o", four, *calibrated)
    for step in ("rtn", "calibrated"):
        if "out" in steps[step]:
            steps[step] = _report(json.loads(steps[step]["out"]))
    for name, place in (("load", eight), ("load4", four)):
        if Path(place).exists():
            judge = (compared, Path(place), ids, reference) if reference is not None else (_loaded, Path(place))
            steps[name] = isolated(*judge, seconds=seconds)
    if Path(eight).exists() and reference is not None:
        plain = str(folder / "plain")
        steps["convert"] = run("convert", "convert", eight, "-o", plain, "--dtype", "float32")
        if "failed" not in steps["convert"]:
            steps["convert"] = isolated(converted, Path(eight), Path(plain), cls, ids, seconds=seconds)
    if Path(eight).exists():
        steps["generate"] = run("generate", "generate", eight, PROMPT, "--max-new-tokens", "3")
        steps["generate"].pop("out", None)
        if "failed" in steps["generate"]:
            steps["generate"]["original"] = isolated(_original_generates, original, cls, seconds=seconds)
    return steps


def _report(report: Record) -> Record:
    quantized = [t for t in report["tensors"] if t["format"]]
    return {
        "method": report["method"],
        "formats": sorted({t["format"] for t in quantized}),
        "quantized": len(quantized),
        "solved on text": sum(t["output_error"] is not None for t in quantized),
        "fallbacks": [f"{f['where']}: {f['why']}: {f['instead']}" for f in report["fallbacks"]],
    }


def _loaded(folder: Path) -> Record:
    bitfold.load(folder)
    return {}


def _original_generates(original: Path, cls: str) -> Record:
    """Whether transformers itself can: what it cannot is not asked of us."""
    model = getattr(hf, cls).from_pretrained(original)
    ids = small_models.byte_tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    return {}


def read(path: Path) -> dict[str, Record]:
    """The last record of each family."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {f"{r['kind']}/{r['class']}": r for r in records}


def _wanted(family: Family, args: argparse.Namespace, old: Record | None) -> bool:
    if args.families:
        return family.kind in args.families or family.cls in args.families
    return old is None or (args.failures and not passed(old))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=[], help="model types or classes; default: all")
    parser.add_argument("--failures", action="store_true", help="run again what did not pass")
    parser.add_argument("--results", type=Path, default=Path("build/families.jsonl"))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--table", type=Path, help="write the page from the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = read(args.results)
    wanted = [f for f in families() if _wanted(f, args, done.get(f.key))]
    if wanted:
        import_everything()
    for family in wanted:
        started = time.perf_counter()
        record = isolated(survey, family, args.seconds, seconds=8 * args.seconds)
        if "build" not in record:
            record = {"kind": family.kind, "class": family.cls, "task": family.task, "build": record}
        record["seconds"] = round(time.perf_counter() - started, 1)
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{family.kind}: {'; '.join(problems(record)) or 'passes'}", flush=True)
    if args.table:
        args.table.write_text(family_page.page(read(args.results).values()))


if __name__ == "__main__":
    main()
