"""A compression's report as a page, and as a short Markdown table for a pull request."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ..calib.blocks.sites import by_kind, kind_of
from ..common.units import change, counted, duration, perplexity, size
from ..common.yamltext import dump_yaml
from ..eval.pages.markdown import escaped, points, rows_table
from ..eval.pages.outlier_view import number, ranges
from ..eval.pages.page import Card, Code, Column, Links, Page, Part, Picture, Table, Words, render, section
from ..eval.pages.scatter import NARROW, Panel, Point, scatter
from ..eval.scores.gate import Judgement
from ..walk.records import SiteRecord
from .report import CompressReport, EvaluationReport

HEADINGS = ("", "base", "compressed", "ratio")
ERROR = "relative error of the outputs"


def compress_page(report: CompressReport, links: Mapping[str, str]) -> str:
    """The page as one HTML document, which needs no plotting library. links: other pages beside it -> what they are."""
    plan = report.plan
    sections = (
        section("notes", "To know", [Words(lines=plan.notes, points=True) if plan.notes else None]),
        section("quality", "Before and after", [_before_and_after(report)]),
        section("gate", "Gate", [Words(lines=gate_lines(report.gate), points=True) if report.gate else None]),
        section("errors", "Errors along depth", _pictures(report)),
        section("choices", "Choices at every site", [_choices(report)]),
        section("formats", "Formats", [_formats(report)]),
        section("recipe", "Recipe", [Code(caption="With every setting. SHA-256 " + report.recipe_sha256, text=dump_yaml(plan.recipe))]),
        section("method", "How it was made", [_made(report)]),
        section("links", "See also", [Links(to=links) if links else None]),
    )
    return render(
        Page(
            title=compress_title(report),
            subtitle=f"{plan.family}, {plan.blocks} blocks, {plan.arithmetic.dtype} on {plan.arithmetic.device}; {report.finished}.",
            cards=tuple(_cards(report)),
            sections=tuple(each for each in sections if each.parts),
            about=f"compress: {compress_title(report)}",
        )
    )


def markdown(report: CompressReport) -> str:
    """A heading and a short table: base, compressed, ratio."""
    about = (
        f"{duration(report.seconds)}, {_peak(report)} of memory; runs in {', '.join(report.plan.servers)}; "
        f"{report.plan.arithmetic.dtype} on {report.plan.arithmetic.device}, planish {report.planish}."
    )
    gate = "" if report.gate is None else "\n" + points(gate_lines(report.gate))
    heading, notes = f"### {escaped(_recipe(report))} on {escaped(report.model)}", points(report.plan.notes)
    return f"{heading}\n\n{rows_table(HEADINGS, _rows(report))}\n{escaped(about)}\n{gate}{chr(10) if notes else ''}{notes}"


def gate_lines(gate: Judgement) -> tuple[str, ...]:
    """Every threshold with what was measured."""
    return tuple(f"{'met' if one.met else 'MISSED'}: {one.words()}" for one in gate.held)


def compress_title(report: CompressReport) -> str:
    """The checkpoint, the recipe and the model."""
    return f"{Path(report.checkpoint).name}: {_recipe(report)} on {report.model}"


def _recipe(report: CompressReport) -> str:
    return str(report.plan.recipe["name"])


def _rows(report: CompressReport) -> Iterator[tuple[str, str, str, str]]:
    """What, before, after, and after by before."""
    before, after = report.bytes.before, report.bytes.after
    yield "size", size(before), size(after), f"{after / before:.2f}"
    yield "bits per quantized weight", "", f"{report.bits_per_weight:.2f}", ""
    if found := report.evaluation:
        base, quantized = found.base.perplexity, found.quantized.perplexity
        yield "perplexity", perplexity(base), perplexity(quantized), f"{quantized / base:.3f}"
        yield "KL divergence, nats per token", "", f"{found.kl:.4f}", ""
        yield "same likeliest token", "", f"{found.agreement:.1%}", ""
    if report.gate is not None:
        yield "gate", "", "met" if report.gate.met else "MISSED", ""


def _cards(report: CompressReport) -> Iterator[Card]:
    before, after = report.bytes.before, report.bytes.after
    yield Card(label="Size", value=size(after), note=f"{after / before:.0%} of {size(before)}", target="quality")
    yield Card(label="Bits per weight", value=f"{report.bits_per_weight:.2f}", note="quantized ones, scales included", target="formats")
    if found := report.evaluation:
        base, quantized = found.base.perplexity, found.quantized.perplexity
        yield Card(label="Perplexity", value=perplexity(quantized), note=f"{change(quantized / base - 1)} from {perplexity(base)}", target="quality")
        yield Card(label="KL divergence", value=f"{found.kl:.4f}", note=f"nats per token; {found.agreement:.1%} same token", target="quality")
    if report.gate is not None:
        yield Card(label="Gate", value="met" if report.gate.met else "missed", note=counted(len(report.gate.held), "threshold"), target="gate")
    yield Card(label="Time", value=duration(report.seconds), note=counted(report.machine.threads, "thread"), target="method")
    gpu = report.device_peak_bytes
    note = "at its highest" if gpu is None else f"at its highest; {size(gpu)} on the GPU"
    yield Card(label="Memory", value=size(report.peak_bytes), note=note, target="method")
    servers = [server for server in report.plan.servers if server != "planish"]
    yield Card(label="Runs in", value="planish" if not servers else f"{len(servers)} others", note=", ".join(servers) or "nothing else")


def _before_and_after(report: CompressReport) -> Table:
    columns = tuple(Column(heading=heading, numeric=i > 0) for i, heading in enumerate(HEADINGS))
    rows = tuple(tuple(cell or None for cell in row) for row in _rows(report))
    return Table(caption=_text(report.evaluation), columns=columns, rows=rows)


def _text(found: EvaluationReport | None) -> str:
    if found is None:
        return "Quality was not measured. `planish verify` does, with --against"
    return f"{found.windows} x {found.length} tokens of {found.source}, in {found.dtype}"


def _pictures(report: CompressReport) -> Iterator[Part]:
    """The error of every site and of every block's output, where there are any."""
    names = list(by_kind(chain.from_iterable(block.sites for block in report.blocks)))
    sites = tuple(
        Point(
            label=f"block {block.index}",
            x=block.index,
            values=tuple(max((_known(site.error) for name, site in block.sites.items() if kind_of(name) == kind), default=0.0) for kind in names),
        )
        for block in report.blocks
    )
    blocks = tuple(Point(label=f"block {block.index}", x=block.index, values=(_known(block.error),)) for block in report.blocks)
    every = {f"{ERROR}, by site": (names, sites), f"{ERROR}, so far": (["block"], blocks)}
    drawn = tuple(
        scatter(words, words, series, [Panel(x="block", points=points, joined=True, width=NARROW)], heading=False)
        for words, (series, points) in every.items()
        if any(value > 0 for point in points for value in point.values)
    )
    if drawn:
        yield Picture(
            caption="By site (the worst of a mixture's experts): of the layers that read it, on the inputs that really arrive there. So far: of the "
            "hidden states after the block against full precision, all blocks before it quantized too. Sink tokens are left out.",
            svgs=drawn,
        )


def _peak(report: CompressReport) -> str:
    gpu = report.device_peak_bytes
    return size(report.peak_bytes) if gpu is None else f"{size(report.peak_bytes)} and on the GPU {size(gpu)}"


def _known(value: float | None) -> float:
    """Nothing is drawn of 0."""
    return 0.0 if value is None else value


Cell = Callable[[SiteRecord], object]
_CHOICES: Mapping[str, tuple[Cell, bool, str]] = {
    "error": (lambda site: site.error, True, "of the readers' outputs, relative"),
    "smoothing": (lambda site: site.strength, True, "SmoothQuant's strength"),
    "exponent": (lambda site: site.exponent, True, "of the scale by root mean squares"),
    "auto took": (lambda site: site.chosen, False, "the candidate with the smallest error on held-out text, or a cheaper one about as good"),
    "transform": (lambda site: _chain(site.chain), False, "what the input goes through at run time"),
    "clip": (lambda site: None if site.clip == 1 else site.clip, True, "of dynamic activations, 1 being their largest"),
    "settings": (lambda site: ", ".join(f"{name} {value:g}" for name, value in site.settings.items()), False, "of the solver, by held-out text"),
    "damping": (lambda site: site.damping or None, True, "of the Hessian, as a share of its mean diagonal"),
    "repairs": (lambda site: site.repairs or None, True, "how often the Hessian needed more damping"),
    "kept channels": (lambda site: site.kept or None, True, "in more bits beside the codes"),
    "low rank": (lambda site: max(site.ranks.values(), default=None), True, "of the path beside the codes"),
    "more bits": (lambda site: "yes" if site.raised else None, False, "its activations got more"),
    "note": (lambda site: site.note, False, ""),
}


def _choices(report: CompressReport) -> Table:
    """A row for every site; only columns in which something stands."""
    found = [(f"{block.index}.{name}", site) for block in report.blocks for name, site in block.sites.items()]
    shown = {heading: how for heading, how in _CHOICES.items() if any(how[0](site) not in (None, "") for _, site in found)}
    columns = (
        Column(heading="input of"),
        *(
            Column(heading=heading, numeric=numeric, note=note, show=number if numeric else str, long=heading == "note")
            for heading, (_, numeric, note) in shown.items()
        ),
    )
    rows = tuple((name, *(_cell(cell(site)) for cell, _, _ in shown.values())) for name, site in found)
    return Table(caption="Every site; click a heading to sort", columns=columns, rows=rows)


def _cell(value: object) -> object:
    """Empty texts are shown as what is missing."""
    return None if value == "" else value


def _chain(factors: list[dict[str, Any]]) -> str:
    """The kinds of what is stored, with the width of blocks."""
    return ", ".join(f"{factor['kind']} {factor['block']}" if "block" in factor else str(factor["kind"]) for factor in factors)


def _formats(report: CompressReport) -> Table:
    columns = tuple(Column(heading=heading) for heading in ("input of", "blocks", "weights", "activations", "stored as"))
    rows = tuple(
        (name, ranges(how.blocks), how.weights or "full precision", how.activations or "full precision", how.layout)
        for name, by in report.plan.sites.items()
        for how in by
    )
    return Table(caption="How each site is stored", columns=columns, rows=rows)


def _made(report: CompressReport) -> Table:
    plan, machine = report.plan, report.machine
    versions = ", ".join(f"{name} {number}" for name, number in {"planish": report.planish, **machine.versions}.items())
    rows = [
        ("checkpoint", report.checkpoint),
        ("manifest", "planish/manifest.json in it: versions, digests, seed, and every block's errors"),
        ("model", f"{report.model}, SHA-256 {report.model_sha256}"),
        ("time", f"{duration(report.seconds)}; {duration(plan.seconds)} were estimated"),
        ("memory", f"{_peak(report)}; {size(plan.memory['total'])} were estimated"),
        ("hidden states", "on disk" if plan.offload else "in memory"),
        *([("prefix", "tokens " + ", ".join(map(str, plan.prefix)))] if plan.prefix else []),
        *([("measured in", duration(report.evaluation.seconds))] if report.evaluation else []),
        ("runs in", ", ".join(plan.servers)),
        ("equivalence", _equivalence(report)),
        ("machine", f"{machine.platform}, {machine.cpus} CPUs, {machine.threads} threads"),
        ("versions", versions),
    ]
    return Table(caption="The run", columns=(Column(heading="what"), Column(heading="value", long=True)), rows=tuple(rows))


def _equivalence(report: CompressReport) -> str:
    """Of the transformed, unquantized blocks."""
    worst = max((block.equivalence for block in report.blocks), default=0.0)
    return f"transformed blocks computed what they did before, to {worst:.1e}" if worst else "nothing was transformed"
