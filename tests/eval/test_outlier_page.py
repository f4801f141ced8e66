"""planish.eval.pages.outlier_page: the page says what the report says, worst first, for every kind of report."""

import html
import re
from dataclasses import fields, replace

import pytest
from helpers_inspect import RECIPE, bare_report, compressed_report, smollm2_report

from planish.calib.outliers.diagnosis import Thresholds
from planish.eval.pages import outlier_page as module
from planish.eval.pages.outlier_page import outlier_page


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "plotly_script", lambda: "/* plotly.js */")


@pytest.fixture(scope="module")
def page() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plotly_script", lambda: "/* plotly.js */")
        return outlier_page(smollm2_report())


def table(page: str, caption: str) -> list[list[str]]:
    """The texts of a table's body."""
    body = page[page.index(f"<caption>{html.escape(caption)}") :].split("</tbody>")[0].split("<tbody>")[1]
    return [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in body.split("</tr>")[:-1]]


def test_findings_come_first_and_in_words(page: str) -> None:
    report = smollm2_report()
    places = [page.index(html.escape(sentence).replace("&#x27;", "&#39;")) for sentence in report.findings]
    assert places == sorted(places)
    assert places[-1] < page.index('id="worst"') < page.index('id="massive"') < page.index('id="sites"') < page.index('id="recommendation"')


def test_the_tables_hold_the_figures(page: str) -> None:
    assert [row[0] for row in table(page, "The ten hardest sites")][:3] == ["2.down", "10.down", "9.down"]
    assert table(page, "Massive and large activations")[0][:7] == [
        *("507", 'position 0, "<|im_start|>"', "25,300", "25,700", "52,200", "27", "11–27"),
    ]
    assert table(page, "Perplexity when something is changed") == [
        ["unchanged", "–", "20.25", "–"],
        ["massive activations set to zero", "11", "6,180", "× 305"],
        ["massive activations set to their mean", "11", "20.31", "+0.3 %"],
    ]
    assert table(page, "Super weights")[0][:4] == ["model.layers.11.mlp.down_proj", "507", "1021", "−1.92"]
    assert len(table(page, "Every site")) == 120
    assert len(table(page, "Sink heads")) == len(smollm2_report().sink_heads)
    assert table(page, "Outlier tokens")[1] == ['"\\n"', "198", "3", "0", "3", "32", "71.2", "2.down"]


def test_every_criterion_has_its_meaning(page: str) -> None:
    criteria = [html.unescape(line) for line in re.findall(r"<li>(.*?)</li>", page, re.DOTALL)]
    for item in fields(Thresholds):
        assert sum(f"{item.name}:" in line or f"{item.name}, " in line for line in criteria) == 1, item.name


def test_the_recipe_can_be_copied(page: str) -> None:
    (shown,) = re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)
    assert html.unescape(shown) == RECIPE
    assert '<button type="button" class="copy">' in page


def test_every_figure_is_there_and_small(page: str) -> None:
    assert page.count('class="figure-data"') == 7
    assert len(page) < 3_000_000  # plotly.js is 4.8 MB more


def test_side_by_side() -> None:
    page = outlier_page(compressed_report(), smollm2_report())
    assert "now: build/smollm2-w8a8" in page
    assert "before: HuggingFaceTB/SmolLM2-135M-Instruct" in page
    assert page.count('class="panes several"') == 6
    worst = table(page, "The ten hardest sites, by difficulty")
    assert worst[0][0] == "2.down"
    assert float(worst[0][1]) == pytest.approx(0.6 * float(worst[0][7]), rel=0.01)
    assert "Recommendation" not in page


def test_a_compressed_model_alone() -> None:
    page = outlier_page(compressed_report())
    assert len(table(page, "The ten hardest sites, by difficulty")[0]) == 7
    assert 'id="errors"' not in page


def test_nothing_found() -> None:
    page = outlier_page(bare_report())
    assert "Nothing stands out." in page
    assert "none above the thresholds" in page
    assert "figure-data" not in page.split("<script>")[0]


def test_names_are_text() -> None:
    report = replace(smollm2_report(), model="<b>m</b>", findings=("<i>f</i>",))
    page = outlier_page(report)
    assert "<b>m</b>" not in page
    assert "&lt;i&gt;f&lt;/i&gt;" in page
