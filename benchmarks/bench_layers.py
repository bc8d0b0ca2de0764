"""What methods lose on single layers of a real model, and what they cost: the table of docs/methods.md.

Each layer is quantized by itself under the second moments of its inputs on a text, in the original model; its loss is
tr((W - Q) H (W - Q)^T) / tr(W H W^T), the relative error of its output. Time is CPU time of one thread for a weight,
the search of factors and the rotation included.

    python benchmarks/bench_layers.py MODEL [--text FILE] [--tokens 2048] [--bits 2]
                                       [--layers NAME ...] [--methods NAME ...]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bitfold.calibration import Statistics, calibration_tokens
from bitfold.calibration.shared_input import SharedInput, Solved, solve_group
from bitfold.errors import BitfoldError
from bitfold.models.sites import Site, find_sites
from bitfold.planning.decisions import Quantized
from bitfold.recipes.options import MethodOptions, choose_recipe
from bitfold.system.tensorinfo import TensorInfo
from bitfold.text.tokens import BUNDLED

LAYERS = ["model.layers.4.self_attn.q_proj", "model.layers.4.mlp.up_proj"]
METHODS = ["rtn", "hqq", "awq", "gptq", "quip", "quip-sharp", "aqlm", "trellis"]


def inputs(model: Any, layer: str, ids: torch.Tensor) -> Statistics:
    """Moments of what reaches a layer."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    x = torch.cat(seen)
    hessian = x.T @ x / len(x)
    return Statistics(hessian, hessian.clone(), len(x), x.abs().amax(0), x.abs().mean(0))


def solved(model: Any, site: Site, statistics: Statistics, method: str, bits: int) -> tuple[Solved, float]:
    """The layer by one method, and CPU seconds; the model's own weight is put back."""
    scheme = choose_recipe(MethodOptions(bits=bits, method=method)).rules[-1].scheme
    assert scheme is not None
    w = model.get_parameter(site.tensor).detach().clone()
    info = TensorInfo(w.dtype, tuple(w.shape))
    own = Statistics(*(v.clone() if isinstance(v, torch.Tensor) else v for v in vars(statistics).values()))
    started = time.process_time()
    alone = SharedInput(model, [Quantized(site.tensor, info, method, site, scheme)], [own])
    (found,) = solve_group(alone, drift=0.0, seed=0)
    spent = time.process_time() - started
    model.get_parameter(site.tensor).data.copy_(w)
    assert isinstance(found, Solved)
    return found, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", default=BUNDLED)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--layers", nargs="*", default=LAYERS)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = calibration_tokens(args.model, args.text, nsamples=1, seqlen=args.tokens)
    sites = {site.module: site for site in find_sites(model)}
    print("| layer | method | format | bits stored | loss | us a weight |", "|---" * 6 + "|", sep="\n")
    for layer in args.layers:
        statistics = inputs(model, layer, ids)
        for method in args.methods:
            try:
                found, seconds = solved(model, sites[layer], statistics, method, args.bits)
            except BitfoldError as error:
                print(f"| {layer} | {method} | {error.what} | | | |", flush=True)
                continue
            q = found.qtensor
            per_weight = 1e6 * seconds / sites[layer].shape[0] / sites[layer].shape[1]
            name = q.format.name
            print(
                f"| {layer} | {method} | {name} | {float(q.bpw):.2f} | {found.output_error:.4f} | {per_weight:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
