"""`planish eval`: what a compression cost, on a text and on tasks."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..calib.data.documents import check_source
from ..calib.files.given import check_models
from ..common.outfile import check_outfiles
from ..common.texts import NO_TEXT
from ..terminal.console import Traceback, end_by, err_console, out_console
from ..terminal.options import AsJson, Device, Dtype, Gates, Pickle, Quiet, gate_of, refuse_idle, starting, torch_dtype
from ..terminal.progress import showing

if TYPE_CHECKING:
    from ..eval.scores.gate import Gate
    from ..eval.scores.text_score import TextSettings
    from .job import EvalJob, EvalPlan


class Beginning(str, Enum):
    """Whether each window of a text begins with a token of its own."""

    none = "none"
    window = "window"


def _print_schema(value: bool) -> None:
    if value:
        from ..common.schemas import schema_of
        from ..eval.scores.evaluation import Evaluation

        print(json.dumps(schema_of(Evaluation, "planish eval"), indent=2))
        raise typer.Exit


Checkpoint = Annotated[str, typer.Argument(metavar="DIR", help="A compressed checkpoint, or any model.")]
Against = Annotated[str | None, typer.Option(metavar="MODEL", help="The base model, to say what the compression cost.")]
Tasks = Annotated[str, typer.Option(metavar="A,B,C", help="Tasks of lm-evaluation-harness, separated by commas.")]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Only the first N documents of each task. At least 1.")]
Include = Annotated[Path | None, typer.Option("--include-path", metavar="FOLDER", help="A folder of task files (.yaml) to know besides.")]
Text = Annotated[str, typer.Option(metavar="FILE", help="Text for perplexity: .txt, .jsonl, .parquet or hub:NAME, builtin, or none.")]
Stride = Annotated[int | None, typer.Option(help="Tokens from one window to the next; only new ones are scored. Default: no overlap.")]
Bos = Annotated[Beginning, typer.Option("--bos", help="none: text as it is. window: each window begins with the token for a beginning.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Requests of a task that run at once. At least 1.")]
Numbers = Annotated[Dtype | None, typer.Option("--dtype", help="Arithmetic. Default: tasks as the model is stored, text in float32.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the result there too, as JSON.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the result there too, as a page.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write tables for a pull request there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the files of --out, --html and --markdown if they exist.")]
Server = Annotated[
    str | None, typer.Option(metavar="URL", help="Measure the model that this running OpenAI-compatible server has of DIR: http://127.0.0.1:8000")
]
ServedName = Annotated[str | None, typer.Option(metavar="NAME", help="What DIR is called there, where the server has several models.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=1, help="How long one answer of the server may take.")]
Schema = Annotated[bool, typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of the JSON and exit.")]


def evaluate_command(
    context: typer.Context,
    checkpoint: Checkpoint,
    against: Against = None,
    tasks: Tasks = "",
    limit: Limit = None,
    include_path: Include = None,
    text: Text = "builtin",
    windows: Annotated[int, typer.Option(help="How many windows of the text, at most.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of each, at most.")] = 2048,
    stride: Stride = None,
    bos: Bos = Beginning.none,
    batch_size: Batch = 8,
    out: Out = None,
    html: Html = None,
    markdown: Markdown = None,
    force: Force = False,
    server: Server = None,
    served_name: ServedName = None,
    server_timeout: Timeout = 600,
    gate: Gates = None,
    device: Device = None,
    dtype: Numbers = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    schema: Schema = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Measure a checkpoint: perplexity, divergence from the base model, and tasks of lm-evaluation-harness, with what was lost and how surely.

    What the base model says is kept, so that the next checkpoint of it costs half. Tasks need the extra planish\\[eval].
    Exit code 3: the gate is missed.
    """
    thresholds = _checked(context, {"--out": out, "--html": html, "--markdown": markdown}, gate)
    with starting():
        from .job import EvalJob

        job = EvalJob(
            model=checkpoint,
            against=against,
            tasks=tuple(tasks.split(",")) if tasks else (),
            limit=limit,
            include_path=include_path,
            text=None if text == NO_TEXT else _settings(text, windows, length, stride, bos),
            batch_size=batch_size,
            device=device,
            dtype=torch_dtype(dtype),
            allow_pickle=allow_pickle,
            out=out,
            html=html,
            markdown=markdown,
            force=force,
            server=server,
            served_name=served_name,
            server_timeout=server_timeout,
            gate=thresholds,
        )
        plan = job.plan()
    _run(job, plan, as_json, quiet)


def _checked(context: typer.Context, files: Mapping[str, Path | None], gate: list[str] | None) -> "Gate":
    """The gate. PlanishError for what can be refused before libraries are imported."""
    asked = context.params
    text = None if asked["text"] == NO_TEXT else asked["text"]
    if text is None:
        refuse_idle(context, ("windows", "length", "stride", "bos"), "there is no text, --text is none. Leave it out, or name a text.")
    if not asked["tasks"]:
        refuse_idle(context, ("batch_size",), "it is for tasks, and none is given. Name some with --tasks, or leave it out.")
    if asked["server"] is None:
        refuse_idle(context, ("server_timeout",), "no server is asked. Add --server URL, or leave it out.")
    elif asked["against"] is None:
        refuse_idle(context, ("device", "dtype"), "the server computes, as it was started. Leave it out, or add --against MODEL, which planish runs.")
    check_models(asked["checkpoint"], asked["against"])
    check_source(text)
    check_outfiles(files, replace=asked["force"])
    return gate_of(gate)


def _run(job: "EvalJob", plan: "EvalPlan", as_json: bool, quiet: bool) -> None:
    """Measure, show the result, and end by its gate."""
    from ..common.schemas import plain
    from ..walk.callbacks import Silent
    from .tables import evaluation_tables

    with nullcontext(Silent()) if quiet else showing(err_console()) as progress:
        found = job.run(plan, progress)
    if as_json:
        print(json.dumps(plain(found), allow_nan=False))
    else:
        out_console().print(*evaluation_tables(found), sep="\n")
    end_by(found.gate)


def _settings(text: str, windows: int, length: int, stride: int | None, bos: Beginning) -> "TextSettings":
    from ..eval.scores.text_score import TextSettings

    return TextSettings(source=text, windows=windows, length=length, stride=stride, bos=bos.value)
