"""Damage sound inputs: bytes anywhere, and JSON where it hurts."""

from __future__ import annotations

import json
import random
import struct
from copy import deepcopy
from typing import Any

NASTY: list[Any] = [
    None, True, -1, 0, 1, 3, 255, 2**31, 2**63, 10**30, 1e999, float("nan"), 0.5, "", "x", "..", "../a.safetensors",
    "a\0b", "float32", [], [[]], [-1, 5], [0, 2**62], [2**40, 2**40], [1] * 40, {}, {"a": {}},
]  # fmt: skip
_INTEGERS = [0, 1, 2, 7, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def damage(data: bytes, random: random.Random) -> bytes:
    """A few random wounds."""
    for _ in range(random.randint(1, 4)):
        data = random.choice([_cut, _flip, _number, _repeat, _insert])(data, random)
    return data


def _cut(data: bytes, random: random.Random) -> bytes:
    return data[: random.randint(0, len(data))]


def _flip(data: bytes, random: random.Random) -> bytes:
    at = random.randrange(max(1, len(data)))
    return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]


def _number(data: bytes, random: random.Random) -> bytes:
    """A length or an offset, most often."""
    at, width = random.randrange(max(1, len(data))), random.choice(["<Q", "<I"])
    raw = struct.pack(width, random.choice(_INTEGERS) & ((1 << (64 if width == "<Q" else 32)) - 1))
    return data[:at] + raw + data[at + len(raw) :]


def _repeat(data: bytes, random: random.Random) -> bytes:
    start = random.randrange(max(1, len(data)))
    part = data[start : start + random.choice([1, 8, 64])]
    return data[:start] + part * random.choice([2, 3, 50]) + data[start:]


def _insert(data: bytes, random: random.Random) -> bytes:
    at = random.randrange(max(1, len(data)))
    return data[:at] + random.choice([b"{", b"[" * 5000, b'"', b"\xff", b"\0" * 8, b",", b"1e999"]) + data[at:]


def damage_json(data: bytes, random: random.Random) -> bytes:
    """The same JSON with one to three values changed, dropped or moved; then perhaps damaged as bytes."""
    value = json.loads(data)
    for _ in range(random.randint(1, 3)):
        _wound(value, random)
    made = json.dumps(value).encode()
    return damage(made, random) if random.random() < 0.2 else made


def _wound(value: Any, random: random.Random) -> None:
    """Change one place at a random depth."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = random.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and random.random() < 0.8:
            value = value[key]
            continue
        if isinstance(value, dict) and random.random() < 0.2:
            del value[key]
        else:
            value[key] = deepcopy(random.choice([*NASTY, value[random.choice(keys)]]))
        return


def mutated(name: str, seed: bytes, random: random.Random) -> bytes:
    """An input for a target, from one of its seeds."""
    if name in ("index", "config", "manifest"):
        return damage_json(seed, random)
    if name == "header" and random.random() < 0.7:
        length = struct.unpack("<Q", seed[:8])[0]
        raw = damage_json(seed[8 : 8 + length], random)
        return struct.pack("<Q", len(raw)) + raw + seed[8 + length :]
    return damage(seed, random)
