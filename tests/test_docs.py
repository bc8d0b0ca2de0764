"""What the documents claim."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfold.methods.quantize import quantize_tensor

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("bits", "group", "shape"), [(2, 64, (3, 130)), (3, 64, (5, 200)), (5, 32, (4, 96)), (8, 50, (2, 101))]
)
def test_the_decoder_of_the_specification(bits: int, group: int, shape: tuple[int, int]) -> None:
    """docs/format.md decodes what the library writes, bit for bit."""
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    q = quantize_tensor(w, f"int{bits}-asym-g{group}", fit="mse")
    decoded = names["decode"](q.fields["codes"], q.fields["scale"], q.fields["zero_point"], *shape, bits, group)
    assert torch.equal(decoded, q.dequantize())


def test_local_links_lead_somewhere() -> None:
    """Every relative link in README and docs."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_names_options_that_there_are() -> None:
    """Every `bitfold COMMAND --option` of README.md."""
    import typer

    from bitfold.cli import app

    commands: Any = getattr(typer.main.get_command(app), "commands")  # noqa: B009
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]+)`", text) + [
        line.split("#")[0].removeprefix("$ ")
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    found = 0
    for span in spans:
        words = span.removeprefix("bitfold ").split()
        if not words or words[0] not in commands:
            assert not re.match(r"bitfold [a-z]+( |$)", span), f"no such command: {span}"
            continue
        known = {name for p in commands[words[0]].params for name in (*p.opts, *p.secondary_opts)}
        for word in words[1:]:
            if re.match(r"-{1,2}[a-z]", word):
                assert word in known | {"--help"}, span
                found += 1
    assert found > 20


def test_the_readme_imports_what_there_is() -> None:
    """Every import of bitfold in the Python of README.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    imports = [line for line in lines if re.match(r"(from|import) bitfold", line)]
    assert len(imports) > 1
    for line in imports:
        exec(line, {})
