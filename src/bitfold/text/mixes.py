"""Several texts as one: which, and in what shares of the windows.

A mix is written in one string, so that it goes wherever a text is named: "default:0.5 + code:0.3 + chats.jsonl".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bitfold.errors import UsageError

JOINT = " + "
OWN = ("default", "code", "dialogue")  # texts that come with bitfold


@dataclass(frozen=True)
class Part:
    """One text of a mix.

    Args:
        spec: what names it, see `documents.text_pieces`.
        weight: its share, together with those of the others.
    """

    spec: str
    weight: float = 1.0


def joined(specs: Iterable[str] | None) -> str | None:
    """Texts, each perhaps with ":WEIGHT" behind it, as one mix; None for none."""
    found = list(specs or ())
    return JOINT.join(found) if found else None


def parts_of(spec: str) -> list[Part]:
    """The texts of a mix; a single one where it is none.

    Raises:
        UsageError: a weight that is not positive, no text between two joints, or the model's own text in a mix.
    """
    if "\n" in spec or _is_file(spec):
        return [Part(spec)]
    parts = [_part(one.strip()) for one in spec.split(JOINT)]
    if len(parts) == 1:
        return parts
    if any(part.spec in ("", "self") for part in parts):
        what = f"a mix is made of texts that are there: files, data sets, {', '.join(OWN)}"
        raise UsageError(what, where=spec, hint='such as "default:0.5 + notes.txt:0.5"')
    return parts


def without_folders(spec: str) -> str:
    """The mix as records have it: no paths of this machine."""
    return JOINT.join(Path(one).name for one in spec.split(JOINT))


def shares(parts: list[Part], windows: int) -> list[int]:
    """Windows of each text, one at least, in proportion to the weights."""
    whole = sum(part.weight for part in parts)
    exact = [windows * part.weight / whole for part in parts]
    found = [max(1, int(count)) for count in exact]
    for i in sorted(range(len(parts)), key=lambda i: int(exact[i]) - exact[i]):  # the largest remainders first
        if sum(found) < windows:
            found[i] += 1
    return found


def _part(text: str) -> Part:
    name, _, number = text.rpartition(":")
    if not name or _is_file(text):
        return Part(text)
    try:
        weight = float(number)
    except ValueError:
        return Part(text)  # a configuration or split of a data set
    if not 0 < weight < float("inf"):
        raise UsageError(f"{number} is no share of a mix", where=text, hint="a positive number, such as 0.5")
    return Part(name, weight)


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError):  # no name that a file could have
        return False
