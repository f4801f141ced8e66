"""planish.eval.pages.page: everything is escaped, numbers sort as numbers, and nothing is fetched."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from planish.eval.pages.page import Card, Code, Column, Control, Figure, Frame, Page, Pane, Section, Table, Words, render
from planish.quant.errors import PlanishError

NASTY = "<script>alert('x')</script> & \"quoted\" <!-- </script>"


class Reader(HTMLParser):
    """The tags of a page with their attributes, and its text outside of scripts and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.cdata_elem is None:  # in a script or a style it is set
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(*parts: Table | Words | Code | Figure, plotly: str = "") -> Page:
    section = Section(name="only", title=NASTY, parts=parts)
    return Page(title=NASTY, subtitle=NASTY, cards=(Card(label=NASTY, value=NASTY, note=NASTY, target="only"),), sections=(section,), plotly=plotly)


def figure(data: object = 1.0, controls: tuple[Control, ...] = ()) -> Figure:
    frame = Frame(data=({"type": "scatter", "y": [data]},))
    return Figure(name="one", title=NASTY, caption=NASTY, panes=(Pane(title=NASTY, layout={}, frames={"": frame}),), controls=controls)


def everything() -> str:
    table = Table(caption=NASTY, columns=(Column(heading=NASTY, note=NASTY),), rows=((NASTY,),))
    control = Control(label=NASTY, options=(NASTY, "b"))
    slider = Control(label=NASTY, options=(NASTY, "b"), slider=True)
    parts = (
        table,
        Words(lines=(NASTY,), title=NASTY),
        Words(lines=(NASTY,), points=True),
        Code(caption=NASTY, text=NASTY),
        figure(NASTY, (control, slider)),
    )
    return render(page(*parts, plotly="/* plotly */"))


def test_whatever_is_said_is_text() -> None:
    html = everything()
    read = Reader(html)
    assert "alert('x')</script>" not in html
    assert not [attributes for attributes in read.of("script") if attributes.get("src")]
    assert len(read.of("script")) == 4  # the figure's data, the dark colours, plotly and ours
    assert "".join(read.words).count(NASTY) >= 15
    assert json.loads(next(attributes["data-options"] or "" for attributes in read.of("input"))) == [NASTY, "b"]


def test_the_figures_data_arrives_unchanged() -> None:
    html = render(page(figure(NASTY), plotly="/* */"))
    found = re.search(r'class="figure-data">(.*?)</script>', html, re.DOTALL)
    assert found
    assert json.loads(found[1])["panes"][0]["frames"][""]["data"][0]["y"] == [NASTY]


def test_nothing_is_fetched() -> None:
    read = Reader(everything())
    (policy,) = (attributes["content"] for attributes in read.of("meta") if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    for _, attributes in read.tags:
        assert not {"src", "srcset", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith(("#", "data:"))


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [(2.5, "2.5", "2.5"), (7, "7.0", "7"), (math.inf, "Infinity", "inf"), (-math.inf, "-Infinity", "-inf"), (math.nan, "", "–"), (None, "", "–")],
)
def test_numbers_have_keys_to_sort_by(value: float | None, key: str, text: str) -> None:
    column = Column(heading="x", numeric=True)
    assert (column.key(value), column.text(value)) == (key, text)


def test_a_row_must_fit_its_table() -> None:
    with pytest.raises(ValueError, match="2 columns, but a row of 1"):
        Table(caption="t", columns=(Column(heading="a"), Column(heading="b")), rows=((1,),))


def test_figures_need_a_script() -> None:
    with pytest.raises(PlanishError, match="no plotting script"):
        render(page(figure()))


def test_numbers_that_json_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        render(page(figure(math.nan), plotly="/* */"))


def test_anchors_lead_somewhere() -> None:
    read = Reader(everything())
    names = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    targets = {(attributes["href"] or "")[1:] for attributes in read.of("a")}
    assert targets == {"only"}
    assert targets <= names
