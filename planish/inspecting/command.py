"""`planish inspect`: what is wrong with a model before it is quantized."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..calib.data.documents import check_source
from ..calib.files.given import check_model
from ..common.outfile import check_outfiles
from ..terminal.console import Traceback, err_console, out_console
from ..terminal.options import Arithmetic, AsJson, Device, Offload, Pickle, Quiet, starting, torch_dtype
from ..terminal.progress import showing, stages


def _print_schema(value: bool) -> None:
    if value:
        from .report_json import schema

        print(json.dumps(schema(), indent=2))
        raise typer.Exit


Subject = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder, compressed or not, a Hub name (org/name), a .gguf file, or demo:NAME.")
]
Text = Annotated[str | None, typer.Option("--text", metavar="FILE", help="A .txt, .jsonl or .parquet file, hub:NAME or builtin. Default: builtin.")]
Images = Annotated[str | None, typer.Option("--images", metavar="DIR", help="For vision models: a folder, or generated. Default: generated.")]
Against = Annotated[
    str | None, typer.Option("--against", metavar="MODEL", help="Show side by side with this model, or with what inspect --json said of it (.json).")
]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page with pictures. Needs plotly.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write findings and worst sites there, as Markdown.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="Write the recommended recipe there, as YAML.")]
Bits = Annotated[str, typer.Option("--bits", metavar="SCHEME", help="Bits of the recommended recipe: w8a8, w4a8, w4a16 or w4a4.")]
Limits = Annotated[
    list[str] | None, typer.Option("--threshold", metavar="NAME=VALUE", help="Change a criterion, such as massive_ratio=500. Repeatable.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the files of --html, --markdown and --recipe if they exist.")]
Schema = Annotated[bool, typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of what --json prints.")]


def inspect(
    model: Subject,
    text: Text = None,
    images: Images = None,
    samples: Annotated[int, typer.Option(min=1, help="How many windows of text, or images.")] = 32,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of each window of text, at most. Default: 512.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of windows or images.")] = 0,
    against: Against = None,
    html: Html = None,
    markdown: MarkdownFile = None,
    recipe: RecipeFile = None,
    bits: Bits = "w8a8",
    thresholds: Limits = None,
    force: Force = False,
    device: Device = None,
    dtype: Arithmetic = None,
    offload_dir: Offload = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    schema: Schema = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Find a model's outliers, say what they are worth and which layers they make hard to quantize, and recommend a recipe.

    Nothing is changed. A minute or two for a small model.
    """
    _check(model, text, {"--html": html, "--markdown": markdown, "--recipe": recipe}, force)
    with starting():
        from ..walk.callbacks import Silent
        from .job import InspectJob
        from .report_json import to_dict
        from .tables import inspect_tables

        job = InspectJob(
            model=model,
            source=text,
            images=images,
            samples=samples,
            length=length,
            seed=seed,
            against=against,
            html=html,
            markdown=markdown,
            recipe=recipe,
            bits=bits,
            thresholds=tuple(thresholds or ()),
            force=force,
            device=device,
            dtype=torch_dtype(dtype),
            offload_dir=offload_dir,
            allow_pickle=allow_pickle,
        )
        base = job.check()
    with nullcontext(Silent()) if quiet else showing(err_console()) as progress:
        found, base = job.run(base, stages(progress))
    if as_json:
        print(json.dumps(to_dict(found), allow_nan=False))
    else:
        out_console().print(*inspect_tables(found, base, job.files), sep="\n")


def _check(model: str, text: str | None, files: Mapping[str, Path | None], force: bool) -> None:
    """PlanishError for what can be refused before libraries are imported."""
    check_model(model)
    check_source(text)
    check_outfiles(files, replace=force)
