"""`bitfold quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitfold.cli.app import (
    Device,
    Executor,
    Json,
    MaxGpuMemory,
    PreTokenizer,
    Revision,
    Workers,
    app,
    print_json,
    the_device,
)
from bitfold.errors import UsageError
from bitfold.system.units import parse_size

ModelOption = Annotated[
    str,
    typer.Argument(help="A model folder, a GGUF file, or a Hub repository (org/name).", show_default=False),
]
OutputDirOption = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Folder (or file, with --export) to write; it must not exist yet."),
]
BitsOption = Annotated[
    int | None,
    typer.Option(
        "--bits", "-b", help="1 to 8; up to 4: calibrated trellis codes, above: integers, unless a method is named."
    ),
]
FormatOption = Annotated[
    str | None, typer.Option("--format", "-f", help="A number format by name instead, see `bitfold formats`.")
]
GroupSizeOption = Annotated[int | None, typer.Option(help="Weights of a row that share a scale; -1: the whole row.")]
FitOption = Annotated[
    str | None, typer.Option(help="How scales are chosen: absmax, minmax, mse (mostly the default), hqq or clip.")
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How: auto (default), rtn, hqq, gptq, awq, ldlq, aqlm, signround, trellis ..., see `bitfold methods`.",
    ),
]
TransformOption = Annotated[str | None, typer.Option(help="Basis of the inputs: none, hadamard, smooth:0.5, awq.")]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        help="For calibrated methods: a file of text or data, a Hub data set, self, or bitfold's default, code,"
        " dialogue. Again, for a mix, each perhaps with its share behind a colon: notes.txt:0.5.",
        show_default=False,
    ),
]
TextColumnOption = Annotated[
    str | None, typer.Option(help="The column of the data that holds the text or the messages.", show_default=False)
]
NsamplesOption = Annotated[int, typer.Option(help="Samples of calibration text.")]
SeqlenOption = Annotated[int | None, typer.Option(help="Tokens of a sample (default: 2048, or what fits).")]
StartTokenOption = Annotated[
    bool,
    typer.Option("--start-token/--no-start-token", help="Begin samples as the tokenizer begins a text, or without."),
]
DriftOption = Annotated[float | None, typer.Option(help="Correction for the loss of earlier layers, 0 to 1.")]
FisherOption = Annotated[
    bool | None,
    typer.Option("--fisher/--no-fisher", help="Weigh tokens by gradients (default: if the model is small)."),
]
RefitOption = Annotated[
    bool, typer.Option("--refit/--no-refit", help="End error feedback with the row scales that cost least.")
]
ColumnsOption = Annotated[
    int | None, typer.Option(help="Solve layers with more inputs in ranges of so many: less memory, some loss.")
]
ActOption = Annotated[
    str | None,
    typer.Option(help="Activations at run time: float, int8 (per token), or auto (measured; trellis default)."),
]
PruneOption = Annotated[
    str | None, typer.Option(help="Weights that become zero: wanda:0.5, sparsegpt:2:4 and the like.")
]
IgnoreOption = Annotated[
    list[str] | None, typer.Option(help="Tensors to keep as they are: a name, a glob or re:PATTERN. Repeatable.")
]
KeepEmbeddingsOption = Annotated[
    bool, typer.Option("--keep-embeddings", help="Leave embeddings and output head in 16 bits; else --bits makes it 8.")
]
RecipeOption = Annotated[Path | None, typer.Option(help="A TOML file of rules, tensor by tensor.")]
DistillOption = Annotated[
    float | None,
    typer.Option(
        help="Then train scales and norms on the original's predictions, so many minutes.", show_default=False
    ),
]
StagesOption = Annotated[
    int,
    typer.Option(
        help="With --distill: quantize the blocks in so many parts; between them the rest is trained, half of the time."
    ),
]
ExportOption = Annotated[
    str | None,
    typer.Option(
        help="Write for other engines: compressed-tensors, gptq, awq, auto-round; or a GGUF file: gguf:Q4_K_M.",
        show_default=False,
    ),
]
TargetSizeOption = Annotated[
    str | None,
    typer.Option(help="Size of the whole result, such as 180MB: formats are chosen for it.", show_default=False),
]
TargetBpwOption = Annotated[
    float | None,
    typer.Option(help="The same in bits for each weight, everything counted, such as 2.7.", show_default=False),
]
ImatrixOption = Annotated[
    Path | None,
    typer.Option(
        help="For --target-size, --target-bpw: what errors cost, by `bitfold imatrix` (default: measured).",
        show_default=False,
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Begin anew, whatever an interrupted run has finished already.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Fail when a tensor is flagged: NaN, zeros, an error that is out of line.")
]
EventsOption = Annotated[Path | None, typer.Option(help="Append what happens to this file, as JSON lines.")]
MaxMemoryOption = Annotated[
    str | None, typer.Option(help="Ceiling on the resident memory of the process, such as 4GB.", show_default=False)
]
TensorsOption = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]
SeedOption = Annotated[int, typer.Option(help="Of random numbers; the same seed gives the same bytes.")]
MaxShardSizeOption = Annotated[
    str | None,
    typer.Option(
        help="Size at which a new file is begun (default: 4GiB in folders, one GGUF file).", show_default=False
    ),
]
UploadRepoOption = Annotated[
    str | None, typer.Option(help="Publish the folder as this Hub repository when it is complete.")
]
LowDiskOption = Annotated[
    bool,
    typer.Option("--low-disk", help="Fetch and send file by file, keeping neither: repository to --upload-repo."),
]


@app.command()
def quantize(
    model: ModelOption,
    output_dir: OutputDirOption = None,
    bits: BitsOption = None,
    format: FormatOption = None,
    group_size: GroupSizeOption = None,
    fit: FitOption = None,
    method: MethodOption = None,
    transform: TransformOption = None,
    calibration: CalibrationOption = None,
    text_column: TextColumnOption = None,
    pre_tokenizer: PreTokenizer = None,
    nsamples: NsamplesOption = 32,
    seqlen: SeqlenOption = None,
    start_token: StartTokenOption = True,
    drift: DriftOption = None,
    fisher: FisherOption = None,
    refit: RefitOption = True,
    columns: ColumnsOption = None,
    act: ActOption = None,
    prune: PruneOption = None,
    ignore: IgnoreOption = None,
    recipe: RecipeOption = None,
    keep_embeddings: KeepEmbeddingsOption = False,
    export: ExportOption = None,
    distill: DistillOption = None,
    stages: StagesOption = 1,
    target_size: TargetSizeOption = None,
    target_bpw: TargetBpwOption = None,
    imatrix: ImatrixOption = None,
    max_memory: MaxMemoryOption = None,
    restart: RestartOption = False,
    strict: StrictOption = False,
    events: EventsOption = None,
    dry_run: DryRunOption = False,
    tensors: TensorsOption = False,
    seed: SeedOption = 0,
    max_shard_size: MaxShardSizeOption = None,
    revision: Revision = None,
    upload_repo: UploadRepoOption = None,
    low_disk: LowDiskOption = False,
    executor: Executor = "local",
    workers: Workers = None,
    device: Device = "cpu",
    max_gpu_memory: MaxGpuMemory = None,
    json: Json = False,
) -> None:
    """Quantize a model into a new folder, one tensor in memory at a time."""
    out = _out(output_dir, dry_run=dry_run)
    from bitfold.run.options import MethodOptions, Request, RunOptions

    said = (bits, format, group_size, fit, method, transform, act, prune, tuple(ignore or ()), recipe)
    sizes = (nsamples, seqlen, drift, fisher, columns, refit, start_token)
    how = (seed, _bytes(max_shard_size, "--max-shard-size"), _bytes(max_memory, "--max-memory"))
    kind: dict[str, Any] = {"upload_repo": upload_repo, "pre_tokenizer": pre_tokenizer, "low_disk": low_disk}
    kind |= {"executor": executor, "workers": workers, "device": the_device(device, max_gpu_memory)}
    options = RunOptions(*how, dry_run, restart, strict, events, revision, **kind)
    text, size = _text(method, calibration, text_column, sizes), _bytes(target_size, "--target-size")
    what = (MethodOptions(*said, keep_embeddings), text, export, size, imatrix, target_bpw)
    _go(Request(model, out, *what), options, (distill, stages), tensors=tensors, json=json)


def _out(folder: Path | None, *, dry_run: bool) -> Path:
    """Where to write; UsageError where that was not said."""
    if folder is None and not dry_run:
        raise UsageError("say where to write", where="--output-dir", hint="or try --dry-run first")
    return folder or Path("unused")


def _text(method: str | None, given: list[str] | None, column: str | None, sizes: Any) -> Any:
    """The calibration."""
    from bitfold.calibration.options import settings
    from bitfold.text.documents import with_column
    from bitfold.text.mixes import joined

    return settings(method, with_column(joined(given), column), *sizes)


def _go(request: Any, options: Any, learning: tuple[float | None, int], *, tensors: bool, json: bool) -> None:
    """Quantize, and distill where minutes are given; print what came of it."""
    from bitfold.cli.tables import show_quantized
    from bitfold.run.driver import run

    minutes, stages = learning
    if minutes is None and stages != 1:
        raise UsageError("trains between the parts for half of the time", where="--stages", hint="--distill 60, say")
    if minutes is None:
        report = run(request, options)
        if json:
            print_json(report.to_dict())
        else:
            show_quantized(report, tensors=tensors)
        return
    from bitfold.run.learning import quantize_and_distill
    from bitfold.training.distill import say_what_came_of_it

    first, found = quantize_and_distill(request, options, minutes, stages)
    if json:
        parts = {"distill": None if found is None else found.to_dict()}
        print_json({**({} if first is None else first.to_dict()), **parts})
        return
    if first is not None:
        show_quantized(first, tensors=tensors)
    if found is not None:
        print(say_what_came_of_it(found))


def _bytes(text: str | None, where: str) -> int | None:
    return None if text is None else parse_size(text, where=where)
