"""`bitfold eval` and `bitfold layers`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitfold.cli.app import (
    Device,
    Executor,
    Json,
    MaxGpuMemory,
    ModelArgument,
    Revision,
    Workers,
    app,
    print_json,
    the_device,
)
from bitfold.errors import UsageError

if TYPE_CHECKING:
    import torch


class Metric(str, Enum):
    """What to measure."""

    lm = "lm"
    masked = "masked"
    embedding = "embedding"


ReferenceOption = Annotated[
    str | None, typer.Option("--reference", "-r", help="The model to compare with, usually the original.")
]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text",
        "-t",
        help="A file of text or data, or a Hub data set (org/name). Default: 100 kB of WikiText-2's test split.",
    ),
]
TextColumnOption = Annotated[
    str | None, typer.Option(help="The column of the data that holds the text or the messages.", show_default=False)
]
MetricOption = Annotated[
    Metric,
    typer.Option(
        help="lm: perplexity, KL and agreement. masked: the same for masked models. embedding: cosines, a text a line."
    ),
]
ContextOption = Annotated[
    int | None, typer.Option(help="Tokens of a window. Default: 2048, or less: what the model can take, --max-tokens.")
]
StrideOption = Annotated[int | None, typer.Option(help="Tokens between windows; less than the context: they overlap.")]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens from the start of the text to use; 0: all.")]
StartTokenOption = Annotated[
    bool,
    typer.Option(
        "--start-token/--no-start-token", help="Begin windows as the tokenizer begins a text, with <s>, <bos> or none."
    ),
]
BatchOption = Annotated[int, typer.Option(help="Windows to run at once.", min=1)]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the weights are stored.")]
TasksOption = Annotated[
    list[str] | None, typer.Option(help="Tasks of lm-eval to run as well (extra `tasks`). Repeatable.")
]
LimitOption = Annotated[int | None, typer.Option(help="Documents of each task.", min=1)]
MaxKlOption = Annotated[
    float | None, typer.Option(help="Fail (exit code 7) when the mean KL divergence is above this.")
]
MaxPerplexityOption = Annotated[float | None, typer.Option(help="Fail when the perplexity is above this.")]
MinTop1Option = Annotated[float | None, typer.Option(help="Fail when the top-1 agreement (0 to 1) is below this.")]
CacheDirOption = Annotated[
    Path | None, typer.Option(help="Keep the reference's predictions here for the next comparison.")
]
SaveOption = Annotated[
    bool, typer.Option("--save", help="Keep the numbers in the folder, for `bitfold compare` and `bitfold report`.")
]
UpdateCardOption = Annotated[
    bool, typer.Option("--update-card", help="Write the numbers into the model card of the folder.")
]


@dataclass(frozen=True)
class _After:
    """What becomes of the numbers once they are printed."""

    save: bool
    update_card: bool
    limits: dict[str, float | None]


@app.command("eval")
def evaluate(
    model: ModelArgument,
    reference: ReferenceOption = None,
    text: TextOption = None,
    text_column: TextColumnOption = None,
    metric: MetricOption = Metric.lm,
    context: ContextOption = None,
    stride: StrideOption = None,
    max_tokens: MaxTokensOption = 20480,
    start_token: StartTokenOption = True,
    batch: BatchOption = 1,
    dtype: DtypeOption = "float32",
    tasks: TasksOption = None,
    limit: LimitOption = None,
    max_kl: MaxKlOption = None,
    max_perplexity: MaxPerplexityOption = None,
    min_top1: MinTop1Option = None,
    cache_dir: CacheDirOption = None,
    save: SaveOption = False,
    update_card: UpdateCardOption = False,
    executor: Executor = "local",
    workers: Workers = None,
    device: Device = "cpu",
    max_gpu_memory: MaxGpuMemory = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Measure perplexity, and what was lost against a reference."""
    from bitfold.text.documents import with_column

    text = with_column(text, text_column)
    limits = {"max_kl": max_kl, "max_perplexity": max_perplexity, "min_top1": min_top1}
    if metric is Metric.embedding:
        kept = tasks or save or update_card or any(limit is not None for limit in limits.values())
        if kept or (executor, workers) != ("local", None):
            what = "embeddings have no limits, no tasks, no record, and are computed in this process"
            raise UsageError(what, where="--metric embedding")
        _embedding(model, reference, text, batch, the_device(device, max_gpu_memory), json=json)
        return
    if reference is None and (max_kl is not None or min_top1 is not None):
        raise UsageError("a limit on the KL divergence or agreement needs a reference", hint="give --reference")
    options = {
        "metric": metric.value,
        "context": context,
        "stride": stride,
        "max_tokens": max_tokens or None,
        "batch": batch,
        "dtype": dtype,
        "cache_dir": cache_dir,
        "revision": revision,
        "tasks": [name for group in tasks or () for name in group.split(",")],
        "limit": limit,
        "start_token": start_token,
        "device": the_device(device, max_gpu_memory),
        "executor": executor,
        "workers": workers,
    }
    _language(model, reference, text, options, _After(save, update_card, limits), json=json)


def _language(
    model: str, reference: str | None, text: str | None, options: dict[str, Any], after: _After, *, json: bool
) -> None:
    from bitfold.evaluation import evaluate as run
    from bitfold.records.card import require_card
    from bitfold.records.record import check_record

    if after.save or after.update_card:
        check_record(model)
    if after.update_card:
        require_card(Path(model))
    result = run(model, reference, text, **options)
    if json:
        print_json({"model": model, "reference": reference, **result.to_dict()})
    else:
        from bitfold.cli.tables import show_evaluation

        show_evaluation(result)
    if after.save:
        from bitfold.records.record import add_to_record

        known = {
            "reference": reference and Path(reference).name,
            "dtype": options["dtype"],
            "stride": options["stride"],
        }
        add_to_record(model, "evaluations", {**result.to_dict(), **known})
    if after.update_card:
        from bitfold.records.card import add_evaluation

        add_evaluation(Path(model), result.to_dict())
    result.require(**after.limits)


def _embedding(
    model: str, reference: str | None, text: str | None, batch: int, device: torch.device, *, json: bool
) -> None:
    if reference is None:
        raise UsageError("embeddings are compared with those of another model", where="--reference")
    from bitfold.evaluation import embedding_cosine
    from bitfold.text.windows import read_lines, text_name

    result = embedding_cosine(model, reference, read_lines(text), batch=batch, device=device)
    if json:
        print_json({"model": model, "reference": reference, "text": text_name(text), **result.to_dict()})
        return
    from bitfold.cli.tables import show_embedding

    show_embedding(result)


@app.command()
def layers(
    model: ModelArgument,
    reference: Annotated[str, typer.Option("--reference", "-r", help="The unquantized original.", show_default=False)],
    text: Annotated[
        str | None, typer.Option("--text", "-t", help="As in `eval`. Default: 1 MB of WikiText-2's validation split.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to measure output errors under.", min=2)] = 2048,
    swaps: Annotated[
        int, typer.Option(help="Swap so many tensors one by one and measure the KL divergence of each; -1: all.")
    ] = 0,
    swap_tokens: Annotated[int, typer.Option(help="Tokens to measure a swap on.", min=2)] = 512,
    start_token: StartTokenOption = True,
    dtype: DtypeOption = "float32",
    save: SaveOption = False,
    device: Device = "cpu",
    max_gpu_memory: MaxGpuMemory = None,
    json: Json = False,
) -> None:
    """Measure what each quantized tensor lost: error of the weight, of its output, KL of swapping it alone."""
    from bitfold.evaluation.layers import layer_errors as run
    from bitfold.records.record import check_record

    if save:
        check_record(model)
    result = run(
        model,
        reference,
        text,
        context=context,
        max_tokens=max_tokens,
        swaps=swaps,
        swap_tokens=swap_tokens,
        dtype=dtype,
        start_token=start_token,
        device=the_device(device, max_gpu_memory),
    )
    if json:
        print_json({"model": model, "reference": reference, **result.to_dict()})
    else:
        from bitfold.cli.tables import show_layers

        show_layers(result)
    if save:
        from bitfold.records.record import add_to_record

        add_to_record(model, "layers", result.to_dict())
