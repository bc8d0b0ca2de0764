"""docs/models.md from the results of families.py."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import transformers as hf

Record = dict[str, Any]
TITLES = {"causal": "Causal", "image and text": "Image and text", "sequence to sequence": "Sequence to sequence"}
STEPS = {"rtn": "8 bits", "calibrated": "4 bits", "load": "load", "load4": "load 4 bits", "generate": "generate"}
# int8 by rows on random weights gives about 0.01, more where it makes a router choose other experts; a layer that is
# wrong gives about 1. Against the same weights, converted, nothing but the order of sums differs.
MOST_ERROR, MOST_DIFFERENCE = 0.3, 1e-3
LONGEST_NOTE = 240
COLUMNS = ("type", "class", "8 bits", "4 bits", "logits at 8", "logits at 4", "generates", "notes")
COUNTS = ("", "families", "built", "8 bits", "4 bits", "calibrated", "logits right", "generate", "nothing wrong")
PAGE = """# Families of models

Every class that transformers {transformers} lists for causal, image-text-to-text and sequence-to-sequence
language models, each built small (two layers, or one of each kind that it mixes) with random weights, and put through
bitfold as a user would. The page is written by

    python benchmarks/families.py --table docs/models.md

(PyTorch {torch}, one thread; some ten CPU minutes). What the columns say:

* **8 bits**: `bitfold quantize MODEL --bits 8 --method rtn` ends well.
* **4 bits**: `bitfold quantize MODEL --bits 4` ends well, on 64 tokens of text. "calibrated" if every layer was
  solved on what the text makes of its inputs, "12 of 20" if some were, "without" if none was; the notes say why.
* **logits at 8, at 4**: relative error (root mean square) of the logits of the loaded folder against those that
  transformers computes from the original; "loads" where a text alone gives no logits to compare. Random weights round
  worse than trained ones, and an expert that is chosen differently weighs more; 8 bits should be near 0.01, and more
  than {most} counts as wrong. So does any difference from what transformers computes after `bitfold convert`.
* **generates**: `bitfold generate` writes three tokens with the 8-bit folder; "not by transformers" where transformers
  itself cannot with the original, mostly because it wants an image or sound.

Rows with † are of an earlier pass, whose results were kept ("earlier" in the file of results): before there were
calibration through the language part, generation of encoder-decoders and the comparison with `bitfold convert`.

Small random models cannot show how much is lost: for that see the [log](log.md).
"""


def passed(record: Record) -> bool:
    """Whether all that can be asked of a family works."""
    return not problems(record)


def problems(record: Record) -> list[str]:
    """What does not work: the step and the reason."""
    if "failed" in record["build"]:
        return [f"not built: {record['build']['failed']}"]
    reasons: dict[str, list[str]] = {}
    for step, name in STEPS.items():
        if not works(record, step) and not (step == "generate" and original_fails(record)):
            reasons.setdefault(record.get(step, {}).get("failed", ""), []).append(name)
    reasons.pop("", None)  # nothing to load or to generate with: the step before has failed
    found = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    error = record.get("load", {}).get("error", 0.0)
    found += [f"logits of 8 bits are {error:.2f} away"] if error > MOST_ERROR else []
    convert = record.get("convert", {})
    if "failed" in convert:
        found.append(f"convert: {convert['failed']}")
    elif convert.get("error", 0.0) > MOST_DIFFERENCE:
        found.append(f"logits of 8 bits are {convert['error']:.2g} from those of the same weights, converted")
    return found


def works(record: Record, step: str) -> bool:
    """Whether a step was reached and ended well."""
    return step in record and "failed" not in record[step]


def original_fails(record: Record) -> bool:
    """Whether transformers itself cannot generate with the original."""
    return "failed" in record.get("generate", {}).get("original", {})


def page(records: Iterable[Record]) -> str:
    """docs/models.md."""
    known = sorted(records, key=lambda r: (list(TITLES).index(r["task"]), r["kind"]))
    versions = {"transformers": hf.__version__, "torch": torch.__version__.partition("+")[0]}
    lines = [PAGE.format(**versions, most=MOST_ERROR), *_head(COUNTS)]
    lines += [_line([name, *map(str, _counts([r for r in known if r["task"] == t]))]) for t, name in TITLES.items()]
    for task, title in TITLES.items():
        lines += ["", f"## {title}", "", *_head(COLUMNS)]
        lines += [_line(_row(record)) for record in known if record["task"] == task]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(names: tuple[str, ...]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _counts(records: list[Record]) -> list[int]:
    built = [r for r in records if "failed" not in r["build"]]
    right = [r for r in built if r.get("load", {}).get("error", 1.0) <= MOST_ERROR]
    calibrated = [r for r in built if works(r, "calibrated") and manner(r["calibrated"]) == "calibrated"]
    done = [sum(works(r, step) for r in built) for step in ("rtn", "calibrated", "generate")]
    return [len(records), len(built), *done[:2], len(calibrated), len(right), done[2], sum(map(passed, records))]


def _row(record: Record) -> list[str]:
    cells = [record["kind"], record["class"] + " †" * record.get("earlier", False)]
    if "failed" in record["build"]:
        return [*cells, *[""] * 5, _notes(record)]
    cells += ["yes" if works(record, "rtn") else "no", manner(record["calibrated"])]
    for step in ("load", "load4"):
        error = record.get(step, {}).get("error")
        cells.append("no" if not works(record, step) else "loads" if error is None else f"{error:.3f}")
    generates = works(record, "generate")
    cells.append("yes" if generates else "not by transformers" if original_fails(record) else "no")
    return [*cells, _notes(record)]


def manner(step: Record) -> str:
    """How four bits were come by."""
    if "failed" in step:
        return "no"
    solved, quantized = step["solved on text"], step["quantized"]
    return "calibrated" if solved == quantized else f"{solved} of {quantized}" if solved else "without"


def _notes(record: Record) -> str:
    """What does not work, what was done instead, what transformers itself cannot do."""
    notes = problems(record)
    if works(record, "calibrated"):
        step = record["calibrated"]
        notes += step["fallbacks"]
        if manner(step) == "without" and not step["fallbacks"]:
            notes.append(step["method"])
    if "failed" in record.get("original", {}):
        notes.append(f"no logits of a text alone: {record['original']['failed']}")
    return "; ".join(re.sub(r"/tmp/\S+/", "", note).replace("|", "\\|")[:LONGEST_NOTE] for note in notes)
