"""`bitfold convert` and `bitfold upload`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfold.cli.app import Json, PreTokenizer, Revision, app, print_json
from bitfold.errors import UsageError
from bitfold.system.units import parse_size

Source = Annotated[
    str, typer.Argument(help="A GGUF file, a quantized or plain folder, or a Hub repository.", show_default=False)
]
Output = Annotated[Path | None, typer.Argument(help="File or folder to write; or say it as -o.", show_default=False)]
OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="File or folder to write; it must not exist yet.", show_default=False),
]
To = Annotated[
    str,
    typer.Option(
        help="What to write: safetensors (floating point), bitfold or gguf (types as they are), gguf:TYPE,"
        " compressed-tensors, gptq, awq or auto-round (codes as they are)."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of safetensors: bfloat16 (default), float16, float32, or auto: as they are read.", show_default=False
    ),
]
DitherSeed = Annotated[
    int | None,
    typer.Option(help="GGUF only: add noise within the quantization steps, so that weights leave the old lattice."),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Say the error of each tensor and the KL before the output gets its name.")
]
Text = Annotated[str | None, typer.Option(help="Of --measure: a text as for `bitfold eval`.", show_default=False)]
MaxKl = Annotated[
    float | None, typer.Option(help="Fail, and leave nothing, when the KL is above this.", show_default=False)
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(help="gguf:TYPE only: an importance matrix, of `bitfold imatrix` or llama.cpp.", show_default=False),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        help="Size at which a new file is begun (default: 4GiB in folders, one GGUF file).", show_default=False
    ),
]


@app.command()
def convert(
    source: Source,
    output: Output = None,
    output_dir: OutputDir = None,
    to: To = "safetensors",
    dtype: Dtype = None,
    dither_seed: DitherSeed = None,
    measure: Measure = False,
    text: Text = None,
    max_kl: MaxKl = None,
    imatrix: ImatrixFile = None,
    max_shard_size: MaxShardSize = None,
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
    if (measure or max_kl is not None or text is not None) and to == FLOATS:
        raise UsageError("of plain folders nothing is measured here", where="--measure", hint="bitfold eval OUTPUT")
    if to == FLOATS and imatrix is not None:
        raise UsageError("floats are not rounded, so nothing is weighed", where="--imatrix", hint="--to gguf:Q4_K_M")
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size, where="--max-shard-size")
    from bitfold.checkpoints.hub.fetch import resolve

    local = resolve(source, revision=revision)
    if to != FLOATS:
        measured = _Asked(text, max_kl) if measure or max_kl is not None or text is not None else None
        found = _repacked(local, out, to, pre_tokenizer, measured, imatrix, shard_bytes)
    else:
        found = _plain(local, out, dtype or "bfloat16", dither_seed, shard_bytes, pre_tokenizer)
    if json:
        print_json({"source": source, "output": str(found.path), **found.facts})
        return
    print(f"{found.path}: {found.text}")


FLOATS = "safetensors"


@dataclass(frozen=True)
class _Made:
    """What was written: where, for machines, and in a line."""

    path: Path
    facts: dict[str, Any]
    text: str


def _plain(
    source: Path, out: Path, dtype: str, dither_seed: int | None, shard_bytes: int | None, pre_tokenizer: str | None
) -> _Made:
    from bitfold.checkpoints import convert as run
    from bitfold.checkpoints.inspection import inspect
    from bitfold.system.units import size_text

    made = run(source, out, dtype, dither_seed, shard_bytes, pre_tokenizer)
    result = inspect(made)
    facts = {"tensors": len(result.tensors), "numel": result.numel, "bytes": result.nbytes}
    return _Made(made, facts, f"{len(result.tensors)} tensors, {size_text(result.nbytes)}")


@dataclass(frozen=True)
class _Asked:
    """What is to be measured with, and the limit."""

    text: str | None
    max_kl: float | None


def _repacked(
    source: Path,
    out: Path,
    to: str,
    pre_tokenizer: str | None,
    asked: _Asked | None,
    imatrix: Path | None,
    shard_bytes: int | None,
) -> _Made:
    from bitfold.checkpoints.repack import repack as run
    from bitfold.evaluation.conversions import Measured
    from bitfold.system.units import size_text

    judge = None if asked is None else Measured(source, asked.text, max_kl=asked.max_kl)
    made = run(source, out, to, pre_tokenizer, judge, imatrix, shard_bytes)
    measured = None if judge is None or judge.found is None else judge.found
    worst = max(made.losses, key=lambda name: made.losses[name], default=None)
    count = made.exact + len(made.losses)
    losses = [{"tensor": name, "error": loss} for name, loss in made.losses.items()]
    facts = {"tensors": count, "bytes": made.nbytes, "exact": worst is None, "losses": losses}
    if asked is not None:
        facts |= {"kl_mean": measured and measured.kl_mean, "top1": measured and measured.top1}
    text = f"{count} tensors, {size_text(made.nbytes)}, exact: the same numbers, bit for bit"
    if worst is not None:
        mean = sum(made.losses.values()) / len(made.losses)
        text = (
            f"{count} tensors, {size_text(made.nbytes)}; {made.exact} exact, {len(made.losses)} rounded anew: relative"
            f" error {mean:.2e} of the squared weights on average, {made.losses[worst]:.2e} at most ({worst})"
        )
    if measured is not None:
        text += f"; KL {measured.kl_mean:.6f} nats a token"
    return _Made(made.path, facts, text)


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A complete model folder.", show_default=False)],
    repo: Annotated[
        str,
        typer.Argument(help="Hub repository, org/name, or s3://bucket/folder.", show_default=False),
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to, created if need be.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    json: Json = False,
) -> None:
    """Publish a model folder on the Hugging Face Hub, or send it to object storage."""
    from bitfold.checkpoints.hub.upload import upload as run
    from bitfold.checkpoints.object_storage import is_url, send

    if is_url(repo):
        if private or revision is not None or message is not None:
            raise UsageError("object storage has no branches, messages or private repositories", where=repo)
        url = send(folder, repo)
    else:
        url = run(folder, repo, private=private, revision=revision, commit_message=message)
    if json:
        print_json({"folder": str(folder), "repo": repo, "url": url})
        return
    print(url)
