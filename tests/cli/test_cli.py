"""The program as users meet it: what it prints, where, how it ends; and that docs/cli.md tells the whole of it."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer

from bitfold import errors
from bitfold.cli import app
from bitfold.methods.fits import FITS
from bitfold.methods.solvers import SOLVERS
from bitfold.run import driver
from cli_runs import DOCS, Bitfold, section

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


# --- the documentation ------------------------------------------------------------------------------------------------


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
    assert {t["format"] for t in result["tensors"]} == {None, "int8", "int4-asym-g16"}


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
