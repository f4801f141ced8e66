"""`planish layers`: a compressed checkpoint site by site."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..calib.data.documents import check_source
from ..calib.files.given import check_checkpoint, check_model
from ..common.outfile import check_outfile
from ..terminal.console import Traceback, err_console, out_console
from ..terminal.options import AsJson, Device, Pickle, Quiet, refuse_idle, starting
from ..terminal.progress import showing

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The folder of a compressed checkpoint.")]
Against = Annotated[str, typer.Option("--against", metavar="MODEL", help="The model that was compressed.")]
Inputs = Annotated[
    str, typer.Option("--inputs", metavar="WHOSE", help="Measure errors on the inputs of base: the original; or quantized: as it runs.")
]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as one HTML page with pictures. Needs plotly.")]


def layers(
    context: typer.Context,
    checkpoint: Checkpoint,
    against: Against,
    text: Annotated[str, typer.Option(metavar="FILE", help="Text to measure on: a .txt, .jsonl or .parquet file, hub:NAME, or builtin.")] = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="How many windows of it, at most.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each, at most.")] = 512,
    inputs: Inputs = "base",
    sites: Annotated[int, typer.Option(min=0, help="Measure the effect on the whole model of restoring so many sites.")] = 12,
    every: Annotated[bool, typer.Option("--all-sites", help="Measure that of all sites, whatever --sites says.")] = False,
    evenly: Annotated[bool, typer.Option("--evenly", help="Restore evenly spaced sites instead of those with the largest error.")] = False,
    html: Html = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html if it exists.")] = False,
    device: Device = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Show where a compressed checkpoint loses what it loses.

    Of each site: how far its readers' outputs are off, by weights and by activations; and what the model would gain if it alone stayed as it was.
    """
    if not sites and not every:
        refuse_idle(context, ("evenly",), "no site is restored, --sites is 0. Leave out one of them.")
    _check(checkpoint, against, text, html, force)
    with starting():
        from ..common.files import write_text
        from ..common.schemas import plain
        from ..eval.pages.layers_page import layers_page
        from ..eval.pages.pictures import plotly_script
        from ..walk.callbacks import Silent
        from .tables import layers_tables
        from .view import layers as run

        if html is not None:
            plotly_script()  # says so if it is not installed
    with nullcontext(Silent()) if quiet else showing(err_console()) as progress:
        found = run(
            checkpoint,
            against,
            text=text,
            windows=windows,
            length=length,
            inputs=inputs,  # type: ignore[arg-type]
            sites=None if every else sites,
            evenly=evenly,
            device=device,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if html is not None:
        write_text(html, layers_page(found))
    if as_json:
        print(json.dumps(plain(found), allow_nan=False))
    else:
        out_console().print(*layers_tables(found, html), sep="\n")


def _check(checkpoint: Path, against: str, text: str, html: Path | None, force: bool) -> None:
    """PlanishError for what can be refused before libraries are imported."""
    check_checkpoint(checkpoint)
    check_model(against)
    check_source(text)
    if html is not None:
        check_outfile(html, replace=force)
