"""The program as users meet it: what it prints, where, how it ends; and that docs/cli.md tells the whole of it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import tiny_lm
from bitfold import errors
from bitfold.calibration.options import Calibration
from bitfold.cli import app
from bitfold.methods.fits import FITS
from bitfold.methods.solvers import SOLVERS
from bitfold.recipes.options import MethodOptions
from bitfold.records.record import read_record
from bitfold.run import driver
from bitfold.run.options import Request, RunOptions
from bitfold.system import progress

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return dict(json.loads(self.out))


Bitfold = Callable[..., Run]


@pytest.fixture
def bitfold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bitfold]:
    """Run the program in this process."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", os.environ.get("TRANSFORMERS_VERBOSITY", "error"))
    monkeypatch.delenv("BITFOLD_DEBUG", raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*args: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(a) for a in args], prog_name="bitfold")
        out, err = capsys.readouterr()
        return Run(int(ended.value.code or 0), out, err)

    yield run
    progress.enable(False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("cli") / "model", tiny_lm.model())


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    out = model.parent / "quantized"
    driver.quantize(model, out, bits=4, group_size=32)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_lm.TEXT, encoding="utf-8")
    return path


# --- the documentation ------------------------------------------------------------------------------------------------


def section(command: str) -> str:
    found = re.search(rf"^## bitfold {command}$(.*?)(?=^## |\Z)", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"docs/cli.md has no section on `bitfold {command}`"
    return found[1]


def options(command: str) -> set[str]:
    return {o for p in COMMANDS[command].params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_is_documented_and_no_other(command: str) -> None:
    cells = re.findall(r"^\| (`-[^|]*) \|", section(command), re.M)
    documented = {option for cell in cells for option in re.findall(r"`(-[^`]*)`", cell)}
    assert documented == options(command)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_json_and_help(command: str, bitfold: Bitfold) -> None:
    assert "--json" in options(command)
    assert COMMANDS[command].help
    assert all(getattr(p, "help", None) for p in COMMANDS[command].params), "an option without help"
    assert bitfold(command, "--help").code == 0


def test_exit_codes_are_documented() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.M))
    family = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.BitfoldError)]
    codes = {error.exit_code for error in family} - {errors.BitfoldError.exit_code}
    assert {int(code) for code in rows} == {0, 70, 130, 143} | codes


def test_fits_and_solvers_are_named_in_the_help() -> None:
    helps = {p.name: p.help for p in COMMANDS["quantize"].params if hasattr(p, "help")}
    assert all(name in helps["fit"] for name in FITS)
    assert all(name in helps["method"] for name in SOLVERS)


def keys_are_documented(command: str, data: Any) -> None:
    """All keys, in nested objects as well, except those of recipes (keys of a rule), of what is kept, of engines."""
    if isinstance(data, dict):
        for key, value in data.items():
            assert f"`{key}`" in section(command), f"key {key!r} is not documented"
            if key not in ("recipe", "kept", "engines"):
                keys_are_documented(command, value)
    elif isinstance(data, list):
        for value in data:
            keys_are_documented(command, value)


# --- the program ------------------------------------------------------------------------------------------------------


def test_version_and_bare_call(bitfold: Bitfold) -> None:
    assert re.fullmatch(r"bitfold \d+\.\d+\.\d+\n", bitfold("--version").out)
    bare = bitfold()
    assert all(command in bare.out for command in COMMANDS)
    assert bare.out.index(" quantize ") < bare.out.index(" eval ") < bare.out.index(" upload ")


def test_help_does_not_wait_for_pytorch() -> None:
    code = (
        "import sys, bitfold.cli; print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_module_runs_too() -> None:
    done = subprocess.run([sys.executable, "-m", "bitfold", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bitfold ")


@pytest.mark.parametrize("flag", ["--group-size", "--group_size"])
def test_hyphens_and_underscores(flag: str, bitfold: Bitfold, model: Path) -> None:
    result = bitfold("quantize", model, "--bits", 4, flag, 16, "--dry_run", "--json").json
    assert {t["format"] for t in result["tensors"]} == {None, "int4-asym-g16"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.WeightError("NaN among the weights", where="layer.3", hint="fetch it again"), 5,
         "error: layer.3: NaN among the weights\n  hint: fetch it again\n"),
        (errors.HubError("too many requests"), 6, "error: too many requests\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ZeroDivisionError("division by zero"), 70,
         "unexpected error: ZeroDivisionError: division by zero\n"
         "  hint: set BITFOLD_DEBUG=1 and run the command again for the traceback\n"),
        (MemoryError(), 70, "unexpected error: MemoryError\n"
         "  hint: set BITFOLD_DEBUG=1 and run the command again for the traceback\n"),
    ],
)  # fmt: skip
def test_how_errors_end(
    error: BaseException, code: int, message: str, bitfold: Bitfold, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(driver, "run", fail)
    result = bitfold("quantize", "m", "--bits", 4, "-o", "out", "--json")
    assert (result.code, result.out, result.err) == (code, "", message)
    monkeypatch.setenv("BITFOLD_DEBUG", "1")
    debug = bitfold("quantize", "m", "--bits", 4, "-o", "out")
    assert debug.code == code
    assert ("Traceback" in debug.err) == (not isinstance(error, KeyboardInterrupt))


def test_warnings_are_one_line(bitfold: Bitfold, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*args: object, **kwargs: object) -> None:
        warnings.warn("using the copy fetched earlier", stacklevel=1)
        warnings.warn("will change", FutureWarning, stacklevel=1)
        raise errors.HubError("stop")

    monkeypatch.setattr(driver, "run", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = bitfold("quantize", "m", "--bits", 4, "-o", "out")
    assert result.err == "warning: using the copy fetched earlier\nerror: stop\n"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["quantize", "MODEL", "--bits", "4"], 2, ["--output-dir", "--dry-run"]),
        (["quantize", "MODEL", "-o", "OUT"], 2, ["bits", "format"]),
        (["quantize", "MODEL", "--bits", "9", "-o", "OUT"], 2, ["9 bits"]),
        (["quantize", "MODEL", "--format", "int4-g46x", "-o", "OUT"], 2, ["int4-g46x", "bitfold formats"]),
        (["quantize", "MODEL", "--format", "int4", "--group-size", "4096", "-o", "OUT"], 2, ["4096", "_proj.weight"]),
        (["quantize", "MODEL", "--bits", "4", "-o", "MODEL"], 3, ["MODEL", "exists already"]),
        (["quantize", "MODEL", "--bits", "4", "-o", "OUT", "--max-shard-size", "4 apples"], 2, ["--max-shard-size"]),
        (["quantize", "MODEL", "--bits", "4", "-o", "OUT", "--fit", "best"], 2, ["best", "mse"]),
        (["quantize", "MODEL", "--recipe", "OUT", "-o", "OUT"], 2, ["OUT", "cannot be read"]),
        (["quantize", "./nowhere", "--bits", "4", "-o", "OUT"], 3, ["./nowhere", "no such file"]),
        (["quantize", "MODEL", "--bits", "four"], 2, ["error: ", "--bits", "hint: see `bitfold quantize --help`"]),
        (["eval", "MODEL", "--text", "OUT"], 2, ["no such text file"]),
        (["eval", "MODEL", "--metric", "embedding"], 2, ["--reference"]),
        (["eval", "./nowhere"], 3, ["./nowhere"]),
        (["generate", "MODEL"], 2, ["--prompt"]),
        (["generate", "MODEL", "a", "--prompt", "b"], 2, ["--prompt"]),
        (["generate", "MODEL", "a", "--temperature", "-1"], 2, ["temperature"]),
        (["generate", "MODEL", "a", "--max-new-tokens", "0"], 2, ["max_new_tokens"]),
        (["inspect", "./nowhere"], 3, ["./nowhere"]),
        (["convert", "MODEL", "-o", "MODEL"], 3, ["exists already"]),
        (["convert", "MODEL", "-o", "OUT", "--dtype", "int8"], 2, ["int8", "bfloat16"]),
        (["upload", "OUT", "me/x"], 3, ["OUT"]),
        (["frobnicate"], 2, ["frobnicate"]),
        (["inspect", "MODEL", "--frob"], 2, ["--frob", "bitfold inspect --help"]),
        (["inspect"], 2, ["error: "]),
    ],
)  # fmt: skip
def test_refusals(args: list[str], code: int, words: list[str], bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    result = bitfold(*(places.get(a, a) for a in args))
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in words:
        assert places.get(word, word) in result.err
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for command in (["quantize", "--bits", 4, "-o", tmp_path / "out"], ["inspect"], ["eval"], ["generate", "-p", "x"]):
        result = bitfold(command[0], damaged, *command[1:])
        assert result.code == 3
        assert "model.safetensors" in result.err
        assert "truncated" in result.err
    assert not (tmp_path / "out").exists()
    (damaged / "config.json").unlink()
    assert "config.json" in bitfold("inspect", damaged).err


def test_quantize(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dry = bitfold("quantize", model, "--bits", 3, "--method", "rtn", "-o", out, "--dry-run", "--json").json
    assert not out.exists()
    result = bitfold(
        "quantize",
        model,
        "--bits",
        3,
        "--method",
        "rtn",
        "-o",
        out,
        "--ignore",
        "re:.*down_proj",
        "--ignore",
        "q_proj",
        "--json",
    )
    keys_are_documented("quantize", result.json)
    kept = {t["tensor"] for t in result.json["tensors"] if t["format"] is None}
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"} < kept
    assert (out / "config.json").is_file()
    assert dry["output"] is None
    assert dry["bytes_after"] < result.json["bytes_after"] < result.json["bytes_before"]
    again = bitfold("quantize", model, "--bits", 3, "-o", out)
    assert again.code == 3
    assert "exists already" in again.err


def test_quantize_in_words(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    result = bitfold("quantize", model, "--format", "nf4", "-o", tmp_path / "out", "--tensors")
    assert result.code == 0
    assert re.search(r"^model\.layers\.1\.mlp\.up_proj\.weight +nf4 +96x64 +4\.250", result.out, re.M)
    assert re.search(r"^nf4 +14 +4\.267", result.out, re.M)
    assert re.search(rf"^written to +{re.escape(str(tmp_path / 'out'))}$", result.out, re.M)


def test_quantize_options_reach_the_driver(bitfold: Bitfold, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(request: Request, options: RunOptions) -> None:
        seen[:] = (request, options)
        raise errors.UsageError("enough")

    monkeypatch.setattr(driver, "run", record)
    bitfold(
        "quantize", "org/m", "-o", "o", "--format", "nf4", "--group-size", 32, "--fit", "hqq", "--method", "rtn",
        "--act", "int8", "--ignore", "a", "--ignore", "b", "--seed", 7, "--max-shard-size", "2GiB", "--revision", "v1",
        "--upload-repo", "me/q", "--transform", "none", "--max-memory", "1GB", "--strict", "--restart", "--events", "e",
    )  # fmt: skip
    wanted = MethodOptions(None, "nf4", 32, "hqq", "rtn", "none", "int8", ignore=("a", "b"))
    how = RunOptions(7, 2 << 30, 10**9, restart=True, strict=True, events=Path("e"), revision="v1", upload_repo="me/q")
    assert seen == [Request("org/m", Path("o"), wanted), how]
    bitfold(
        "quantize", "org/m", "-o", "o", "--bits", 3, "--method", "ldlq", "--calibration", "a.txt", "--nsamples", 4,
        "--seqlen", 64, "--drift", 0.25, "--no-fisher", "--no-refit", "--dry-run", "--prune", "wanda:0.5",
    )  # fmt: skip
    text = Calibration("a.txt", 4, 64, 0.25, False, refit=False)
    assert seen[0] == Request("org/m", Path("o"), MethodOptions(3, method="ldlq", prune="wanda:0.5"), text)
    assert seen[1] == RunOptions(dry_run=True, max_shard_bytes=4 * 10**9)


def test_eval(bitfold: Bitfold, model: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    args = ("eval", quantized, "--reference", model, "--text", text, "--context", 64, "--max-tokens", 256)
    result = bitfold(*args, "--cache-dir", tmp_path, "--json").json
    keys_are_documented("eval", result)
    assert result["kl_mean"] > 0
    assert result["windows"] == 4
    passed = bitfold(*args, "--max-kl", 10, "--cache-dir", tmp_path)
    assert passed.code == 0
    assert re.search(r"^perplexity +\d", passed.out, re.M)
    failed = bitfold(*args, "--max-kl", result["kl_mean"] / 2, "--cache-dir", tmp_path, "--json")
    assert failed.code == 7
    assert json.loads(failed.out)["kl_mean"] == pytest.approx(result["kl_mean"])
    assert "above the limit" in failed.err
    assert not read_record(quantized).get("evaluations")
    bitfold(*args, "--save", "--cache-dir", tmp_path)
    (saved,) = read_record(quantized)["evaluations"]
    assert (saved["reference"], saved["kl_mean"]) == ("model", pytest.approx(result["kl_mean"]))
    assert bitfold(*args, "--min-top1", 1, "--cache-dir", tmp_path).code == 7


def test_eval_writes_the_card(bitfold: Bitfold, model: Path, text: Path, tmp_path: Path) -> None:
    driver.quantize(model, tmp_path / "q", bits=8)
    args = ("--text", text, "--context", 64, "--max-tokens", 128, "--update-card")
    assert bitfold("eval", tmp_path / "q", *args).code == 0
    assert "| perplexity |" in (tmp_path / "q" / "README.md").read_text(encoding="utf-8")


def test_eval_embeddings(bitfold: Bitfold, tmp_path: Path) -> None:
    encoder = tiny_lm.folder(tmp_path / "bert", tiny_lm.encoder())
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("one sentence\n\nand another\n", encoding="utf-8")
    args = ("eval", encoder, "--reference", encoder, "--text", sentences, "--metric", "embedding")
    result = bitfold(*args, "--json").json
    keys_are_documented("eval", result)
    assert result["texts"] == 2
    assert result["cosine_min"] == pytest.approx(1)
    assert "cosine, mean" in bitfold(*args).out
    no_perplexity = bitfold("eval", encoder, "--text", sentences)
    assert no_perplexity.code == 4
    assert "--metric embedding" in no_perplexity.err
    assert bitfold(*args, "--max-kl", 1).code == 2


def test_layers(bitfold: Bitfold, model: Path, text: Path, tmp_path: Path) -> None:
    driver.quantize(model, tmp_path / "q", bits=3, group_size=16)
    args = ("layers", tmp_path / "q", "--reference", model, "--text", text, "--context", 32, "--max-tokens", 64)
    result = bitfold(*args, "--swaps", 2, "--swap-tokens", 32, "--save", "--json").json
    keys_are_documented("layers", result)
    assert len(result["layers"]) == 14
    assert sum(e["swap_kl"] is not None for e in result["layers"]) == 2
    assert read_record(tmp_path / "q")["layers"]["layers"] == result["layers"]
    assert re.search(r"^model\.layers\.0\.mlp\.up_proj\.weight +int3-asym-g16 +4\.\d", bitfold(*args).out, re.M)


def test_generate(bitfold: Bitfold, model: Path, quantized: Path) -> None:
    args = ("--max-new-tokens", 12, "--temperature", 1.0, "--seed", 5, "--json")
    first = bitfold("generate", quantized, "Line 1", *args).json
    keys_are_documented("generate", first)
    assert first["tokens"] <= 12
    same, other = (
        bitfold("generate", quantized, "--prompt", "Line 1", *args).json,
        bitfold(
            "generate", quantized, "Line 1", "--max-new-tokens", 12, "--temperature", 1.0, "--seed", 6, "--json"
        ).json,
    )
    assert same["text"] == first["text"] != other["text"]
    shown = bitfold("generate", quantized, "Line 1", *args[:-1])
    assert shown.out == "Line 1" + first["text"] + "\n"
    answer = bitfold("generate", model, "Hello", "--chat", "--max-new-tokens", 4)
    assert answer.code == 0
    assert not answer.out.startswith("Hello")


def test_generation_is_greedy_by_default(bitfold: Bitfold, model: Path) -> None:
    """The same as taking the most likely token by hand."""
    result = bitfold("generate", model, "Line 1", "--max-new-tokens", 6, "--json").json
    loaded, tokenizer = tiny_lm.model(), tiny_lm.tokenizer()
    ids = tokenizer("Line 1", return_tensors="pt")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, loaded(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert result["text"] == tokenizer.decode(ids[0, -6:], skip_special_tokens=True)


def test_chat(bitfold: Bitfold, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(lines: str, *args: object) -> Run:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return bitfold("chat", model, "--max-new-tokens", 5, "--temperature", 0, *args)

    result = talk("Hi\n\nHi\n/reset\nHi\n/exit\nnever read\n", "--json")
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert len(answers) == 3
    keys_are_documented("chat", answers)
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"] == answers[2]["prompt_tokens"]
    assert answers[0]["text"] == answers[2]["text"]
    assert talk("Hi\n").out == answers[0]["text"] + "\n\n"
    full = talk("x" * 200 + "\n")
    assert full.code == 2
    assert "more than the model can take" in full.err


def test_chat_needs_a_template(bitfold: Bitfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_lm.folder(tmp_path / "plain", tiny_lm.model(), chat=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    result = bitfold("chat", plain)
    assert result.code == 2
    assert "no chat template" in result.err


def test_inspect(bitfold: Bitfold, model: Path, quantized: Path) -> None:
    plain, packed = bitfold("inspect", model, "--json").json, bitfold("inspect", quantized, "--json").json
    keys_are_documented("inspect", packed)
    assert plain["kind"] == "safetensors"
    assert plain["bpw_quantized"] is None
    assert packed["kind"] == "bitfold"
    assert packed["numel"] == plain["numel"]
    on_disk = (quantized / "model.safetensors").stat().st_size
    assert 0 < on_disk - packed["bytes"] < 20_000  # nothing but the header is not a tensor
    assert packed["bytes"] == sum(t["nbytes"] for t in packed["tensors"]) == sum(f["nbytes"] for f in packed["formats"])
    words = bitfold("inspect", quantized).out
    assert re.search(r"^model\.layers\.0\.mlp\.up_proj\.weight +int4-asym-g32 +96x64 +4\.625", words, re.M)
    assert words.index("layers.0.") < words.index("layers.1.")


def test_formats(bitfold: Bitfold) -> None:
    result = bitfold("formats", "--json").json
    keys_are_documented("formats", result)
    assert {"int4-asym-g64", "nf4", "mxfp4", "q4_k"} <= {f["name"] for f in result["formats"]}
    assert re.search(r"^nf4 +4 +4\.25 +17/4 +16 +-1 \.\. 1 +2\d\.\d\d$", bitfold("formats").out, re.M)


def test_convert_dequantizes(bitfold: Bitfold, quantized: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from bitfold.checkpoints import open_source

    result = bitfold("convert", quantized, "-o", tmp_path / "plain", "--dtype", "float32", "--json").json
    keys_are_documented("convert", result)
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    source = open_source(quantized)
    assert set(weights) == set(source.names())
    assert all(torch.equal(weights[name], source.read(name).float()) for name in weights)
    assert bitfold("inspect", tmp_path / "plain", "--json").json["kind"] == "safetensors"
    assert bitfold("convert", quantized, "-o", tmp_path / "again").out.startswith(str(tmp_path / "again"))


def test_upload(bitfold: Bitfold, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitfold.checkpoints.hub import transfer as hub

    def record(folder: Path, repo: str, **options: object) -> str:
        assert (folder, repo) == (quantized, "me/q")
        assert options == {"private": True, "revision": "v1", "commit_message": "first"}
        return "https://hub/me/q"

    monkeypatch.setattr(hub, "upload", record)
    args = ("upload", quantized, "me/q", "--private", "--revision", "v1", "--message", "first")
    assert bitfold(*args).out == "https://hub/me/q\n"
    result = bitfold(*args, "--json").json
    keys_are_documented("upload", result)
    assert result["url"] == "https://hub/me/q"


def test_inspect_activations(bitfold: Bitfold, model: Path, quantized: Path, text: Path) -> None:
    args = ("--activations", text, "--context", 32, "--max-tokens", 64)
    result = bitfold("inspect", model, *args, "--json").json
    keys_are_documented("inspect", result)
    assert len(result["models"][0]["inputs"]) == 8
    words = bitfold("inspect", model, quantized, *args).out
    assert re.search(r"^outlier features +0 of 64 dimensions", words, re.M)
    assert re.search(r"^quantized +\d+\.\d +\d+\.\d+ +0", words, re.M)
    several = bitfold("inspect", model, quantized)
    assert several.code == 2
    assert "only with --activations" in several.err


def test_compare_and_report(bitfold: Bitfold, model: Path, text: Path, tmp_path: Path) -> None:
    for bits in (2, 6):
        driver.quantize(model, tmp_path / f"q{bits}", bits=bits, method="rtn")
    runs = (tmp_path / "q6", tmp_path / "q2")
    unmeasured = bitfold("compare", *runs)
    assert unmeasured.code == 2
    assert "--save" in unmeasured.err
    args = ("--reference", model, "--text", text, "--context", 64, "--max-tokens", 128)
    result = bitfold("compare", *runs, *args, "--save", "--json").json
    keys_are_documented("compare", result)
    assert [run["name"] for run in result["runs"]] == ["q2", "q6"]
    shown = bitfold("compare", *runs, "--plot", tmp_path / "pareto.svg")
    assert re.search(r"^q6 .*best at its size$", shown.out, re.M)
    assert (tmp_path / "pareto.svg").stat().st_size > 1000
    page = bitfold("report", *runs, "--output", tmp_path / "r.html", "--json").json
    keys_are_documented("report", page)
    assert page["missing"] is None
    assert bitfold("report", *runs, "-o", tmp_path / "r.html", "--swaps", 3).code == 2
