"""Golden files of packed weights, written by the programs themselves: python benchmarks/golden_packed.py [NAME ...].

Each file holds the tensors of one layer as the program stores them, and `expected`, what the program itself decodes
them to; its metadata are what config.json says and the version of the program. Needs torch and the programs:
compressed-tensors, bitsandbytes, hqq, gptqmodel, mlx; those that are not installed are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parents[1] / "tests" / "golden" / "packed"
UP = "model.layers.0.mlp.up_proj"
N, K = 32, 128


def weight(seed: int = 0) -> torch.Tensor:
    """float32 (32, 128), rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=generator) * torch.logspace(-2, 0, N)[:, None]


def save(name: str, tensors: dict[str, torch.Tensor], expected: torch.Tensor, config: dict[str, Any], by: str) -> None:
    """Write one file."""
    stored = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    facts = {"config": json.dumps(config), "made by": f"{by} {version(by)}"}
    save_file({**stored, "expected": expected.detach().contiguous().clone()}, HERE / f"{name}.safetensors", facts)
    print(name, {key: (str(value.dtype), tuple(value.shape)) for key, value in stored.items()})


def compressed() -> None:
    """compressed-tensors: every format that is read."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    ints = {
        f"{bits}-{'sym' if sym else 'asym'}-{strategy}": {
            "num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy,
            **({"group_size": 32} if strategy == "group" else {}),
        }
        for bits, sym, strategy in (
            (4, True, "group"), (4, False, "group"), (2, False, "group"), (3, True, "group"), (8, True, "channel"),
            (4, False, "channel"), (4, True, "tensor"),
        )
    }  # fmt: skip
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        **{f"ct-pack-{name}": ("pack-quantized", args) for name, args in ints.items()},
        "ct-int8": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
        "ct-int8-asym": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}),
        "ct-fp8-channel": ("float-quantized", {**fp8, "strategy": "channel"}),
        "ct-fp8-tensor": ("float-quantized", {**fp8, "strategy": "tensor"}),
        "ct-fp8-block": ("float-quantized", {**fp8, "strategy": "block", "block_structure": [16, 64]}),
    }
    for name, (kind, said) in kinds.items():
        args = QuantizationArgs(**said)
        w = weight()
        parts = w
        if args.strategy == "group":
            parts = w.view(N, -1, args.group_size)
            low, high = parts.amin(-1), parts.amax(-1)
        elif args.strategy == "channel":
            low, high = w.amin(1, True), w.amax(1, True)
        elif args.strategy == "block":
            rows, cols = args.block_structure
            parts = w.view(N // rows, rows, K // cols, cols)
            low, high = parts.amin((1, 3)), parts.amax((1, 3))
        else:
            low, high = w.amin().reshape(1), w.amax().reshape(1)
        scale, zero = calculate_qparams(low, high, args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)
        state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(kind)
        packed = compressor.compress(state, scheme)
        expected = compressor.decompress(packed, scheme)["weight"]
        tensors = {f"{UP}.{key}": value for key, value in packed.items() if value is not None}
        save(name, tensors, expected, _compressed_config(kind, said), "compressed-tensors")


def _compressed_config(kind: str, said: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": said, "input_activations": None}}
    config = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed"}
    return {"quantization_config": {**config, "config_groups": groups, "ignore": ["lm_head"]}}


def compressed_float4() -> None:
    """compressed-tensors: NVFP4 and MXFP4."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    w = weight()
    for name, kind, group in (("ct-nvfp4", "nvfp4-pack-quantized", 16), ("ct-mxfp4", "mxfp4-pack-quantized", 32)):
        said = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": group}
        said["strategy"] = "tensor_group" if group == 16 else "group"
        most = w.view(N, -1, group).abs().amax(-1)
        state = {"weight": w}
        if group == 16:
            state["weight_global_scale"] = (448 * 6 / w.abs().max()).reshape(1)
            state["weight_scale"] = (most / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
        else:
            state["weight_scale"] = torch.exp2(torch.floor(torch.log2(most)) - 2)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**said), format=kind)
        compressor = BaseCompressor.get_value_from_registry(kind)
        packed = compressor.compress(state, scheme)
        expected = compressor.decompress(dict(packed), scheme)["weight"]
        tensors = {f"{UP}.{key}": value for key, value in packed.items() if value is not None}
        save(name, tensors, expected, _compressed_config(kind, said), "compressed-tensors")


def bitsandbytes() -> None:
    """bitsandbytes: NF4, FP4, with and without coded scales, and int8."""
    import bitsandbytes as bnb
    from bitsandbytes import functional as F

    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            codes, state = F.quantize_4bit(weight(), quant_type=kind, blocksize=64, compress_statistics=nested)
            expected = F.dequantize_4bit(codes, state)
            tensors = {f"{UP}.weight": codes}
            tensors |= {f"{UP}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
            save(f"bnb-{kind}{'-nested' if nested else ''}", tensors, expected, config, "bitsandbytes")
    codes, scb, _ = F.int8_vectorwise_quant(weight().half())
    expected = F.int8_vectorwise_dequant(codes, scb)
    tensors = {f"{UP}.weight": codes, f"{UP}.SCB": scb, f"{UP}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    save("bnb-int8", tensors, expected, config, "bitsandbytes")
    assert bnb.__version__


def hqq() -> None:
    """hqq: layers as transformers saves them."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = {"quantization_config": {"quant_method": "hqq"}}
    for name, args in {
        "hqq-4": {"nbits": 4, "group_size": 64, "axis": 1},
        "hqq-8": {"nbits": 8, "group_size": 128, "axis": 1},
        "hqq-3": {"nbits": 3, "group_size": 64, "axis": 1},
        "hqq-2-axis0": {"nbits": 2, "group_size": 32, "axis": 0},
    }.items():
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = weight()
        layer = HQQLinear(linear, BaseQuantizeConfig(**args), compute_dtype=torch.float32, device="cpu")
        tensors = {f"{UP}.{key}": value for key, value in layer.state_dict().items() if value is not None}
        save(name, tensors, layer.dequantize(), config, "hqq")


def mlx() -> None:
    """mlx: affine groups."""
    import mlx.core as mx
    import numpy as np

    for bits in (2, 3, 4, 6, 8):
        parts = mx.quantize(mx.array(weight().numpy()), group_size=64, bits=bits)
        decoded = mx.dequantize(*parts, group_size=64, bits=bits)
        tensors = {
            f"{UP}.{key}": torch.from_numpy(np.array(value))
            for key, value in zip(("weight", "scales", "biases"), parts, strict=True)
        }
        config = {"quantization": {"group_size": 64, "bits": bits}}
        save(f"mlx-{bits}", tensors, torch.from_numpy(np.array(decoded)), config, "mlx")


def gptqmodel() -> None:
    """GPTQModel: GPTQ's container in both versions, with and without an order of the inputs, and AWQ's.

    Its float16 scales are widened before it decodes, so that what it decodes to is not rounded.
    """
    from types import SimpleNamespace

    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    plain = torch.arange(K, dtype=torch.int32) // 32
    order = plain[torch.randperm(K, generator=torch.Generator().manual_seed(1))]
    for name, bits, index, edition in (
        ("gptq-4", 4, plain, 1), ("gptq-4-order", 4, order, 1), ("gptq-4-v2", 4, plain, 2), ("gptq-8", 8, plain, 1),
        ("gptq-3", 3, plain, 1), ("gptq-2", 2, plain, 1), ("gptq-3-v2", 3, plain, 2), ("awq-4", 4, plain, 0),
    ):  # fmt: skip
        w = weight()
        groups = torch.stack([w[:, index == g] for g in range(K // 32)], 1)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        zero = (-low / scale).round()
        where = index.long()
        codes = (w / scale[:, where] + zero[:, where]).round().clamp(0, 2**bits - 1)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = (codes - zero[:, where]) * scale[:, where]
        sizes = {"bits": bits, "group_size": 32, "sym": False, "desc_act": index is order}
        made = (AwqTorchLinear if edition == 0 else TorchLinear)(**sizes, in_features=K, out_features=N)
        made.pack(linear, scale, zero, index)
        wide = made.scales.float()
        if edition == 0:
            from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

            expected = dequantize_gemm(made.qweight, made.qzeros, wide, bits, 32).T
            said = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "edition": "gemm"}
        else:
            kept, made.scales = made.scales, wide
            made.post_init()
            expected = made.dequantize_weight().T.float()
            made.scales = kept
            if edition == 1:
                convert_gptq_v2_to_v1_format_module(made, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
            said = {"quant_method": "gptq", **sizes, "checkpoint_format": "gptq" if edition == 1 else "gptq_v2"}
        parts = ("qweight", "qzeros", "scales") if edition == 0 else ("qweight", "qzeros", "scales", "g_idx")
        tensors = {f"{UP}.{part}": getattr(made, part) for part in parts}
        save(name, tensors, expected, {"quantization_config": said}, "gptqmodel")


def transformers_fp8() -> None:
    """FP8 in blocks, as transformers' own loader decodes it; the codes are made here."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, cols = 16, 64
    parts = weight().view(N // rows, rows, K // cols, cols)
    scale = parts.abs().amax((1, 3)) / 448
    codes = (parts / scale[:, None, :, None]).view(N, K).to(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [rows, cols]}}
    save("fp8-block", {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": scale}, expected, config, "transformers")


def transformers_mxfp4() -> None:
    """MXFP4 experts, as transformers' own loader decodes them; codes and scales are random."""
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 16, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, 16, 3), generator=generator, dtype=torch.uint8)
    expected = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"  # of gpt-oss it would be mlp.experts.gate_up_proj
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    save("mxfp4", {f"{name}_blocks": blocks, f"{name}_scales": scales}, expected, config, "transformers")


MAKERS: tuple[Callable[[], None], ...] = (
    compressed, compressed_float4, bitsandbytes, hqq, mlx, gptqmodel, transformers_fp8, transformers_mxfp4,
)  # fmt: skip

if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for make in MAKERS:
        if sys.argv[1:] and make.__name__ not in sys.argv[1:]:
            continue
        try:
            make()
        except ImportError as error:
            print(f"{make.__name__}: left out, {error}")
