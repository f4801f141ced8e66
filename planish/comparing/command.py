"""`planish compare`: several recipes on one model, in one table."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..calib.data.documents import check_source
from ..calib.files.given import check_model
from ..common.outfile import check_comparison
from ..common.texts import named_texts
from ..recipe.shipped import check_recipes
from ..terminal.console import Traceback, err_console, out_console
from ..terminal.options import Arithmetic, AsJson, Device, Model, Offload, Pickle, Quiet, Settings, complete_recipe, starting, torch_dtype
from ..terminal.progress import showing

if TYPE_CHECKING:
    from ..recipe.schema import Recipe


def _print_schema(value: bool) -> None:
    if value:
        from ..common.schemas import schema_of
        from .report import ComparisonReport

        print(json.dumps(schema_of(ComparisonReport, "planish compare"), indent=2))
        raise typer.Exit


Recipes = Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Shipped recipes, or YAML or JSON files.", autocompletion=complete_recipe)]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text", metavar="NAME=FILE", help="A text to measure on besides the built-in one: .txt, .jsonl, .parquet or hub:NAME. Repeatable."
    ),
]
Vary = Annotated[
    list[str] | None,
    typer.Option("--vary", metavar="PATH=V1,V2", help="Every recipe with each value, such as calibration.samples=8,32. Repeatable: a grid."),
]
Schema = Annotated[bool, typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of the JSON and exit.")]


def compare(
    recipes: Recipes,
    model: Model,
    text: Texts = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The comparison's folder, new or of this comparison.")] = Path("comparison"),
    windows: Annotated[int, typer.Option(min=1, help="How many windows of each text, at most.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each, at most.")] = 2048,
    settings: Settings = None,
    vary: Vary = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Recipes at once, among which the cores are shared out, as memory allows.")] = 1,
    within: Annotated[float, typer.Option(min=0, help="Rise of perplexity, in percent, up to which a recipe is picked as smallest.")] = 5.0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the compressed checkpoints, in DIR/checkpoints.")] = False,
    device: Device = None,
    dtype: Arithmetic = None,
    offload_dir: Offload = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    schema: Schema = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Compress one model with several recipes or settings, and put them in one table: quality on texts, bits, time, memory, servers; and say which to
    take for what. `planish sweep` is another name for it.

    It is also written as a page, Markdown, JSON and a picture. After an interruption the same command goes on where it was; recipes may be added.
    """
    texts = _checked(recipes, model, text or (), out)
    loaded = _named(recipes, settings or (), vary or ())
    with starting():
        from ..common.schemas import plain
        from ..walk.callbacks import Silent
        from .job import CompareJob
        from .tables import comparison_plan_tables, comparison_tables

        job = CompareJob(
            recipes=loaded,
            model=model,
            out=out,
            texts=texts,
            windows=windows,
            length=length,
            jobs=jobs,
            within=within / 100,
            keep=keep,
            device=device,
            dtype=torch_dtype(dtype),
            offload_dir=offload_dir,
            allow_pickle=allow_pickle,
        )
        plan = job.plan()
    if not quiet:
        err_console().print(*comparison_plan_tables(plan, model, job.pending(plan)), "", sep="\n")
    with nullcontext(Silent()) if quiet else showing(err_console()) as progress:
        report = job.run(plan, progress)
    if as_json:
        print(json.dumps(plain(report), allow_nan=False))
    else:
        out_console().print(*comparison_tables(report, job.folder.files), sep="\n")


def _checked(recipes: Sequence[str], model: str, texts: Sequence[str], out: Path) -> Mapping[str, str]:
    """The texts by name. PlanishError for what can be refused before libraries are imported."""
    check_recipes(*recipes)
    check_model(model)
    check_comparison(out)
    named = named_texts(texts)
    for source in named.values():
        check_source(source)
    return named


def _named(recipes: Sequence[str], settings: Sequence[str], vary: Sequence[str]) -> "Mapping[str, Recipe]":
    """The recipes by name, read before what works with them is imported."""
    with starting():
        from ..recipe.variants import named_recipes

        return named_recipes(recipes, settings, vary)
