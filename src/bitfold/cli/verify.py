"""`bitfold verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, app, print_json
from bitfold.errors import AccountingError
from bitfold.system.units import size_text


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `bitfold quantize` wrote.", show_default=False)],
    json: Json = False,
) -> None:
    """Check that a quantized folder is byte for byte as it was written."""
    from bitfold.checkpoints.manifest import verify as run

    found = run(folder)
    if json:
        print_json(found.to_dict())
    elif not found.problems:
        print(f"{found.files} files, {found.tensors} tensors, {size_text(found.nbytes)}: all as they were written")
    if found.problems:
        first = "; ".join(found.problems[:5]) + (f"; and {len(found.problems) - 5} more" if found.problems[5:] else "")
        raise AccountingError(first, where=str(folder), hint="fetch the folder again, or make it again")
