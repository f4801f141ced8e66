"""planish.inspecting.tables: one screen, at 100 columns and at 80, with what matters on it."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers_inspect import bare_report, compressed_report, smollm2_report
from rich.console import Console

from planish.calib.outliers.diagnosis import Intervention, OutlierReport
from planish.inspecting.tables import FINDINGS, inspect_tables

LINES = 45


def screen(*reports: OutlierReport, width: int = 100, files: tuple[Path, ...] = ()) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(*inspect_tables(*reports, files=files), sep="\n")
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [100, 80])
@pytest.mark.parametrize("reports", [(smollm2_report(),), (compressed_report(), smollm2_report()), (bare_report(),)], ids=["one", "two", "bare"])
def test_it_is_one_screen(reports: tuple[OutlierReport, ...], width: int) -> None:
    lines = screen(*reports, width=width, files=(Path("report.html"), Path("recipe.yaml")))
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= width
    assert lines[-2:] == ["  report.html", "  recipe.yaml"]


def test_the_worst_sites_first() -> None:
    lines = screen(smollm2_report(), width=80)
    start = next(index for index, line in enumerate(lines) if line.startswith("  worst sites  W4A4 error"))
    assert lines[start + 1].split()[:4] == ["2.down", "62", "%", "smooth+Hadamard"]
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["2.down", "10.down", "9.down"]


def test_what_is_said_in_one_line() -> None:
    text = " ".join(" ".join(screen(smollm2_report(), width=200)).split())
    first = 'massive channel 507: 25,300 (at most 25,700) at position 0, "<|im_start|>", layers 11–27, constant'
    assert f"{first}; channel 247: −2,140; channel 14: 1,610; 1 more" in text
    assert (
        "perplexity 20.25; massive activations set to zero (layer 11): 6,180 (× 305); massive activations set to their mean (layer 11): 20.31" in text
    )
    assert "model.layers.11.mlp.down_proj[507, 1021] = −1.92 (perplexity 212.70 without it)" in text
    assert "145 of 270, 46 dormant; most heads of layers 12–29" in text
    assert 'prefix "<|im_start|>" (id 1)' in text
    assert "recommended W4A4 • Hadamard rotation at every site: it lowers" in text


def test_side_by_side() -> None:
    lines = screen(compressed_report(), smollm2_report())
    heading = next(line for line in lines if line.startswith("  worst sites"))
    assert heading.split() == ["worst", "sites", "difficulty", "before", "kurtosis", "before", "max", "|x|", "before"]
    facts = next(line for line in lines if line.strip().startswith("now"))
    assert facts.split() == ["now", "before"]
    (changed,) = (line for line in lines if line.startswith("  if changed"))
    assert "perplexity 20.71" in changed
    assert "perplexity 20.25" in changed


def test_long_findings_are_cut_and_it_says_so() -> None:
    lines = screen(replace(smollm2_report(), findings=tuple(f"Finding {index}." for index in range(FINDINGS + 5))))
    assert sum(line.startswith("  • Finding") for line in lines) == FINDINGS
    assert "    and 5 more, in the page of --html and in --json" in lines


def test_markup_in_names_is_text() -> None:
    lines = screen(replace(smollm2_report(), model="a[bold]b", findings=("[red]x[/red] [/]",)))
    assert lines[0].startswith("a[bold]b")
    assert "  • [red]x[/red] [/]" in lines


def test_weights_are_not_told_twice() -> None:
    report = smollm2_report()
    extra = Intervention(name=f"{report.super_weights[0].module}[507, 1021] set to zero", layer=11, quality=212.7)
    assert screen(replace(report, interventions=(*report.interventions, extra))) == screen(report)


def test_feature_changes_have_no_percentages() -> None:
    report = replace(smollm2_report(), quality="feature change", interventions=(Intervention(name="unchanged", layer=None, quality=0.0),))
    report = replace(report, interventions=(*report.interventions, Intervention(name="zero", layer=3, quality=0.91)))
    assert "  if changed     feature change; zero (layer 3): 0.910" in screen(report)
