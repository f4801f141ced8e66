"""Reports as JSON with a schema, as pages and as Markdown: the same figures everywhere, everything escaped, pages that find each other."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_front import SHORT, invoke, tree
from helpers_inspect import smollm2_report
from helpers_reports import BLOCKS, NASTY, comparison_report, compress_report, evaluation
from jsonschema import Draft202012Validator

from planish.common.decode import decode
from planish.common.page_links import about, beside
from planish.common.schemas import plain, to_json
from planish.comparing.page import comparison_page
from planish.compressing.page import compress_page, markdown
from planish.compressing.report import CompressReport
from planish.evaluating.page import eval_markdown, eval_page
from planish.quant.errors import PlanishError
from planish.report_command import write_pages


def test_a_report_goes_through_json() -> None:
    report = compress_report()
    data = json.loads(to_json(report))
    assert decode(CompressReport, data, "report", nonfinite=True) == report
    schema = json.loads(invoke("compress", "--schema").out)
    assert not list(Draft202012Validator(schema).iter_errors(data))
    data["plan"]["surplus"] = 1
    assert list(Draft202012Validator(schema).iter_errors(data))


def test_numbers_that_are_not_finite_have_names() -> None:
    report = compress_report()
    assert report.evaluation is not None
    lost = replace(report, evaluation=replace(report.evaluation, kl=math.nan, quantized=replace(report.evaluation.quantized, perplexity=math.inf)))
    data = plain(lost)
    assert (data["evaluation"]["kl"], data["evaluation"]["quantized"]["perplexity"]) == ("NaN", "Infinity")
    page = compress_page(decode(CompressReport, data, "report", nonfinite=True), {})
    assert "inf" in page


def test_the_compress_page_says_it_all() -> None:
    page = compress_page(compress_report(), {"inspect.html": "inspect: a model"})
    for words in ("w4a4-auto", "112.3 MB", "4.31", "11.25", "0.1430", "84.3%", "missed", "hadamard 192", "planish/manifest.json", "int4 per token"):
        assert words in page, words
    assert page.count("<svg") == 2
    assert '<a href="./inspect.html">inspect: a model</a>' in page
    assert NASTY not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert len(page) < 400_000
    assert page.count("<td data-key=") > BLOCKS * 4


def test_a_report_without_data_or_quality_has_a_page() -> None:
    report = compress_report()
    blank = tuple(replace(block, error=None, sites={name: type(site)() for name, site in block.sites.items()}) for block in report.blocks)
    page = compress_page(replace(report, evaluation=None, gate=None, blocks=blank), {})
    assert "<svg" not in page
    assert "Quality was not measured" in page


def test_markdown_is_a_short_table() -> None:
    lines = markdown(compress_report()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split(" | ")[0].strip("| ") for line in table] == [
        *("", "---", "size", "bits per quantized weight", "perplexity", "KL divergence, nats per token", "same likeliest token", "gate"),
    ]
    assert {line.replace("\\|", "").count("|") for line in table} == {5}
    assert "| perplexity | 9.79 | 11.25 | 1.149 |" in lines
    assert any(line.startswith("- MISSED: kl") for line in lines)
    assert NASTY not in "\n".join(lines)


def test_the_comparison_page() -> None:
    page = comparison_page(comparison_report(), {})
    assert page.count("<svg") == 2
    assert page.count('class="front"') == 2
    for words in ("Smallest: w8a8: 164.0 MB", "Best: w8a8", "(full precision)", "2 recipes at once", "w4a4-fast"):
        assert words in page


def test_the_evaluation_page_and_its_markdown() -> None:
    page, text = eval_page(evaluation(), {}), eval_markdown(evaluation())
    for words in ("piqa", "96.8 ± 0.9", "31, 12", "0.005", "+14.90 ± 1.00 %", "96.8 ± 0.7"):
        assert words in page
        assert words in text
    assert "- met: recovery" in text
    assert "| mean | each task's first |" in text


def test_pages_find_each_other(tmp_path: Path) -> None:
    for name, report in (("a", compress_report()), ("b", comparison_report()), ("c", evaluation()), ("d", smollm2_report())):
        (tmp_path / f"{name}.json").write_text(to_json(report))
    (tmp_path / "other.json").write_text('{"model": "mine"}')
    (tmp_path / "broken.json").write_text("{")
    written = write_pages([tmp_path], tmp_path / "out", tmp_path / "pr.md")
    assert [path.name for path in written] == ["index.html", "compress.html", "compare.html", "eval.html", "inspect.html", "pr.md"]
    for path in written[:-1]:
        page = path.read_text()
        assert all(f'href="./{other.name}"' in page for other in written[1:-1] if other != path)
    assert set(beside(tmp_path / "out" / "new.html")) == {path.name for path in written[:-1]}
    assert about(tmp_path / "pr.md") is None
    assert (tmp_path / "pr.md").read_text().count("### ") >= 3
    twice = write_pages([tmp_path / "a.json", tmp_path / "a.json"], tmp_path / "out")
    assert [path.name for path in twice] == ["index.html", "compress.html", "compress-2.html"]


def test_a_report_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(to_json(compress_report()))
    command = ("report", "a.json", "--out", "pages", "--markdown", "pr.md")
    assert invoke(*command).code == 0
    before = tree(tmp_path)
    again = invoke(*command)
    assert (again.code, "pr.md: exists" in again.err, "--force" in again.err) == (2, True, True)
    refused = invoke(*command[:-1], "pages/compress.html", "--force")
    assert (refused.code, "and one would replace the other" in refused.err) == (2, True)
    (tmp_path / "pr.md").write_text("old")
    assert invoke(*command, "--force").code == 0
    assert tree(tmp_path) == before


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"model": "mine"}')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "good.json").write_text(to_json(evaluation()))
    before = tree(tmp_path)
    for files, out, words in (
        (["other.json"], "out", "no report of planish"),
        (["missing.json"], "out", "cannot be read"),
        (["mine"], "out", "no report was found"),
        (["mine/thesis.txt"], "out", "not JSON"),
        (["good.json"], "mine", "no folder of `planish report`"),
    ):
        with pytest.raises(PlanishError, match=words):
            write_pages([tmp_path / file for file in files], tmp_path / out)
    assert tree(tmp_path) == before


@pytest.mark.smoke
def test_compress_writes_page_and_markdown(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("compress", "w8a8", "--model", original, "--out", "new", *SHORT, "--quiet")
    (tmp_path / "mine.md").write_text("mine")
    refused = invoke(*command, "--markdown", "mine.md")
    assert (refused.code, "overwrites nothing" in refused.err) == (2, True)
    assert sorted(tree(tmp_path)) == ["mine.md"]
    ran = invoke(*command, "--markdown", "new.md", "--html", "page.html")
    assert ran.code == 0, ran
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.md", "new", "new.md", "new.report.json", "page.html"]
    data = json.loads((tmp_path / "new.report.json").read_text())
    assert f"{data['bits_per_weight']:.2f}" in (tmp_path / "new.md").read_text()
    assert about(tmp_path / "page.html") == f"compress: new: w8a8 on {original}"
    made = invoke("report", "new.report.json", "--out", "pages")
    assert (made.code, made.out.split()) == (0, ["pages/index.html", "pages/compress.html"])
