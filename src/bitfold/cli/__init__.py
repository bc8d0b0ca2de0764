"""The command line: reads options, calls the library, prints. Nothing is decided here.

Modules that need PyTorch are imported inside the commands, so that `bitfold --help` answers at once.
"""

from __future__ import annotations

from bitfold.cli import bench as _bench  # noqa: F401  (registers its command)
from bitfold.cli import distill as _distill  # noqa: F401  (registers its command)
from bitfold.cli import evaluate, generate, look, move, quantize, report
from bitfold.cli import finetune as _finetune  # noqa: F401  (registers its command)
from bitfold.cli import imatrix as _imatrix  # noqa: F401  (registers its command)
from bitfold.cli import merge as _merge  # noqa: F401  (registers its command)
from bitfold.cli import methods as _methods  # noqa: F401  (registers its command)
from bitfold.cli import serve as _serve  # noqa: F401  (registers its command)
from bitfold.cli import verify as _verify  # noqa: F401  (registers its command)
from bitfold.cli.app import app, end_in_order

__all__ = ["app", "evaluate", "generate", "look", "main", "move", "quantize", "report"]


def main() -> None:
    """Entry point of the `bitfold` program."""
    end_in_order()
    app(prog_name="bitfold")
