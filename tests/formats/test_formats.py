"""Laws of number formats, over the whole registry."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from bitfold.errors import FormatError, WeightError
from bitfold.formats import FORMATS, AnyFormat, Format, get_format, read_description
from bitfold.formats.grids import E2M1, E4M3, E5M2, GRIDS, NF4, Grid
from bitfold.methods.fits import FITS
from bitfold.methods.quantize import quantize_tensor
from bitfold.qtensor import QTensor

GRID_FORMATS = {name: f for name, f in FORMATS.items() if isinstance(f, Format)}
all_formats = pytest.mark.parametrize("format", GRID_FORMATS.values(), ids=GRID_FORMATS.keys())
# One row length is whole groups, one is not and is odd besides.
shapes = pytest.mark.parametrize("shape", [(6, 512), (5, 203)], ids=str)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(format: Format, q: QTensor) -> torch.Tensor:
    """For each weight half the distance to the farther neighbour of its point, times the scale: the largest error."""
    params = format.load_params(q.fields, q.shape)
    values = sorted({p for p in format.grid.points if math.isfinite(p)})
    gaps = [b - a for a, b in pairwise(values)]
    around = {v: max(gaps[max(i - 1, 0)], gaps[min(i, len(gaps) - 1)]) for i, v in enumerate(values)}
    codes = format.grid.unpack(q.fields["codes"], q.shape[1])
    half = torch.tensor([around.get(p, 0.0) / 2 for p in format.grid.points])[codes.int()]
    if params is None:
        return half
    blocks = format.blocks(q.shape)
    return blocks.join(blocks.split(half) * params.scale.abs()[..., None])


def rounding(format: Format, q: QTensor, w: torch.Tensor) -> torch.Tensor | float:
    """How far the ends of a block may be clipped because its scale or zero point was rounded when stored."""
    params = format.load_params(q.fields, q.shape)
    if params is None or format.scale is None:
        return 0.0
    blocks, slack = format.blocks(q.shape), torch.zeros_like(w)
    if format.scale.store == torch.bfloat16:  # 8 significant bits: down by at most 2**-8
        slack += w.abs() * 2**-8
    if format.scale.offset == torch.float16 and params.zero_point is not None:  # 11 significant bits
        shift = (params.zero_point * params.scale).abs()[..., None] * 2**-11
        slack += blocks.join(shift.expand(*shift.shape[:2], blocks.rows * blocks.cols))
    return slack * 1.01


@all_formats
@shapes
def test_error_is_at_most_half_a_step(format: Format, shape: tuple[int, int]) -> None:
    """absmax clips nothing, so that every weight lies within half a step of its value."""
    w = gaussian(*shape)
    q = quantize_tensor(w, format, fit="absmax")
    bound = steps(format, q) * (1 + 1e-5) + 1e-6 + rounding(format, q, w)
    assert ((w - q.dequantize()).abs() <= bound).all()


@all_formats
@pytest.mark.parametrize("fit", FITS)
def test_encoding_decoded_values_changes_nothing(format: Format, fit: str) -> None:
    """Under the same stored scales, decode -> encode gives the same bytes."""
    q = quantize_tensor(gaussian(4, 203), format, fit=fit)
    again = format.encode(q.dequantize(), format.load_params(q.fields, q.shape))
    stored = {name: field for name, field in again.items() if name in ("scale", "zero_point")}
    for name, field in stored.items():
        assert torch.equal(field, q.fields[name])
    params = format.load_params(q.fields, q.shape)
    if params is None or bool((params.scale != 0).all()):
        assert torch.equal(QTensor(format, q.shape, again).dequantize(), q.dequantize())


@all_formats
@shapes
def test_zeros_stay_zeros(format: Format, shape: tuple[int, int]) -> None:
    """All-zero weights, and zeros among others where the grid has a zero."""
    assert not quantize_tensor(torch.zeros(shape), format).dequantize().any()
    w = gaussian(*shape)
    w[:, ::3] = 0
    floating = format.scale is not None and isinstance(format.scale.offset, torch.dtype)
    if 0.0 in format.grid.points and not floating:
        assert not quantize_tensor(w, format, fit="minmax").dequantize()[:, ::3].any()


@all_formats
@pytest.mark.parametrize("fit", FITS)
def test_scale_equivariance(format: Format, fit: str) -> None:
    """w * 2**k gives the same codes and values * 2**k, for every fit."""
    w = gaussian(4, 203)
    one, scaled = (quantize_tensor(x, format, fit=fit) for x in (w, w * 2.0**-6))
    if format.scale is None:
        pytest.skip("a grid without a scale is not equivariant")
    assert torch.equal(one.dequantize() * 2.0**-6, scaled.dequantize())


@all_formats
@shapes
def test_bytes_are_what_the_layout_says(format: Format, shape: tuple[int, int]) -> None:
    """nbytes, layout and bpw agree exactly; nominal bpw holds where all blocks are full."""
    q = quantize_tensor(gaussian(*shape), format)
    layout = format.layout(shape)
    assert q.nbytes == sum(info.nbytes for info in layout.values())
    assert q.bpw * shape[0] * shape[1] == 8 * q.nbytes
    scale = format.scale
    if shape[1] == 512 and scale is not None and 0 not in scale.block and scale.of is None:
        assert q.bpw == format.bpw


def test_bits_per_weight_of_the_group_formats() -> None:
    """Figures that can be worked out by hand."""
    expected = {"int4-asym-g64": Fraction(4) + Fraction(20, 64), "mxfp4": Fraction(17, 4), "int8": Fraction(8)}
    expected |= {"nf4-dq": 4 + Fraction(8, 64) + Fraction(32, 64 * 256), "nvfp4": Fraction(9, 2)}
    expected |= {"ternary": Fraction(8, 5), "int3-g64": 3 + Fraction(1, 4)}
    assert {name: FORMATS[name].bpw for name in expected} == expected


@all_formats
def test_stacks_are_their_slices(format: Format) -> None:
    """Three dimensions (experts) are quantized one by one."""
    w = gaussian(3, 5, 130)
    q = quantize_tensor(w, format)
    assert q.shape == (3, 5, 130)
    for i in range(3):
        assert torch.equal(q.dequantize()[i], quantize_tensor(w[i], format).dequantize())
        assert torch.equal(q.expert(i).dequantize(), q.dequantize()[i])


@all_formats
@shapes
def test_rows_are_rows(format: Format, shape: tuple[int, int]) -> None:
    """decode_rows gives the rows of decode, in any order and more than once."""
    q = quantize_tensor(gaussian(*shape), format)
    index = torch.tensor([3, 0, 4, 3])
    assert torch.equal(q.rows(index), q.dequantize()[index])


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_descriptions_are_complete(format: AnyFormat) -> None:
    """A format read back from its description decodes alike; names parse to what they name."""
    assert get_format(format.name) is format
    again = read_description(format.name, format.describe())
    assert again == format
    if isinstance(format, Format):
        other = read_description("some other label", format.describe())
        q = quantize_tensor(gaussian(4, 256), format)
        assert torch.equal(other.decode(q.fields, q.shape), q.dequantize())


# Mean square error on N(0, 1) with the best scale (figures of the literature, see docs/formats.md); int1 is {-1, +1}.
GAUSSIAN = {"int1-tensor": 0.3634, "int2-tensor": 0.1494, "int3-tensor": 0.0406, "int4-tensor": 0.01186}


@pytest.mark.parametrize("name", GAUSSIAN)
def test_known_gaussian_errors(name: str) -> None:
    """Two-sided: too good is a bug as well. 2**18 samples put the sampling error at about 0.5 %."""
    w = gaussian(256, 1024)
    error = (quantize_tensor(w, name, fit="mse").dequantize() - w).square().mean().item()
    assert abs(error / GAUSSIAN[name] - 1) < 0.02


@all_formats
def test_nothing_beats_the_rate_distortion_bound(format: Format) -> None:
    """D(R) = 2**-2R for a Gaussian, whatever the code; and no fit is worse than throwing the weights away."""
    w = gaussian(32, 1024)
    q = quantize_tensor(w, format, fit="mse")
    error = ((q.dequantize() - w).square().mean() / w.square().mean()).item()
    assert 2 ** (-2 * float(q.bpw)) < error < 1.0


@all_formats
def test_mse_is_never_worse_than_minmax(format: Format) -> None:
    """Block by block, under the stored scales up to their rounding."""
    w = gaussian(16, 256, seed=1)
    losses = [(quantize_tensor(w, format, fit=f).dequantize() - w).square().sum().item() for f in ("mse", "minmax")]
    assert losses[0] <= losses[1] * (1 + 2**-7)


@pytest.mark.parametrize(("grid", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=str)
def test_fp8_is_torchs(grid: Grid, dtype: torch.dtype) -> None:
    """Every code decodes as PyTorch's; every float within the span rounds as PyTorch's, ties included."""
    codes = torch.arange(256, dtype=torch.uint8)
    ours, theirs = grid.decode(codes), codes.view(dtype).float()
    finite = torch.isfinite(ours)
    assert torch.equal(finite, torch.isfinite(theirs))
    assert torch.equal(ours[finite], theirs[finite])
    values = theirs[finite].sort().values
    x = torch.cat([values, (values[1:] + values[:-1]) / 2, gaussian(4096), gaussian(4096) * grid.span[1] / 8])
    x = x.clamp(*grid.span)
    assert torch.equal(grid.decode(grid.encode(x)), x.to(dtype).float())


def test_fp4_and_nf4_levels() -> None:
    """OCP MX specification 1.0, table of E2M1; QLoRA, appendix E."""
    assert E2M1.points[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert len(NF4.points) == 16
    assert NF4.points[7] == 0.0
    assert sum(p > 0 for p in NF4.points) == 8


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_grids_round_to_the_nearest_point(grid: Grid) -> None:
    """Against exhaustive search in float64; on ties either neighbour is as near."""
    low, high = grid.span
    x = torch.cat([gaussian(500) * min(high, 1e4) / 2, torch.tensor([low, high, 0.0, 2 * high])])
    points = torch.tensor([p for p in grid.points if math.isfinite(p)], dtype=torch.float64)
    distance = (x.double()[:, None] - points).abs()
    found = (grid.decode(grid.encode(x)).double() - x.double()).abs()
    if grid.round == "up":
        above = torch.where(points >= x.double()[:, None] * (1 - 2**-17), points, math.inf).amin(1).clamp(max=high)
        above = torch.where(x.double() < low, low, above)
        assert torch.allclose(grid.decode(grid.encode(x)).double(), above, rtol=2**-17, atol=0)
    else:
        assert (found <= distance.amin(1) * (1 + 1e-6) + 1e-12).all()


def test_bad_input_is_named() -> None:
    """Unknown names suggest others; NaN, emptiness and long groups are refused."""
    with pytest.raises(FormatError, match="int4"):
        get_format("int4-asym-64")
    with pytest.raises(FormatError, match="groups of 128"):
        quantize_tensor(gaussian(4, 64), "int4-g128")
    with pytest.raises(WeightError, match="NaN"):
        quantize_tensor(torch.tensor([[1.0, math.nan]]), "int4")
    with pytest.raises(WeightError, match="NaN or infinity"):
        quantize_tensor(torch.tensor([[1.0, math.inf]]), "int4")
    with pytest.raises(WeightError, match="no weights"):
        quantize_tensor(torch.empty(0, 8), "int4")
    with pytest.raises(FormatError, match="range"):
        quantize_tensor(torch.full((1, 4), 1e6), "fp16")


def test_qtensor_refuses_wrong_fields() -> None:
    """Missing, extra, misshapen or mistyped fields."""
    q = quantize_tensor(gaussian(4, 64), "int4-g64")
    fields = dict(q.fields)
    for broken in (
        {"codes": fields["codes"]},
        {**fields, "more": fields["scale"]},
        {**fields, "codes": fields["codes"][:2]},
        {**fields, "scale": fields["scale"].float()},
    ):
        with pytest.raises(FormatError):
            QTensor(q.format, q.shape, broken)


def test_large_finite_weights_are_not_taken_for_infinity() -> None:
    """The quick check sums magnitudes, which may overflow without any weight being infinite."""
    w = torch.full((8, 64), 3e38)
    assert torch.isfinite(quantize_tensor(w, "int8").dequantize()).all()
