"""PyTorch's own low-bit CPU products: int4 and int8 weights, dynamic W8A8, and torchao's da8w4 where a build has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import arguments, copies, median_seconds, missing, report

GROUP = 128
Product = Callable[[torch.Tensor], torch.Tensor]


def int4(n: int, k: int) -> Product:
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def int8(n: int, k: int) -> Product:
    codes, scales = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scales)


def dynamic(n: int, k: int) -> Product:
    layer = torch.ao.nn.quantized.dynamic.Linear(k, n, bias_=False)
    weight = torch.quantize_per_tensor(torch.randn(n, k), 0.02, 0, torch.qint8)
    layer.set_weight_bias(weight, None)
    return layer


# name, bytes a weight, type of the activations
KERNELS = {
    "torch _weight_int4pack_mm_for_cpu g128": (int4, 0.5 + 4 / GROUP, torch.bfloat16),
    "torch _weight_int8pack_mm": (int8, 1.0, torch.bfloat16),
    "torch dynamic W8A8 linear": (dynamic, 1.0, torch.float32),
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    for name, (make, per_weight, dtype) in KERNELS.items():
        for n, k in args.shapes:
            nbytes = n * k * per_weight
            try:
                products = [make(n, k) for _ in range(copies(int(nbytes)))]
                for m in args.rows:
                    x = torch.randn(m, k, dtype=dtype)
                    calls = [lambda p=p, x=x: p(x) for p in products]
                    report(name, (n, k), m, median_seconds(calls, m), nbytes)
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                missing(name, str(error).splitlines()[0])
                break
    da8w4()


def da8w4() -> None:
    """torchao's int4 weights with int8 activations: its kernel is compiled only into some builds."""
    try:
        import torchao
    except ImportError as error:
        missing("torchao da8w4", str(error))
        return
    if not hasattr(torch.ops.torchao, "da8w4_linear_cpu"):
        missing("torchao da8w4", f"torchao {torchao.__version__} here has no da8w4_linear_cpu")


if __name__ == "__main__":
    main()
