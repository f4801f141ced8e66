"""The command line. What needs torch is imported by the commands that need it, so that help and lists are quick."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Group

from .terminal import Front, Traceback, err_console, out_console

if TYPE_CHECKING:
    from .compress import Progress
    from .plan import Plan
    from .recipe import Recipe

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


class Dtype(str, Enum):
    """Arithmetic of the walk."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _complete_recipe(incomplete: str) -> list[str]:
    from .shipped import shipped_texts

    return [name for name in shipped_texts() if name.startswith(incomplete)]


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML or JSON file.", autocompletion=_complete_recipe)]
Model = Annotated[str, typer.Option("--model", metavar="MODEL", help="A local folder, a Hub name (org/name), a .gguf file, or demo:smollm2.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe, such as calibration.samples=64. May be given repeatedly.")
]
Device = Annotated[str | None, typer.Option(help="Where to compute, such as cpu or cuda:0. Default: cuda where there is one.")]
Arithmetic = Annotated[Dtype | None, typer.Option(help="Arithmetic of the walk. Default: bfloat16 where model and hardware have it.")]
Offload = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the activations on disk, in a new folder there. Default: if memory is short.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights too. Pickles can run code: only from a source you trust.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No plan and no progress.")]
Evaluate = Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Measure perplexity and divergence before and after, on built-in text.")]


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
    as_json: AsJson = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Compress a model: recipe and checkpoint in, a smaller checkpoint and a report of what it cost out.

    After an interruption the same command goes on at the block where it was.
    """
    with _progress(quiet) as progress:
        from .running import Job

        job = Job(_recipe(recipe, settings), model, out, device, _torch_dtype(dtype), offload_dir, allow_pickle, evaluate)
        _run(job, progress, as_json)


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
