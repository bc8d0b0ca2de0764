"""The program itself: version, spelling of flags, and how errors end it."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from bitfold.errors import BitfoldError, UsageError
from bitfold.system import progress
from bitfold.system.units import parse_size

if TYPE_CHECKING:
    import torch

if TYPE_CHECKING:
    from bitfold.system.team import Team

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 128 + signal.SIGTERM
# typer may carry a copy of click of its own, so click's base class is found through what typer exports.
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


# As they are used.
_ORDER = (
    *("quantize", "distill", "finetune", "merge", "eval", "layers", "compare", "report"),
    *("generate", "chat", "serve", "inspect", "verify", "formats", "methods", "convert", "upload"),
)


class Terminated(BaseException):
    """The process was asked to end by SIGTERM: no error, so it passes those who catch errors, as Ctrl-C does."""


def end_in_order() -> None:
    """From now on SIGTERM ends the program as Ctrl-C does: what is finished is kept, and said. A second one kills."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated


class _Commands(TyperGroup):
    """Lists commands as they are used, and ends with one message and an exit code whatever a command raises."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [
            *(n for n in _ORDER if n in self.commands),
            *(name for name in super().list_commands(ctx) if name not in _ORDER),
        ]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BitfoldError as error:
            _debug_traceback()
            _stop(_describe(error), error.exit_code)
        except KeyboardInterrupt:
            _stop("interrupted", INTERRUPTED)
        except Terminated:
            _stop("terminated", TERMINATED)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except _ClickException as error:
            _stop(_misspelt(error), UsageError.exit_code)
        except Exception as error:
            _debug_traceback()
            _stop(_unexpected(error), INTERNAL_ERROR)


def _describe(error: BitfoldError) -> str:
    lines = [f"error: {error.where}: {error.what}" if error.where else f"error: {error.what}"]
    return "\n".join([*lines, f"  hint: {error.hint}"] if error.hint else lines)


def _misspelt(error: Any) -> str:
    """What typer says of flags, in the words and the one place of all other errors."""
    path = error.ctx.command_path if getattr(error, "ctx", None) is not None else "bitfold"
    message = error.format_message().replace("Value error, ", "")
    return f"error: {message}\n  hint: see `{path} --help`"


def _unexpected(error: Exception) -> str:
    detail = (str(error).strip().splitlines() or [""])[0]
    text = f"unexpected error: {type(error).__name__}" + (f": {detail}" if detail else "")
    return text if _debugging() else f"{text}\n  hint: set BITFOLD_DEBUG=1 and run the command again for the traceback"


def _debugging() -> bool:
    return os.environ.get("BITFOLD_DEBUG", "0") not in ("", "0")


def _debug_traceback() -> None:
    if _debugging():
        traceback.print_exc()


def _stop(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def _hyphens(token: str) -> str:
    """--group_size is --group-size."""
    return token.replace("_", "-")


app = typer.Typer(
    cls=_Commands,
    help="Fold the weights of neural networks into few bits: quantize, pack, store, run, and prove what was lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": _hyphens, "help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
PreTokenizer = Annotated[
    str | None,
    typer.Option(
        help="Of a GGUF file: the rule by which its tokenizer cuts text, such as llama-bpe.", show_default=False
    ),
]
Device = Annotated[
    str, typer.Option(help="Where to compute: cpu, cuda, mps, xpu, or auto (an accelerator, if PyTorch sees one).")
]
MaxGpuMemory = Annotated[
    str | None, typer.Option(help="Ceiling on the memory of the accelerator, such as 8GB.", show_default=False)
]
Executor = Annotated[
    str,
    typer.Option(help="Where the work is done: local, processes (of this machine), ray or ray:ADDRESS (a cluster)."),
]
Workers = Annotated[
    int | None, typer.Option(help="How many processes (default: one for each core).", show_default=False)
]
ModelArgument = Annotated[
    str, typer.Argument(help="A model folder, a GGUF file, or a Hub repository (org/name).", show_default=False)
]


def the_device(name: str, limit: str | None) -> torch.device:
    """What `--device` and `--max-gpu-memory` mean."""
    from bitfold.system.backend import open_device

    return open_device(name, None if limit is None else parse_size(limit, where="--max-gpu-memory"))


def _version(asked: bool) -> None:
    if asked:
        from bitfold import __version__

        print(f"bitfold {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is about code that the user did not write
    warnings.showwarning = _one_line_warning
    progress.enable()


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings of the library are for the user; those of others about their own future are not."""
    if not issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        print(f"warning: {message}", file=sys.stderr)


def joined() -> Team:
    """The processes that `torchrun` started with this one; only the first of them shows how far it is."""
    from bitfold.system.team import gathered

    team = gathered()
    if team.rank > 0:
        progress.enable(False)
        warnings.simplefilter("ignore")
    return team


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False), flush=True)
