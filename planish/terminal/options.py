"""Options that several commands have, and what every command does before it works."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..quant.errors import PlanishError
from .console import err_console, hush

if TYPE_CHECKING:
    import torch

    from ..eval.scores.gate import Gate


class Dtype(str, Enum):
    """Arithmetic of the walk."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[str, typer.Option("--model", metavar="MODEL", help="A local folder, a Hub name (org/name), a .gguf file, or demo:smollm2.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe, such as calibration.samples=64. May be given repeatedly.")
]
Device = Annotated[str | None, typer.Option(help="Where to compute, such as cpu or cuda:0. Default: cuda where there is one.")]
Arithmetic = Annotated[Dtype | None, typer.Option(help="Arithmetic of the walk. Default: bfloat16 where model and hardware have it.")]
Offload = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the activations on disk, there. Default: only if memory is short.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights too: their tensors alone, no code in them is run.")]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate", metavar="METRIC=THRESHOLD", help="Exit with 3 if it is missed: perplexity_ratio=1.05, kl=0.1, recovery=98. May be given repeatedly."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No plan and no progress.")]


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes that begin so, for the shell."""
    from ..recipe.shipped import shipped_texts

    return [name for name in shipped_texts() if name.startswith(incomplete)]


def gate_of(settings: list[str] | None) -> "Gate":
    """The gate of such options. What takes seconds to import is imported only where a recipe is named."""
    with err_console().status("starting"):
        from ..recipe.thresholds import read_gate

        return read_gate(settings or ())


def refuse_idle(context: typer.Context, names: Iterable[str], why: str) -> None:
    """PlanishError for an option on the command line of which nothing would come. names: of the command's parameters; why, and what to do."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise PlanishError(f"--{name.replace('_', '-')}: {why}")


@contextmanager
def starting() -> Iterator[None]:
    """Libraries are imported and the job is looked at: some seconds in which the terminal shows that something happens."""
    with err_console().status("starting"):
        hush()
        yield


def torch_dtype(dtype: Dtype | None) -> "torch.dtype | None":
    """torch's name for it."""
    import torch

    return None if dtype is None else {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}[dtype]
