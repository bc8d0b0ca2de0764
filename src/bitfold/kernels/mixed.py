"""LLM.int8(): the few activation columns with outliers in floating point, the others in 8 bits.

A handful of columns carry magnitudes tens of times those of the others (Dettmers et al. 2022, arXiv 2208.07339). In
8 bits they would set the step for the whole token; taken out, they leave it to the rest, and their products are exact:
x W^T = x_near W^T + x_far W_far^T. Which columns those are is seen when the data comes, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bitfold.qtensor import QTensor

Product = Callable[[Tensor], Tensor]


def mixed_matmul(x: Tensor, q: QTensor, threshold: float, int8: Product, exact: Callable[[], Product]) -> Tensor:
    """x (m, k) times a weight (n, k), transposed -> float32 (m, n).

    Args:
        x: activations.
        q: the weight; of it only the columns with outliers are decoded, where the format can do so.
        threshold: columns with some |x| at or above it are multiplied in floating point.
        int8: the product with activations rounded to 8 bits.
        exact: gives the product with float activations; asked only where a format cannot decode single columns, or
            where all columns are outliers.
    """
    far = (x.detach().abs() >= threshold).any(0)
    if not bool(far.any()):
        return int8(x)
    if bool(far.all()):
        return exact()(x)
    near = int8(x.masked_fill(far, 0))
    take = q.format.decode_columns
    if take is None:
        return near + exact()(x.masked_fill(~far, 0))
    columns = far.nonzero()[:, 0]
    w = take(q.fields, q.shape, columns)
    return near + x[:, columns].float() @ w.T
