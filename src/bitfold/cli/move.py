"""`bitfold convert` and `bitfold upload`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfold.cli.app import Json, PreTokenizer, Revision, app, print_json
from bitfold.errors import UsageError
from bitfold.system.units import parse_size


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A GGUF file, a quantized or plain folder, or a Hub repository.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Argument(help="File or folder to write; or say it as -o.", show_default=False)
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="File or folder to write; it must not exist yet.", show_default=False),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="What to write: safetensors (floating point), bitfold or gguf (types as they are), gguf:TYPE,"
            " compressed-tensors, gptq, awq or auto-round (codes as they are)."
        ),
    ] = "safetensors",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of safetensors: bfloat16 (default), float16, float32, or auto: as they are read.", show_default=False
        ),
    ] = None,
    dither_seed: Annotated[
        int | None,
        typer.Option(help="GGUF only: add noise within the quantization steps, so that weights leave the old lattice."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size at which a new file is begun.")] = "4GB",
    pre_tokenizer: PreTokenizer = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Write any readable checkpoint in another container: plain folder, bitfold folder, GGUF file."""
    if (output is None) == (output_dir is None):
        raise UsageError("say once where to write", where="OUTPUT", hint="bitfold convert SOURCE OUTPUT --to ...")
    out = output or output_dir
    assert out is not None
    if to != FLOATS and (dtype, dither_seed) != (None, None):
        raise UsageError("only plain folders have a dtype and can be dithered", where="--to", hint="--to gguf:F16")
    shard_bytes = parse_size(max_shard_size, where="--max-shard-size")
    from bitfold.checkpoints.hub.fetch import resolve

    local = resolve(source, revision=revision)
    if to != FLOATS:
        found = _repacked(local, out, to, pre_tokenizer)
    else:
        found = _plain(local, out, dtype or "bfloat16", dither_seed, shard_bytes, pre_tokenizer)
    if json:
        print_json({"source": source, "output": str(out), **found.facts})
        return
    print(f"{out}: {found.text}")


FLOATS = "safetensors"


@dataclass(frozen=True)
class _Made:
    """What was written: for machines, and in a line."""

    facts: dict[str, Any]
    text: str


def _plain(
    source: Path, out: Path, dtype: str, dither_seed: int | None, shard_bytes: int, pre_tokenizer: str | None
) -> _Made:
    from bitfold.checkpoints import convert as run
    from bitfold.checkpoints.inspection import inspect
    from bitfold.system.units import size_text

    made = run(source, out, dtype, dither_seed, shard_bytes, pre_tokenizer)
    result = inspect(made)
    facts = {"tensors": len(result.tensors), "numel": result.numel, "bytes": result.nbytes}
    return _Made(facts, f"{len(result.tensors)} tensors, {size_text(result.nbytes)}")


def _repacked(source: Path, out: Path, to: str, pre_tokenizer: str | None) -> _Made:
    from bitfold.checkpoints.repack import repack as run
    from bitfold.system.units import size_text

    made = run(source, out, to, pre_tokenizer)
    worst = max(made.losses, key=lambda name: made.losses[name], default=None)
    count = made.exact + len(made.losses)
    losses = [{"tensor": name, "error": loss} for name, loss in made.losses.items()]
    facts = {"tensors": count, "bytes": made.nbytes, "exact": worst is None, "losses": losses}
    text = f"{count} tensors, {size_text(made.nbytes)}, exact: the same numbers, bit for bit"
    if worst is not None:
        mean = sum(made.losses.values()) / len(made.losses)
        text = (
            f"{count} tensors, {size_text(made.nbytes)}; {made.exact} exact, {len(made.losses)} rounded anew: relative"
            f" error {mean:.2e} of the squared weights on average, {made.losses[worst]:.2e} at most ({worst})"
        )
    return _Made(facts, text)


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A complete model folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Hub repository, org/name; created if need be.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to, created if need be.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    json: Json = False,
) -> None:
    """Publish a model folder on the Hugging Face Hub."""
    from bitfold.checkpoints.hub.upload import upload as run

    url = run(folder, repo, private=private, revision=revision, commit_message=message)
    if json:
        print_json({"folder": str(folder), "repo": repo, "url": url})
        return
    print(url)
