"""`bitfold convert` and `bitfold upload`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, PreTokenizer, Revision, app, print_json
from bitfold.system.units import parse_size


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A GGUF file, a quantized or plain folder, or a Hub repository.", show_default=False),
    ],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Folder to write; it must not exist yet.", show_default=False)
    ],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: as they are read.")] = "bfloat16",
    dither_seed: Annotated[
        int | None,
        typer.Option(help="GGUF only: add noise within the quantization steps, so that weights leave the old lattice."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size at which a new file is begun.")] = "4GB",
    pre_tokenizer: PreTokenizer = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Write any readable checkpoint as an ordinary folder of floating-point weights."""
    shard_bytes = parse_size(max_shard_size, where="--max-shard-size")
    from bitfold.checkpoints import convert as run
    from bitfold.checkpoints.hub.fetch import resolve
    from bitfold.checkpoints.inspection import inspect

    local = resolve(source, revision=revision)
    out = run(local, output_dir, dtype, dither_seed, shard_bytes, pre_tokenizer)
    result = inspect(out)
    if json:
        facts = {"tensors": len(result.tensors), "numel": result.numel, "bytes": result.nbytes}
        print_json({"source": source, "output": str(out), **facts})
        return
    from bitfold.system.units import size_text

    print(f"{out}: {len(result.tensors)} tensors, {size_text(result.nbytes)}")


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
