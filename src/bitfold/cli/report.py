"""`bitfold compare` and `bitfold report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, app, print_json
from bitfold.cli.evaluate import CacheDirOption, DtypeOption, StartTokenOption
from bitfold.errors import UsageError
from bitfold.system.outputs import real_path, try_folder

RunsArgument = Annotated[
    list[str], typer.Argument(help="Quantized folders of one model.", show_default=False, metavar="RUN...")
]
ReferenceOption = Annotated[
    str | None, typer.Option("--reference", "-r", help="The original; what was not measured yet is measured now.")
]
TextOption = Annotated[str | None, typer.Option("--text", "-t", help="As in `eval`; with --reference.")]
ContextOption = Annotated[int | None, typer.Option(help="As in `eval`; with --reference.")]
MaxTokensOption = Annotated[int, typer.Option(help="As in `eval`; with --reference.")]


@app.command()
def compare(
    runs: RunsArgument,
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="The original; all runs are measured against it now.")
    ] = None,
    text: TextOption = None,
    context: ContextOption = None,
    max_tokens: MaxTokensOption = 20480,
    start_token: StartTokenOption = True,
    dtype: DtypeOption = "float32",
    cache_dir: CacheDirOption = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the numbers in the folders.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw size against KL into this .svg, .png or .pdf file.")] = None,
    json: Json = False,
) -> None:
    """Put quantized folders of one model side by side: size, bits, KL, perplexity; which are beaten."""
    from bitfold.evaluation.comparison import compare as run

    if plot is not None:
        from bitfold.reporting.pictures import check_picture

        check_picture(plot)
    options = {"context": context, "max_tokens": max_tokens or None, "dtype": dtype, "cache_dir": cache_dir}
    options["start_token"] = start_token
    result = run(runs, reference, text, save=save, **options)
    if json:
        print_json(result.to_dict())
    else:
        from bitfold.cli.tables import show_comparison

        show_comparison(result)
    if plot is not None:
        from bitfold.reporting.charts import pareto_plot
        from bitfold.reporting.pictures import save_chart

        (chart,) = pareto_plot(result).views.values()
        save_chart(chart, plot)


@app.command()
def report(
    folders: Annotated[list[str], typer.Argument(help="Quantized folders of one model.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The HTML file to write; it opens offline.", show_default=False)
    ],
    reference: ReferenceOption = None,
    text: TextOption = None,
    context: ContextOption = None,
    max_tokens: MaxTokensOption = 20480,
    start_token: StartTokenOption = True,
    swaps: Annotated[int, typer.Option(help="As in `layers`: tensors to swap in each folder; with --reference.")] = 0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="For the sample texts; with --reference. Repeatable.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Write every plot into this folder as SVG and PNG as well.")
    ] = None,
    json: Json = False,
) -> None:
    """Write one HTML page about quantized folders: sizes, losses, layers, outliers, samples, recipe."""
    from bitfold.reporting import Measuring, gather, save_plots, write_report
    from bitfold.reporting import plots as all_plots
    from bitfold.reporting.data import PROMPTS
    from bitfold.reporting.page import check_output

    if reference is None and (text or prompt or swaps or context):
        raise UsageError("what is measured needs the original", where="--reference")
    check_output(output)
    if plots is not None:
        try_folder(real_path(plots))
    options = {"context": context, "max_tokens": max_tokens or None, "start_token": start_token}
    measuring = None if reference is None else Measuring(reference, text, options, swaps, tuple(prompt or PROMPTS))
    data = gather(folders, measuring)
    path = write_report(data, output)
    pictures = save_plots(all_plots(data), plots) if plots is not None else []
    if json:
        files = {"output": str(path), "bytes": path.stat().st_size, "plots": [str(p) for p in pictures]}
        print_json({**files, "runs": [run.name for run in data.runs], "missing": data.why_not or None})
        return
    print(path)
    if data.why_not:
        typer.echo(f"warning: no loss is shown: {data.why_not}", err=True)
