"""One recipe of a comparison, in a process of its own, so that its peak memory is its own: compress, then measure. The other end: parent.py.

A line of JSON comes in, the task; lines of JSON go out: ["say", text], ["stage", name, steps], ["step", done, note], and last ["done", result] or
["error", message]. When the standard input is closed, this process stops as on Ctrl-C, with exit code 130: so it does when its parent is killed.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..calib.compressed.stored import open_stored
from ..calib.files.shards import read_json
from ..calib.machine.heap import trim
from ..calib.machine.workers import threads
from ..common.decode import decode
from ..common.files import write_text
from ..common.schemas import plain
from ..compressing.compression import carry_out
from ..compressing.export import bits_per_weight, stored_bytes
from ..compressing.reporting import peak_bytes
from ..eval.scores.reference import Reference, compare_with
from ..planning.preflight import make_plan
from ..quant.errors import PlanishError
from ..recipe.schema import Recipe
from ..terminal.console import INTERRUPTED, hush, memory_message, system_message
from ..terminal.options import Dtype, torch_dtype

IDS = "ids"  # the tensor in a file of calibration tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What to do. ids: file of calibration tokens. reference: file of eval.reference. out: the new checkpoint; where it exists, it is only measured.
    clock: file in which the time and memory taken are kept over interruptions. looks: folder that recipes which see the same share. threads: to
    compute with. The others: as of `planish.compress`."""

    recipe: Recipe
    model: str
    out: str
    ids: str | None
    reference: str
    clock: str
    looks: str | None
    device: str | None
    dtype: Literal["float32", "bfloat16"] | None
    offload_dir: str | None
    allow_pickle: bool
    threads: int


@dataclass(slots=True)
class Clock:
    """Seconds and peak bytes of a compression over all its runs; resumed: there was more than one. Kept in a file, and as progress told on."""

    file: Path
    tell: "Channel"
    before: float = 0.0
    peak: int = 0
    resumed: bool = False
    start: float = field(default_factory=time.monotonic)
    noted: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, file: Path, tell: "Channel") -> "Clock":
        """Go on from what an earlier run has left there, if one has."""
        if not file.is_file():
            return cls(file, tell)
        data: dict[str, Any] = dict(read_json(file))
        return cls(file, tell, data["seconds"], data["peak_bytes"], resumed=True)

    def note(self) -> dict[str, Any]:
        """Write down, and return, what has been taken so far."""
        self.noted = time.monotonic()
        seconds, peak = self.before + self.noted - self.start, max(self.peak, peak_bytes())
        data = {"seconds": seconds, "peak_bytes": peak, "resumed": self.resumed}
        write_text(self.file, json.dumps(data))
        return data

    def say(self, text: str) -> None:
        """Told on."""
        self.tell.say(text)

    def stage(self, name: str, steps: int) -> None:
        """Told on, after a look at the clock."""
        self.note()
        self.tell.stage(name, steps)

    def step(self, done: int, note: str = "") -> None:
        """Told on, with a look at the clock every second."""
        if time.monotonic() - self.noted > 1:
            self.note()
        self.tell.step(done, note)


@dataclass(frozen=True, slots=True)
class Channel:
    """Progress for the parent."""

    out: TextIO

    def send(self, *message: object) -> None:
        """A line."""
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def say(self, text: str) -> None:
        """Something that the user should know."""
        self.send("say", text)

    def stage(self, name: str, steps: int) -> None:
        """A stage of so many steps begins."""
        self.send("stage", name, steps)

    def step(self, done: int, note: str = "") -> None:
        """So many steps of the stage are done."""
        self.send("step", done, note)


def work(task: Task, channel: Channel) -> Mapping[str, Any]:
    """Compress, unless that is done, and measure. seconds, peak_bytes, resumed: of the compression; bytes: of all weights; texts: Comparisons."""
    plan = make_plan(
        task.recipe,
        task.model,
        device=task.device,
        dtype=torch_dtype(None if task.dtype is None else Dtype(task.dtype)),
        offload_dir=task.offload_dir,
        allow_pickle=task.allow_pickle,
        ids_NL=None if task.ids is None else load_file(task.ids)[IDS],
    )
    out, clock = Path(task.out), Path(task.clock)
    if out.exists():
        took = dict(read_json(clock))
    else:
        timed = Clock.read(clock, channel)
        carry_out(plan, out, timed, None if task.looks is None else Path(task.looks))
        took = timed.note()
    trim()
    stored = open_stored(out)
    channel.stage("measuring", plan.topology.block_count + 1)

    def step(done: int, _all: int) -> None:
        channel.step(done)
        trim()

    found = compare_with(Reference.load(Path(task.reference)), plan.checkpoint, stored, device=plan.device, report=step)
    sizes = {"bytes": stored_bytes(stored.tensors), "bits_per_weight": bits_per_weight(stored.packed, stored.tensors, plan.quantized)}
    return {**took, **sizes, "texts": [plain(comparison) for comparison in found]}


def main() -> None:
    """Do the task that comes in, and exit: 0, 2 after a user's error, 130 when stopped."""
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # what libraries print is not for the parent
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs ignore
    task = decode(Task, json.loads(sys.stdin.readline()), "task")
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        hush()
        with threads(task.threads):
            channel.send("done", work(task, channel))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (PlanishError, OSError, SafetensorError, RuntimeError, MemoryError) as error:
        if isinstance(error, PlanishError):
            message: str | None = str(error)
        else:
            message = memory_message(error) if isinstance(error, (RuntimeError, MemoryError)) else system_message(error)
        if message is None:
            raise
        channel.send("error", message)
        sys.exit(2)


def _stop_with_parent() -> None:
    """Wait for the end of the standard input, then interrupt. By its number: a thread inside sys.stdin would hold up the interpreter's end."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
