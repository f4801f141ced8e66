"""`planish report`: reports that lie as JSON become pages that link to each other, with an index, and one Markdown text."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal.console import Traceback, out_console
from .terminal.options import starting

Reports = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Reports as JSON: of compress, compare, inspect --json and eval; or folders of such.")
]
INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of report. held: its dataclass; title: of one; page, markdown: what becomes of one; a page takes links to others."""

    name: str
    held: type
    title: Callable[[Any], str]
    page: Callable[[Any, dict[str, str]], str]
    markdown: Callable[[Any], str]


def kinds() -> tuple[Kind, ...]:
    """All that there are."""
    from .calib.outliers.diagnosis import OutlierReport
    from .comparing.page import comparison_page
    from .comparing.report import ComparisonReport
    from .comparing.text import markdown as compare_markdown
    from .compressing.page import compress_page, compress_title, markdown
    from .compressing.report import CompressReport
    from .eval.pages.outlier_page import outlier_markdown, outlier_page
    from .eval.scores.evaluation import Evaluation
    from .evaluating.page import eval_markdown, eval_page
    from .evaluating.tables import title

    return (
        Kind("compress", CompressReport, compress_title, compress_page, markdown),
        Kind("compare", ComparisonReport, lambda found: f"{len(found.rows)} recipes on {found.model}", comparison_page, compare_markdown),
        Kind("eval", Evaluation, title, eval_page, eval_markdown),
        Kind("inspect", OutlierReport, lambda found: str(found.model), lambda found, links: outlier_page(found, links=links), outlier_markdown),
    )


def report(
    files: Reports,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pages, new or of an earlier `planish report`.")],
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="All of them as one Markdown text for a pull request.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --markdown if it exists.")] = False,
    traceback: Traceback = False,
) -> None:
    """Make pages of reports, one for each and an index, all linked to each other. Nothing is measured."""
    with starting():
        written = write_pages(files, out, markdown, force=force)
    out_console().print(*map(str, written), sep="\n")


def write_pages(files: Sequence[Path], out: Path, markdown: Path | None = None, *, force: bool = False) -> list[Path]:
    """Read the reports, and write their pages and the index into `out`; their paths, the index first. force: replace the file of markdown.

    Raises PlanishError.
    """
    from .common.files import write_text
    from .common.outfile import check_apart, check_outfile, check_writable
    from .common.page_links import about
    from .eval.pages.page import Links, Page, render, section
    from .quant.errors import PlanishError

    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or ((out / INDEX).is_file() and about(out / INDEX)))):
        raise PlanishError(f"{out}: exists and is no folder of `planish report`, and planish overwrites nothing. Choose another folder.")
    check_writable(out / INDEX)
    if markdown is not None:
        check_outfile(markdown, replace=force)
    found = [one for file in _listed(files) for one in _read(file, alone=file in files)]
    if not found:
        raise PlanishError("no report was found. Give JSON that compress, compare, eval --out or inspect --json wrote, or a folder of such.")
    names = _names([kind.name for kind, _ in found])
    check_apart({"--markdown": markdown, **{f"the page {name}": out / name for name in (INDEX, *names)}})
    words = {name: f"{kind.name}: {kind.title(data)}" for name, (kind, data) in zip(names, found, strict=True)}
    pages = {
        name: kind.page(data, {INDEX: "index", **{other: text for other, text in words.items() if other != name}})
        for name, (kind, data) in zip(names, found, strict=True)
    }
    index = Page(
        title="Reports",
        subtitle=f"{len(found)} reports of planish.",
        cards=(),
        sections=(section("reports", "Reports", [Links(to=words)]),),
        about="index",
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        write_text(out / name, page)
    write_text(out / INDEX, render(index))
    if markdown is not None:
        write_text(markdown, "\n".join(kind.markdown(data) for kind, data in found))
    return [out / INDEX, *(out / name for name in names), *([] if markdown is None else [markdown])]


def _names(kinds_found: Sequence[str]) -> list[str]:
    """compress.html, and compress-2.html for a second one."""
    return [f"{name}-{n}.html" if (n := kinds_found[: i + 1].count(name)) > 1 else f"{name}.html" for i, name in enumerate(kinds_found)]


def _listed(files: Sequence[Path]) -> list[Path]:
    """Files as given, and the JSON in folders."""
    return [path for file in files for path in (sorted(file.glob("*.json")) if file.is_dir() else [file])]


def _read(file: Path, *, alone: bool) -> list[tuple[Kind, Any]]:
    """The report in a file, by the fields that it has. alone: it was named, so it must be one; else none where it is something else."""
    from .common.decode import decode
    from .quant.errors import PlanishError

    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise PlanishError(f"{file}: cannot be read: {error.strerror}. Give a report as JSON.") from error
    except ValueError as error:
        if not alone:
            return []
        raise PlanishError(f"{file}: not JSON ({error}). Give a report that planish wrote as JSON.") from error
    for kind in kinds():
        if isinstance(data, dict) and data.keys() <= (own := {field.name for field in fields(kind.held)}) and 2 * len(data) > len(own):
            return [(kind, decode(kind.held, data, str(file), nonfinite=True))]
    if alone:
        raise PlanishError(f"{file}: no report of planish, or of another version. Give JSON of compress, compare, eval --out or inspect --json.")
    return []
