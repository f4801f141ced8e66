"""A comparison as Markdown, and its picture."""

from collections.abc import Sequence

from ..common.units import change, counted, duration, perplexity, size
from ..eval.pages.markdown import escaped, points, rows_table
from ..eval.pages.scatter import WIDTH, Panel, Point, scatter
from .pareto import other_servers
from .report import ComparisonReport, Quality, Row

QUALITY = "KL divergence from full precision, nats per token"


def quality_words(quality: Quality) -> str:
    """In progress lines."""
    return f"{perplexity(quality.perplexity)} ({change(quality.change)})"


def portable(row: Row) -> str:
    """Who else runs it, a line each."""
    others = other_servers(row)
    return "\n".join(others) if others else "nothing else"


def text_words(report: ComparisonReport) -> str:
    """What was measured on."""
    words = [f"{text.name}: {text.windows} x {text.length} tokens of {_source(text.source)}" for text in report.texts]
    return f"{'; '.join(words)}; in float32"


def _source(source: str) -> str:
    return "the built-in text" if source == "builtin" else source


def made_words(report: ComparisonReport) -> str:
    """How it was made. Where recipes ran beside each other, their times are longer for it."""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    beside = f"{report.jobs} recipes at once, " if report.jobs > 1 else ""
    where = f"{report.arithmetic} on {report.device}, {beside}{counted(report.threads, 'thread')} each, {report.platform}"
    return f"{report.family}, {report.blocks} blocks; {where}; {versions}; {report.finished}."


def all_notes(report: ComparisonReport) -> list[str]:
    """Of the comparison and of its recipes."""
    found = list(report.notes)
    for row in report.rows:
        found += [f"{row.recipe}: {note}" for note in row.notes]
        if row.resumed:
            found.append(f"{row.recipe}: was interrupted; in its time, what was done twice counts twice.")
    return found


def markdown(report: ComparisonReport) -> str:
    """The whole comparison: one table, notes, how it was made."""
    texts = [text.name for text in report.texts]
    heading = ["recipe"]
    for text in texts:
        heading += [f"{text}: perplexity", "change", "KL", "same token"]
    heading += ["bits", "size", "time", "peak memory", "runs in"]
    base = ["(full precision)"]
    for text in texts:
        base += [perplexity(report.base.perplexity[text]), "", "", ""]
    rows = [[*base, str(report.base.bits), size(report.base.bytes), "", "", ""], *(_row(row, texts, report.base.bytes) for row in report.rows)]
    table, notes = rows_table(heading, rows), points(all_notes(report))
    chosen = points(f"{pick.need}: {pick.words}" for pick in report.picks)
    return (
        f"# Recipes on {escaped(report.model)}\n\n{table}\n"
        f"{escaped(text_words(report))}. KL: mean divergence from full precision in nats per token. same token: share of tokens for which both "
        "find the same next one likeliest. bits: of a quantized weight as it is stored, scales included. time and peak memory: of compressing, in a "
        "process of its own.\n\n"
        f"{chosen}\n![KL divergence against size and time](comparison.svg)\n\n{notes}{chr(10) if notes else ''}{escaped(made_words(report))}\n"
    )


def _row(row: Row, texts: Sequence[str], before: int) -> list[str]:
    cells = [row.recipe]
    for text in texts:
        quality = row.quality[text]
        cells += [perplexity(quality.perplexity), change(quality.change), f"{quality.kl:.4f}", f"{quality.agreement:.1%}"]
    return [
        *cells,
        f"{row.bits_per_weight:.2f}",
        f"{size(row.bytes)} ({change(row.bytes / before - 1)})",
        duration(row.seconds),
        size(row.peak_bytes),
        ", ".join(row.servers),
    ]


def picture(report: ComparisonReport) -> str:
    """KL divergence on every text against size, and against the time it takes, as SVG."""
    return scatter(f"Recipes on {report.model}", QUALITY, [text.name for text in report.texts], panels(report))


def panels(report: ComparisonReport, width: int = WIDTH) -> list[Panel]:
    """Against size, and against time; with the fronts. width: of each, in pixels."""
    texts = [text.name for text in report.texts]
    values = {row.recipe: tuple(row.quality[text].kl for text in texts) for row in report.rows}
    sizes = tuple(Point(label=row.recipe, x=row.bytes / 1e6, values=values[row.recipe]) for row in report.rows)
    seconds = tuple(Point(label=row.recipe, x=row.seconds, values=values[row.recipe]) for row in report.rows)
    return [
        Panel(x="size of the weights, MB", points=sizes, front=report.fronts["size"], width=width),
        Panel(x="seconds to compress", points=seconds, front=report.fronts["time"], zero=True, width=width),
    ]
