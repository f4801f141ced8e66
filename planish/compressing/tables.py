"""Plans, results and verifications as people read them."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from ..calib.blocks.sites import by_kind, kind_of
from ..calib.compressed.packing import Packed
from ..common.fitting import Table
from ..common.units import duration, size
from ..eval.scores.check import Verification
from ..eval.scores.gate import Judgement
from ..planning.estimate import Memory
from ..planning.preflight import Plan
from .compression import Result
from .report import CompressReport
from .reporting import Evaluation, described, schemes

MARKS = {True: Text("ok", style="green"), False: Text("FAILED", style="bold red"), None: Text("–", style="dim")}


def _pairs(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Two columns: what, and its value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(f"  {key}", Text(value))
    return table


def plan_table(plan: Plan, model: str, *, evaluate: bool = True) -> RenderableType:
    """What a run would do and take. evaluate: the result is measured afterwards."""
    blocks = plan.topology.block_count
    where = f"on disk ({plan.offload_dir})" if plan.offload_dir else "on disk" if plan.offload else "in memory"
    rows = [
        ("model", f"{model}: {plan.topology.family}, {blocks} blocks, {size(plan.checkpoint.nbytes)} in {_short(plan.checkpoint.dtype)}"),
        ("recipe", f"{plan.recipe.name}: {plan.recipe.description}".rstrip(": ")),
        *((", ".join(_named(names, plan)), what) for what, names in _sites(plan).items()),
        ("checkpoint", f"about {size(plan.out_bytes)}, {plan.bits_per_weight:.2f} bits per quantized weight"),
        ("memory", f"about {_memory(plan.memory, plan)} at most, activations {where}; {_otherwise(plan)}"),
        ("disk", f"about {size(plan.disk)} while it runs"),
        ("time", f"about {duration(plan.seconds)} in {_short(plan.dtype)} on {plan.device}{_evaluating(plan) if evaluate else ''}"),
        ("runs in", ", ".join(plan.servers)),
        *((("gate", plan.recipe.gate.words()),) if plan.recipe.gate else ()),
        *(("note", note) for note in plan.notes),
    ]
    return _pairs(rows)


def _evaluating(plan: Plan) -> str:
    """The time that comes on top."""
    return f", then about {duration(plan.seconds_evaluating)} to evaluate the result (--no-evaluate leaves that out)"


def _otherwise(plan: Plan) -> str:
    """The memory besides the compression's."""
    written = "" if plan.writing is None else f"; {_memory(plan.writing, plan)} while the model writes its text, which is kept"
    return f"{_memory(plan.evaluation, plan)} while evaluating{written}"


def _memory(memory: Memory, plan: Plan) -> str:
    """On a GPU lies all but the program."""
    if plan.device.type == "cpu":
        return size(memory.total)
    return f"{size(memory.program)} and {size(memory.total - memory.program)} on {plan.device}"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _sites(plan: Plan) -> dict[str, list[str]]:
    """Site names by what becomes of them."""
    rows: dict[str, list[str]] = {}
    for name, by_scheme in schemes(plan).items():
        words = "; ".join(_scheme(how, blocks, len(by_scheme) > 1) for how, blocks in by_scheme.items())
        rows.setdefault(words, []).append(name)
    return rows


def _named(names: Sequence[str], plan: Plan) -> list[str]:
    """The sites in few words: experts are counted."""
    every = by_kind(plan.topology.site_names)
    words = []
    for kind, some in by_kind(names).items():
        count = len(every[kind])
        words.append(some[0] if count == 1 else f"{kind} of {count} experts" if len(some) == count else f"{kind} of {len(some)} of {count} experts")
    return words


def _scheme(how: Packed | None, blocks: list[int], mixed: bool) -> str:
    words = described(how)
    formats = "full precision" if how is None else f"weights {words['weights']}"
    formats += f"; activations {words['activations']}" if words["activations"] else ""
    return f"{formats} (blocks {_ranges(blocks)})" if mixed else formats


def _ranges(numbers: list[int]) -> str:
    """0-3, 7, 9-11."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def result_table(
    result: Result, evaluation: Evaluation | None, report: CompressReport, files: Iterable[Path]
) -> tuple[RenderableType, RenderableType]:
    """What the compression did to the model, and what it took."""
    before, after = result.plan.checkpoint.nbytes, result.stored_bytes
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for heading in ("", "before", "after", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("  size", size(before), size(after), Text(f"{after / before - 1:+.1%}", style="dim"))
    table.add_row("  bits per quantized weight", str(8 * result.plan.checkpoint.dtype.itemsize), f"{result.bits_per_weight:.2f}", "")
    if evaluation is not None:
        base, quantized = evaluation.comparison.base.perplexity, evaluation.comparison.quantized.perplexity
        table.add_row("  perplexity", _perplexity(base), _perplexity(quantized), Text(f"{quantized / base - 1:+.2%}", style="dim"))
        table.add_row("  KL divergence per token", "", f"{evaluation.comparison.kl:.4f}", "")
        table.add_row("  same likeliest token", "", f"{evaluation.comparison.agreement:.1%}", "")
    took = f"{duration(result.seconds)}, peak memory {size(report.peak_bytes)}"
    took += "" if report.device_peak_bytes is None else f", on {result.plan.device} {size(report.device_peak_bytes)}"
    rows = [("compressed in", took), *_choices(result)]
    if evaluation is not None:
        text = f"{duration(evaluation.seconds)}, on {evaluation.words}, float32"
        rows.append(("evaluated in", text))
        if math.isnan(evaluation.comparison.quantized.nll):
            rows.append(("broken", f"its logits are no numbers (NaN): planish verify {result.out} says which tensors are broken"))
    if report.gate is not None:
        rows += gate_rows(report.gate)
    return table, _pairs([*rows, ("checkpoint", str(result.out)), *(("report", str(file)) for file in files)])


def _perplexity(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.3f}"


def gate_rows(judgement: Judgement) -> list[tuple[str, str]]:
    """Every threshold with what was measured."""
    return [("gate" if not i else "", f"{'met' if one.met else 'MISSED'}: {one.words()}") for i, one in enumerate(judgement.held)]


def _choices(result: Result) -> list[tuple[str, str]]:
    """What auto and raise_activations decided, over all blocks."""
    chosen = Counter((kind_of(name), site.chosen) for block in result.blocks for name, site in block.sites.items() if site.chosen is not None)
    by_site: dict[str, list[str]] = {}
    for (name, what), times in chosen.most_common():
        by_site.setdefault(name, []).append(f"{what} ({times})")
    raised = [f"{block.index}.{name}" for block in result.blocks for name, site in block.sites.items() if site.raised]
    rows = [(f"auto at {name}", ", ".join(words)) for name, words in by_site.items()]
    return [*rows, ("raised activations", ", ".join(raised))] if raised else rows


def verification_table(verification: Verification) -> RenderableType:
    """Every check with its outcome."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in verification.checks:
        table.add_row(f"  {check.name}", MARKS[check.ok], Text(check.message))
    return table
