"""AutoRound on the CPU, with as many steps of two windows as ours takes."""

from __future__ import annotations

from auto_round import AutoRound
from common import GROUP, Run, linears
from transformers import AutoTokenizer

run = Run.begin()
model = run.load()
names = [name for name, _ in linears(model)]
tuned = AutoRound(
    model,
    AutoTokenizer.from_pretrained(run.options.model),
    bits=run.options.bits,
    group_size=GROUP,
    sym=False,
    device_map="cpu",
    dataset=run.tokens(),
    iters=run.options.steps,
    batch_size=2,
    nsamples=run.options.nsamples,
    seqlen=run.options.seqlen,
)
tuned.quantize()
weights = {name: tuned.model.get_submodule(name).weight.detach().float() for name in names}
run.nominal(run.options.bits + (16 + run.options.bits) / GROUP, model)
run.finish(weights)
