"""`bitfold eval`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, ModelArgument, Revision, app, print_json
from bitfold.errors import UsageError


class Metric(str, Enum):
    """What to measure."""

    lm = "lm"
    embedding = "embedding"


ReferenceOption = Annotated[
    str | None, typer.Option("--reference", "-r", help="The model to compare with, usually the original.")
]
TextOption = Annotated[
    Path | None, typer.Option("--text", "-t", help="A UTF-8 text file. Default: 100 kB of WikiText-2's test split.")
]
MetricOption = Annotated[
    Metric,
    typer.Option(help="lm: perplexity, KL and top-1. embedding: cosines of sentence embeddings, a text a line."),
]
ContextOption = Annotated[
    int | None, typer.Option(help="Tokens of a window. Default: 2048, or what the model can take.")
]
StrideOption = Annotated[int | None, typer.Option(help="Tokens between windows; less than the context: they overlap.")]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens from the start of the text to use; 0: all.")]
BatchOption = Annotated[int, typer.Option(help="Windows to run at once.", min=1)]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the weights are stored.")]
MaxKlOption = Annotated[
    float | None, typer.Option(help="Fail (exit code 7) when the mean KL divergence is above this.")
]
CacheDirOption = Annotated[
    Path | None, typer.Option(help="Keep the reference's predictions here for the next comparison.")
]
UpdateCardOption = Annotated[
    bool, typer.Option("--update-card", help="Write the numbers into the model card of the folder.")
]


@app.command("eval")
def evaluate(
    model: ModelArgument,
    reference: ReferenceOption = None,
    text: TextOption = None,
    metric: MetricOption = Metric.lm,
    context: ContextOption = None,
    stride: StrideOption = None,
    max_tokens: MaxTokensOption = 20480,
    batch: BatchOption = 1,
    dtype: DtypeOption = "float32",
    max_kl: MaxKlOption = None,
    cache_dir: CacheDirOption = None,
    update_card: UpdateCardOption = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Measure perplexity, and what was lost against a reference."""
    if metric is Metric.embedding:
        _embedding(model, reference, text, batch, json=json)
        return
    from bitfold.evaluation import evaluate as run

    result = run(
        model,
        reference,
        text,
        context=context,
        stride=stride,
        max_tokens=max_tokens or None,
        batch=batch,
        dtype=dtype,
        cache_dir=cache_dir,
        revision=revision,
    )
    if json:
        print_json({"model": model, "reference": reference, **result.to_dict()})
    else:
        from bitfold.cli.tables import show_evaluation

        show_evaluation(result)
    if update_card:
        from bitfold.card import add_evaluation

        add_evaluation(Path(model), result.to_dict())
    if max_kl is not None:
        result.require(max_kl=max_kl)


def _embedding(model: str, reference: str | None, text: Path | None, batch: int, *, json: bool) -> None:
    if reference is None:
        raise UsageError("embeddings are compared with those of another model", where="--reference")
    from bitfold.evaluation import embedding_cosine
    from bitfold.evaluation.text import read_lines, text_name

    result = embedding_cosine(model, reference, read_lines(text), batch=batch)
    if json:
        print_json({"model": model, "reference": reference, "text": text_name(text), **result.to_dict()})
        return
    from bitfold.cli.tables import show_embedding

    show_embedding(result)
