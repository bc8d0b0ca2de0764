"""Trellis formats: distortion on Gaussian weights, the search against exact ones, one result everywhere, the page."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from bitfold.errors import FormatError, WeightError
from bitfold.formats import FORMATS, Params, read_description
from bitfold.formats.families import viterbi as V
from bitfold.formats.families.trellis import TRELLIS, Trellis, read_trellis
from bitfold.formats.families.viterbi import TILE, TrellisCode, decode_tiles, encode_tiles
from bitfold.qtensor import QTensor
from bitfold.system import native

CORE = native.core()
needs_core = pytest.mark.skipif(CORE is None, reason="no native core in this installation")
every = pytest.mark.parametrize("format", TRELLIS.values(), ids=TRELLIS.keys())


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, scaled to a mean square of exactly 1: takes most of the noise out of a measured error."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.square().mean().sqrt()


# (lowest, highest) mean square error of 1024 tiles. The middle is what was measured; the sample moves it by about 1 %,
# and less than 4**-k, the rate-distortion bound, would be a bug.
ERROR = {"trellis-1": (0.2650, 0.2760), "trellis-2": (0.0680, 0.0710), "trellis-3": (0.0174, 0.0183)}
ERROR |= {"trellis-4": (0.00455, 0.00485)}


@needs_core
@every
def test_error_on_gaussian_weights(format: Trellis) -> None:
    x = gaussian(1024, TILE)
    low, high = ERROR[format.name]
    assert low > 4.0**-format.code.bits
    errors = []
    for thorough in (False, True):
        values = encode_tiles(format.code, x * format.code.sigma, thorough=thorough)[1]
        errors.append(float((x - values / format.code.sigma).square().mean()))
    assert low < errors[0] < high
    assert low < errors[1] < errors[0]


@every
def test_the_python_search_gives_the_same_bytes(format: Trellis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal, tiny, huge, constant and outlier tiles; decoding both ways."""
    if CORE is None:
        pytest.skip("no native core in this installation")
    x = gaussian(6, TILE) * format.code.sigma
    x[1] *= 0.05
    x[2] *= 50
    x[3] = 127.0
    x[4, ::17] = -3e38
    x[5, 64:] = torch.nan
    for thorough in (False, True):
        tiles, values = encode_tiles(format.code, x[: 6 if not thorough else 2], thorough=thorough)
        assert torch.equal(decode_tiles(format.code, tiles), values)
        monkeypatch.setenv("BITFOLD_NATIVE", "0")
        again = encode_tiles(format.code, x[: len(tiles)], thorough=thorough)
        assert torch.equal(again[0], tiles)
        assert torch.equal(again[1], values)
        assert torch.equal(decode_tiles(format.code, tiles), values)
        monkeypatch.delenv("BITFOLD_NATIVE")


@needs_core
@every
def test_same_bytes_on_every_instruction_set_and_number_of_threads(format: Trellis) -> None:
    """75 tiles: full batches and a rest on every width."""
    x = gaussian(75, TILE, seed=3) * format.code.sigma
    before, threads = CORE.isa(), torch.get_num_threads()
    want = encode_tiles(format.code, x)
    try:
        for name, count in itertools.product(CORE.isas(), (1, 3)):
            CORE.set_isa(name)
            torch.set_num_threads(count)
            tiles, values = encode_tiles(format.code, x)
            assert torch.equal(tiles, want[0]), (name, count)
            assert torch.equal(values, want[1]), (name, count)
            assert torch.equal(decode_tiles(format.code, tiles), values), (name, count)
    finally:
        CORE.set_isa(before)
        torch.set_num_threads(threads)


@needs_core
@every
def test_random_bytes_decode_alike_everywhere(format: Trellis, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    tiles = torch.randint(0, 256, (300, format.code.tile_bytes), dtype=torch.uint8, generator=generator)
    decoded = []
    before = CORE.isa()
    for name in CORE.isas():
        CORE.set_isa(name)
        decoded.append(decode_tiles(format.code, tiles))
    CORE.set_isa(before)
    monkeypatch.setenv("BITFOLD_NATIVE", "0")
    assert all(torch.equal(d, decode_tiles(format.code, tiles)) for d in decoded)


def page_decoder():
    """The decoder printed in docs/trellis.md."""
    page = (Path(__file__).parents[2] / "docs" / "trellis.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    scope: dict = {}
    exec(found[1], scope)
    return scope["decode_tile"]


@every
def test_the_decoder_of_the_specification(format: Trellis) -> None:
    generator = torch.Generator().manual_seed(6)
    tiles = torch.randint(0, 256, (5, format.code.tile_bytes), dtype=torch.uint8, generator=generator)
    decode_tile, code = page_decoder(), format.code
    want = [decode_tile(bytes(t.tolist()), code.bits, code.columns, code.table) for t in tiles]
    assert decode_tiles(code, tiles).tolist() == want


@every
def test_the_hash_is_what_its_matrices_say(format: Trellis) -> None:
    """vgf2p8affineqb in Python, on every window."""
    code = format.code

    def affine(matrix: int, byte: int) -> int:
        return sum(((matrix >> 8 * (7 - i) & 255 & byte).bit_count() & 1) << i for i in range(8))

    low = [affine(code.matrices[0], b) for b in range(256)]
    high = [affine(code.matrices[1], b) for b in range(256)]
    indices = V._indices(code).tolist()
    assert all(index == low[s & 255] ^ high[s >> 8] for s, index in enumerate(indices))
    assert [code.columns[i] for i in range(code.bits)] == [
        1 << code.index_bits - code.bits + i for i in range(code.bits)
    ]


@every
def test_what_was_decoded_encodes_to_itself(format: Trellis) -> None:
    """A path of no error exists, so the search must find one: bit for bit the same values."""
    generator = torch.Generator().manual_seed(7)
    tiles = torch.randint(0, 256, (4, format.code.tile_bytes), dtype=torch.uint8, generator=generator)
    values = decode_tiles(format.code, tiles)
    again, found = encode_tiles(format.code, values.float())
    assert torch.equal(found, values)
    assert torch.equal(decode_tiles(format.code, again), values)


def exact_path(code: TrellisCode, x: torch.Tensor) -> float:
    """Least squared error, in float64, of any path (not closed to a circle) for x (steps), by exhaustion of symbols."""
    windows = torch.arange(1 << code.window)
    values = V.window_values(code).double()
    cost = torch.zeros(1 << code.window, dtype=torch.float64)
    low = 1 << code.window - code.bits
    for v in x.double():
        least = cost.view(-1, low).amin(0)
        cost = least[windows >> code.bits & low - 1] + (v - values[windows]).square()
    return float(cost.min())


SMALL = TrellisCode(2, (8, 4, 3, 5, 9, 14, 7, 2, 11), tuple(range(-75, 80, 10)), 30.0)


def test_every_path_of_a_short_stream() -> None:
    """All 4**9 ways to go on from a free start, against the recursion that the next test relies on."""
    x = gaussian(4, seed=8) * 30
    values = V.window_values(SMALL).double()
    best = torch.full((), torch.inf, dtype=torch.float64)
    windows = torch.arange(1 << SMALL.window)
    for symbols in itertools.product(range(4), repeat=4):
        state, cost = windows, 0.0
        for v, s in zip(x.double(), symbols, strict=True):
            state = (state << 2 | s) & (1 << SMALL.window) - 1
            cost = cost + (v - values[state]).square()
        best = torch.minimum(best, cost.min())
    assert exact_path(SMALL, x) == pytest.approx(float(best), rel=1e-12)


@pytest.mark.parametrize("code", [SMALL, *(f.code for f in TRELLIS.values())], ids=["small", *TRELLIS])
def test_the_search_is_optimal_within_its_resolution(code: TrellisCode) -> None:
    """A free search against the exact one in float64.

    x is rounded to 1/16 step and a cost is rounded down by less than 2**(16 - 2 gain) in units of (1/16 step)**2: the
    found path is worse by at most one such unit a step, in both directions, plus the rounding of x.
    """
    steps = 32
    x = (gaussian(2, steps, seed=9) * code.sigma).clamp(-100, 100)
    fixed = (x * 16).round().int()
    path = V._search(code, fixed, None)
    found = ((fixed / 16).double() - V.window_values(code)[path].double()).square().sum(1)
    unit = 2.0 ** (16 - 2 * V._LIMITS[code.bits].gain) / 256
    for i in range(2):
        exact = exact_path(code, fixed[i] / 16)
        assert exact - 1e-6 <= float(found[i]) <= exact + steps * unit


@every
def test_circles_close_and_cost_little(format: Trellis) -> None:
    """The circle found is at least as dear as the best open path, and not much dearer."""
    x = gaussian(3, TILE, seed=10) * format.code.sigma
    found = (encode_tiles(format.code, x)[1].double() - x.double()).square().sum(1)
    stream = x[:, V.positions(format.code.bits)].flip(1)
    for i in range(3):
        exact = exact_path(format.code, stream[i])
        assert exact <= float(found[i]) <= 1.25 * exact


@needs_core
@every
@pytest.mark.parametrize("shape", [(32, 4), (33, 5), (1, 1), (64, 96), (70, 30)], ids=str)
def test_weights_of_any_shape(format: Trellis, shape: tuple[int, int]) -> None:
    w = gaussian(*shape, seed=11) * 0.02
    q = QTensor(format, shape, format.encode(w))
    n, k = shape
    assert q.nbytes == -(-n // 32) * -(-k // 4) * 16 * format.code.bits + 2 * n
    if n % 32 == 0 and k % 4 == 0:
        assert q.bpw == format.bpw + Fraction(16, k)
    decoded = q.dequantize()
    assert decoded.shape == shape
    index = torch.tensor([n - 1, 0, n // 2, 0])
    assert torch.equal(q.rows(index), decoded[index])
    # One weight a row has nothing to share its bits with; from a few dozen on the error is that of the code.
    if n * k > 1000:
        assert float((w - decoded).square().mean() / w.square().mean()) < 1.15 * ERROR[format.name][1]
    again = format.encode(decoded, Params(q.fields["scale"].float()))
    if n % 32 == 0 and k % 4 == 0:  # where weights do not matter there may be several paths of no error
        assert torch.equal(format.decode(again, shape), decoded)


@needs_core
@every
def test_blocks_of_columns_are_slices_of_the_whole(format: Trellis) -> None:
    w = gaussian(70, 32, seed=12)
    fields = format.encode(w)
    decoded = format.decode(fields, (70, 32))
    for first, last in ((0, 4), (4, 12), (12, 32)):
        tiles, values = format.encode_block(w[:, first:last], fields["scale"])
        assert torch.equal(tiles, fields["tiles"][:, first // 4 : last // 4])
        assert torch.equal(values, decoded[:, first:last])
    with pytest.raises(FormatError, match="4 columns"):
        format.encode_block(w[:, :6], fields["scale"])
    with pytest.raises(FormatError, match="one scale"):
        format.encode_block(w[:, :4], fields["scale"][:69])


@needs_core
@every
def test_stacks_zeros_and_scales(format: Trellis) -> None:
    w = gaussian(2, 40, 20, seed=13)
    w[0, 7] = 0
    parts = [format.encode(part) for part in w]
    stack = {name: torch.stack([p[name] for p in parts]) for name in parts[0]}
    decoded = format.decode(stack, (2, 40, 20))
    assert torch.equal(decoded[1], format.decode(parts[1], (40, 20)))
    assert not decoded[0, 7].any()
    small = format.decode(format.encode(w[1] * 2.0**-20), (40, 20))
    assert torch.equal(small, decoded[1] * 2.0**-20)
    # A scale far too small clips and does not fail; squares of such weights would overflow.
    clipped = format.encode(w[1] * 1e30, Params(torch.full((40, 1), 1e-30)))
    assert torch.isfinite(format.decode(clipped, (40, 20))).all()


@every
def test_what_cannot_be_encoded_or_decoded(format: Trellis) -> None:
    w = gaussian(32, 8)
    w[3, 3] = torch.nan
    with pytest.raises(WeightError):
        format.encode(w, Params(torch.ones(32, 1)))
    with pytest.raises(FormatError, match="not finite"):
        format.encode(gaussian(32, 8), Params(torch.full((32, 1), torch.inf)))
    fields = {"tiles": torch.zeros(1, 2, format.code.tile_bytes, dtype=torch.uint8)}
    fields["scale"] = torch.ones(32, 1, dtype=torch.bfloat16)
    assert format.decode(fields, (32, 8)).shape == (32, 8)
    for name, wrong in [
        ("tiles", fields["tiles"].to(torch.int8)),
        ("tiles", fields["tiles"][..., 1:]),
        ("tiles", fields["tiles"][:, :1]),
        ("scale", fields["scale"].float()),
        ("scale", fields["scale"][:31]),
    ]:
        with pytest.raises(FormatError, match=name):
            format.decode({**fields, name: wrong}, (32, 8))
    with pytest.raises(FormatError, match="nothing"):
        format.decode({"scale": fields["scale"]}, (32, 8))
    for tiles in (fields["tiles"], fields["tiles"][0, :, 1:], fields["tiles"][0].int()):
        with pytest.raises(FormatError, match="tiles"):
            decode_tiles(format.code, tiles)
    with pytest.raises(FormatError, match="128"):
        encode_tiles(format.code, torch.zeros(2, 64))
    with pytest.raises(FormatError, match="infinite"):
        encode_tiles(format.code, torch.full((1, TILE), torch.inf))


@every
def test_descriptions(format: Trellis) -> None:
    """The description is the law: another table under a known name is another format."""
    assert FORMATS[format.name] is format
    text = format.describe()
    assert read_description(format.name, text) is format
    foreign = {**text, "table": [v // 2 if v > 0 else -(-v // 2) for v in text["table"]]}
    read = read_description(format.name, foreign)
    assert isinstance(read, Trellis)
    assert read != format
    assert read.span == (min(foreign["table"]), max(foreign["table"]))
    broken = [
        {**text, "table": text["table"][:-1]},
        {**text, "table": [1] * len(text["table"])},
        {**text, "columns": text["columns"][:5]},
        {**text, "columns": [256] * 12},
        {**text, "bits": 5},
        {**text, "sigma": 0.0},
        {**text, "sigma": "wide"},
        {**text, "tile": [16, 4]},
        {**text, "scale": "float64"},
        {name: v for name, v in text.items() if name != "columns"},
    ]
    for bad in broken:
        with pytest.raises(FormatError):
            read_trellis(format.name, bad)


@needs_core
@every
def test_weights_that_do_not_matter_help_the_others(format: Trellis) -> None:
    """Half of each tile may take any value: the other half is encoded with more freedom, far below its usual error."""
    x = gaussian(64, TILE, seed=14)
    x[:, 64:] = torch.nan
    values = encode_tiles(format.code, x * format.code.sigma)[1] / format.code.sigma
    error = (x[:, :64] - values[:, :64]).square().mean() / x[:, :64].square().mean()
    assert float(error) < 0.8 * ERROR[format.name][0]


@needs_core
def test_no_tiles_at_all() -> None:
    code = TRELLIS["trellis-2"].code
    tiles, values = encode_tiles(code, torch.empty(0, TILE))
    assert tiles.shape == (0, 32)
    assert values.shape == (0, TILE)
    assert decode_tiles(code, tiles).shape == (0, TILE)
