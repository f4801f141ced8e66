"""What every command does at the terminal: one message for an error, a clean stop, and silence from everybody else."""

import errno
import logging
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from typer.core import TyperGroup

from ..common.interruption import interruptible
from ..quant.errors import PlanishError

if TYPE_CHECKING:
    from ..eval.scores.gate import Judgement

USER_ERROR = 2
MISSED = 3  # a gate
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
RESUMING = ("compress", "demo", "compare", "sweep")
"""The commands that compress, and go on where they were."""
_TRACEBACK = "planish.traceback"


def out_console() -> Console:
    """For results: standard output."""
    return Console(highlight=False)


def err_console() -> Console:
    """For progress and messages: standard error."""
    return Console(stderr=True, highlight=False)


def _remember(context: typer.Context, value: bool) -> bool:
    context.meta[_TRACEBACK] = value or context.meta.get(_TRACEBACK, False)
    return value


Traceback = Annotated[bool, typer.Option("--traceback", callback=_remember, help="Show where in the program an error arose.")]
"""An option of the program and of every command. What it is set to is kept in the context, not used by the command."""


class Front(TyperGroup):
    """The program: turns errors that a user can act on into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Exit codes: 2 for a user's error, 130 when interrupted."""
        try:
            with interruptible():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _end(ctx, error, str(error) or "Stopped.", INTERRUPTED) from None
        except PlanishError as error:
            raise _end(ctx, error, str(error), USER_ERROR) from None
        except (RuntimeError, MemoryError) as error:
            message = memory_message(error)
            if message is None:
                raise
            raise _end(ctx, error, message, USER_ERROR) from None
        except (OSError, SafetensorError) as error:
            message = system_message(error, resumes=ctx.invoked_subcommand in RESUMING)
            if message is None:
                raise
            raise _end(ctx, error, message, USER_ERROR) from None


def _end(ctx: Any, error: BaseException, message: str, code: int) -> typer.Exit:
    if ctx.meta.get(_TRACEBACK):
        traceback.print_exception(error)
    label = Text("Error: ", style="bold red") if code == USER_ERROR else Text()
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())  # libraries' messages inside ours may have several lines
    err_console().print(label + Text(line), soft_wrap=True)
    return typer.Exit(code)


def end_by(judgement: "Judgement | None", more: str = "") -> None:
    """Say so and exit with 3 if a gate is missed. more: what else to say then."""
    if judgement is not None and not judgement.met:
        err_console().print(Text(f"{judgement.sentence()} {more}".strip()), soft_wrap=True)
        raise typer.Exit(MISSED)


def system_message(error: OSError | SafetensorError, *, resumes: bool = True) -> str | None:
    """What the operating system refused, and about which file; None for what is no matter of the user's. resumes: whether a repeated command
    goes on where it was."""
    full = "the disk is full. Free some room and repeat the command" + ("; a compression goes on at the block where it was." if resumes else ".")
    if isinstance(error, SafetensorError):  # that library has one class for everything
        return f"{full[0].upper()}{full[1:]}" if "os error 28" in str(error) else None
    if error.errno is None or error.errno == errno.EPIPE:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return where + (full if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{error.strerror}.")


def memory_message(error: RuntimeError | MemoryError) -> str | None:
    """What did not fit, and what to do about it; None for what is no want of memory. (torch has a class for a GPU's, and none for the CPU's.)"""
    what = str(error).strip().split(". GPU ")[0].split("\n")[0]
    said = any(mark in what for mark in ("can't allocate memory", "STATUS_ALLOC_FAILED"))
    if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and not said:
        return None
    what = what.partition("DefaultCPUAllocator: ")[2] or what or "out of memory"
    return (
        f"{what.rstrip('.')}. Take less at once (--set calibration.batch_size=1), keep activations on disk (--offload-dir), "
        "or take another --device; a compression that is repeated goes on at the block where it was."
    )


def hush() -> None:
    """Nothing on the terminal but what planish writes. Imports transformers; the Hub's download bars stay, for a download can be long."""
    from loguru import logger
    from transformers.utils import logging as transformers_logging

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())
    logger.disable("compressed_tensors")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
