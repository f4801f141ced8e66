"""`planish search`: which weight format each site gets within a budget."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..calib.files.given import check_model
from ..common.outfile import check_outfile
from ..recipe.shipped import check_recipe
from ..terminal.console import Traceback, err_console, out_console
from ..terminal.options import AsJson, Device, Dtype, Model, Offload, Pickle, Quiet, Settings, complete_recipe, starting, torch_dtype
from ..terminal.progress import showing
from .budget import Budget

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or a YAML or JSON file.", autocompletion=complete_recipe)]
Limit = Annotated[
    str,
    typer.Option(
        "--budget", metavar="SIZE", help="4.5bpw: bits per weight, scales included; 80MB: the whole checkpoint; 2x or 60tok/s: speed of writing."
    ),
]
Bandwidth = Annotated[str | None, typer.Option("--bandwidth", metavar="RATE", help="For 60tok/s: what the memory gives there, such as 50GB/s.")]
Candidates = Annotated[
    str | None, typer.Option("--candidates", metavar="LIST", help="Weight formats to choose from, such as 4,4-g64,4-g32-asym,8,keep.")
]
ForServer = Annotated[str, typer.Option("--target", metavar="NAME", help="Who is to run the checkpoint: vllm, transformers or planish.")]
Numbers = Annotated[Dtype | None, typer.Option("--dtype", help="Arithmetic of the search. Default: float32.")]
Every = Annotated[bool, typer.Option("--every", help="Measure every candidate's divergence, not one a site: slower, a little more exact.")]


def search(
    recipe: RecipeName,
    model: Model,
    budget: Limit,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The recipe to write, for planish compress.")],
    bandwidth: Bandwidth = None,
    candidates: Candidates = None,
    target: ForServer = "vllm",
    every: Every = False,
    tokens: Annotated[int, typer.Option(min=2, help="Of the calibration text, that divergence is measured on.")] = 512,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    settings: Settings = None,
    device: Device = None,
    dtype: Numbers = None,
    offload_dir: Offload = None,
    allow_pickle: Pickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    traceback: Traceback = False,
) -> None:
    """Choose the weight format of every site, so that the model loses least within a budget, and write that as a recipe.

    What each format costs at each site alone is measured; an integer program chooses. Readers of one input, such as q, k and v, get the same.
    """
    check_recipe(recipe)
    check_model(model)
    Budget.of(budget, bandwidth)
    check_outfile(out, replace=force)
    with starting():
        from ..recipe.schema import load_recipe, to_yaml, with_settings

        loaded = with_settings(load_recipe(recipe), settings or [])

        from ..common.files import write_text
        from ..common.schemas import plain
        from ..walk.callbacks import Silent
        from .search import search as run
        from .tables import search_tables
    with nullcontext(Silent()) if quiet else showing(err_console()) as progress:
        found = run(
            loaded,
            model,
            budget,
            bandwidth=bandwidth,
            candidates=None if candidates is None else [name.strip() for name in candidates.split(",") if name.strip()],
            target=target,  # type: ignore[arg-type]
            every=every,
            tokens=tokens,
            device=device,
            dtype=torch_dtype(dtype),
            offload_dir=offload_dir,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    write_text(out, to_yaml(found.recipe))
    if as_json:
        print(json.dumps(plain(found), allow_nan=False))
    else:
        out_console().print(*search_tables(found, out), sep="\n")
