"""The shape of the house: which way imports run, who may ask for a format's class, how long things get.

`python tests/test_architecture.py` counts it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bitfold

PACKAGE = Path(bitfold.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The floors, from the ground up. A room may import rooms of lower floors and itself, never those beside or above it.
FLOORS = (
    ("errors", "version"),
    ("system",),
    ("executors", "formats", "text", "transforms"),
    ("qtensor",),
    ("kernels", "methods"),
    ("nn", "recipes"),
    ("checkpoints",),
    ("models", "records"),
    ("engine", "planning", "workspace"),
    ("evaluation",),
    ("calibration", "reporting", "serving"),
    ("forecast", "training"),
    ("run",),
    ("integrations",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path: Path) -> set[str]:
    """First-level names of bitfold imported anywhere in the file, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"bitfold.{alias.name}" for alias in node.names] if module == "bitfold" else [module]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {p[1] if len(p) > 1 else "__init__" for p in parts if p[0] == "bitfold"}
    return found


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_run_one_way(path):
    part = part_of(path)
    assert part in RANK, f"{part} has no place in the architecture: give it a rank"
    for other in imported_parts(path) - {part}:
        if part in ("integrations", "cli", "__init__", "__main__") and other not in RANK:
            continue  # `from bitfold import load`: a public name
        assert other in RANK, f"{relative(path)} imports bitfold.{other}, which has no rank"
        assert RANK[other] < RANK[part], f"{relative(path)} imports bitfold.{other}, which is not below it"


def asks_for_the_format(node: ast.AST) -> bool:
    """`something.format.name == ...` or `isinstance(format, ...)`: knowledge that belongs to formats/."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        subject = node.args[0]
        kind = ast.unparse(node.args[1])
        return ast.unparse(subject).split(".")[-1] in ("format", "fmt") and kind not in ("str", "(str)")
    if isinstance(node, ast.Compare):
        sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
        return any(side.endswith(("format.name", "fmt.name")) for side in sides)
    return False


@pytest.mark.parametrize("path", [f for f in FILES if part_of(f) != "formats"], ids=relative)
def test_nobody_asks_which_format_it_is(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not asks_for_the_format(node), f"{relative(path)}:{node.lineno}: {ast.unparse(node)}"


DECLARED = ("format", "fmt", "form", "coder", "solver", "scheme", "rule", "kernel", "transform", "source")


def feels_for_an_attribute(node: ast.AST) -> bool:
    """`hasattr(format, ...)`, `getattr(coder, ..., None)`: what may be missing stands in the protocol, as None."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
        return False
    probes = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
    return probes and ast.unparse(node.args[0]).split(".")[-1].lstrip("_") in DECLARED


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nobody_feels_for_attributes(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not feels_for_an_attribute(node), f"{relative(path)}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_gets_long(path):
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= LONGEST_FILE, f"{relative(path)} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{relative(path)}:{node.lineno}: {node.name} has {length} lines"


TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_tests_are_short_and_lie_in_the_room_that_they_test(path):
    """Files of tests have the same length at most; a folder of them is a room of the package, or for other engines."""
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_FILE, f"tests/{path.relative_to(TESTS)} has {lines} lines"
    folders = path.relative_to(TESTS).parts[:-1]
    assert not folders or folders[0] in (*RANK, "interop"), f"tests/{folders[0]} is no room of the package"


def test_the_rules_see_what_they_forbid():
    bad = ["isinstance(q.format, Trellis)", "q.format.name == 'int4'", "'nf4' != format.name", "isinstance(fmt, Grid)"]
    for text in bad:
        assert any(asks_for_the_format(node) for node in ast.walk(ast.parse(text))), text
    for text in ["isinstance(format, str)", "format.bits == 4", "isinstance(x, Tensor)"]:
        assert not any(asks_for_the_format(node) for node in ast.walk(ast.parse(text))), text
    for text in ["hasattr(q.format, 'grid')", "getattr(coder, 'at_once', 0)", "hasattr(self._source, 'read_rows')"]:
        assert any(feels_for_an_attribute(node) for node in ast.walk(ast.parse(text))), text
    for text in ["hasattr(config, 'grid')", "getattr(format, name)"]:
        assert not any(feels_for_an_attribute(node) for node in ast.walk(ast.parse(text))), text


@pytest.mark.parametrize("part", sorted({part_of(f) for f in FILES} - {"__init__", "__main__"}))
def test_every_part_is_in_the_picture(part):
    """docs/architecture.md names every module and package of the top level."""
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"{part}.py" in page or f"{part}/" in page, f"docs/architecture.md does not say where {part} is"


def test_ranks_are_of_parts_that_exist():
    assert set(RANK) == {part_of(f) for f in FILES}


def measures() -> dict[str, int]:
    """The house in numbers."""
    calls = [node for f in FILES for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))]
    return {
        "modules at the root": sum(f.parent == PACKAGE for f in FILES),
        "rooms": len(RANK),
        "floors": len(FLOORS),
        "rooms that a room imports, summed": sum(len(all_imports(room) - {room}) for room in RANK),
        "probes of what is declared": sum(feels_for_an_attribute(node) for node in calls),
    }


def all_imports(room: str) -> set[str]:
    """Rooms that some file of the room imports."""
    return {other for f in FILES if part_of(f) == room for other in imported_parts(f)} & set(RANK)


if __name__ == "__main__":
    for what, count in measures().items():
        print(f"{count:6d}  {what}")
