"""The model card: recipe, sizes, measured loss, how to run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError
from bitfold.records.run_report import QuantizeReport

_NOT_YET = "Not evaluated yet: `bitfold eval FOLDER --reference ORIGINAL`."
_BEGIN, _END = "<!-- bitfold evaluation -->", "<!-- end of bitfold evaluation -->"


def write_card(folder: Path, report: QuantizeReport) -> None:
    """Write README.md with what is known when quantizing; `add_evaluation` adds what was measured afterwards."""
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- bitfold",
        "- quantized",
        "---",
        f"# {Path(report.source).name}, quantized by bitfold",
        "",
        f"* {report.bpw_quantized:.3f} bits per weight in the quantized tensors,"
        f" {report.bpw_whole:.3f} over the whole model",
        f"* {report.bytes_after / 1e6:.1f} MB of tensors, {report.bytes_before / 1e6:.1f} MB before",
    ]
    if report.error is not None:
        lines.append(f"* relative square error of the quantized weights: {report.error:.3g}")
    if unknown := report.preflight.get("unknown"):
        lines.append(f"* not quantized: {unknown}")
    lines += ["", *_formats(report), "", "## Run it", "", *_usage(), "", "## Recipe", "", *_recipe(report), ""]
    lines += [
        "## Measured loss",
        "",
        _BEGIN,
        _NOT_YET,
        _END,
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _formats(report: QuantizeReport) -> list[str]:
    counts = Counter(t.format or "kept" for t in report.tensors)
    rows = ["| format | tensors | MB |", "|---|---|---|"]
    for name, count in counts.most_common():
        size = sum(t.bytes_after for t in report.tensors if (t.format or "kept") == name)
        rows.append(f"| {name} | {count} | {size / 1e6:.1f} |")
    return rows


def _usage() -> list[str]:
    code = [
        "import bitfold",
        "from transformers import AutoTokenizer",
        "",
        'model = bitfold.load("FOLDER_OR_REPO")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPO")',
    ]
    return ["```python", *code, "```"]


def _recipe(report: QuantizeReport) -> list[str]:
    from bitfold.recipes.recipe import Recipe, Rule

    return ["```toml", Recipe(tuple(Rule(**rule) for rule in report.recipe)).dumps().rstrip(), "```"]


def require_card(folder: Path) -> None:
    """CheckpointError where there is no folder whose card could take numbers: asked before they are measured."""
    if not folder.is_dir():
        raise CheckpointError("is no model folder with a card on this machine", where=str(folder))


def carry_card(source: Path, folder: Path, line: str) -> None:
    """The card of a folder that was made out of another one of ours: with a line more, and nothing measured yet."""
    old = source / "README.md"
    text = old.read_text(encoding="utf-8") if old.is_file() else f"# {folder.name}\n\n{_BEGIN}\n{_END}\n"
    lines = text.splitlines()
    title = next((i for i, one in enumerate(lines) if one.startswith("# ")), -1)
    before, _, rest = "\n".join([*lines[: title + 2], line, *lines[title + 2 :]]).partition(_BEGIN)
    after = rest.partition(_END)[2]
    (folder / "README.md").write_text(f"{before}{_BEGIN}\n{_NOT_YET}\n{_END}{after}\n", encoding="utf-8")


def add_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Put measured numbers into the card of a folder; numbers from an earlier evaluation are replaced."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"{_BEGIN}\n{_END}\n"
    rows = ["| | |", "|---|---|"]
    for key, value in evaluation.items():
        if value is not None and not isinstance(value, dict | list):
            rows.append(f"| {key} | {f'{value:.5g}' if isinstance(value, float) else value} |")
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    card.write_text("\n".join([before + _BEGIN, *rows, _END]) + after, encoding="utf-8")
