"""Self-contained HTML pages: summary cards, sections, tables that sort, figures with menus. One file, no network, light and dark, phone and print.

A page is data (the dataclasses below) and `render` makes HTML of it. All text is escaped. The template, the style and the script lie in assets/.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, ClassVar
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from ...quant.errors import PlanishError

_ASSETS = resources.files("planish").joinpath("eval").joinpath("pages").joinpath("assets")


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One figure of the summary at the head. target: the id of the section it leads to."""

    label: str
    value: str
    note: str = ""
    target: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A table's column. show: the text of a value. numeric: sorted as numbers and set to the right. long: its texts
    may break into lines. note: what it means, shown on hovering."""

    heading: str
    show: Callable[[Any], str] = str
    numeric: bool = False
    long: bool = False
    note: str = ""

    def text(self, value: object) -> str:
        """What is shown of a value: of None and NaN, a dash."""
        return "–" if _missing(value) else self.show(value)

    def key(self, value: object) -> str:
        """What the script sorts by: empty for what is always last."""
        if _missing(value):
            return ""
        return str(json.dumps(float(value))) if self.numeric and isinstance(value, (int, float)) else str(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of values, one for every column; None is shown as a dash. Clicking a heading sorts by it."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[object, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.caption!r} has {len(self.columns)} columns, but a row of {len(row)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Paragraphs, or the points of a list, with or without a title."""

    kind: ClassVar[str] = "words"
    lines: tuple[str, ...]
    title: str = ""
    points: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """A text to copy, with a button that does."""

    kind: ClassVar[str] = "code"
    caption: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """A menu, or a slider, that chooses what a figure shows. start: the option shown first."""

    label: str
    options: tuple[str, ...]
    start: int = 0
    slider: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What a pane shows at one choice: plotly.js traces, and what to add to the pane's layout (by dotted names, such as "yaxis.range")."""

    data: tuple[Mapping[str, Any], ...]
    layout: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pane:
    """One plot. layout: of plotly.js, but for what the page sets: size, fonts, colours. frames: by the options chosen, their numbers joined with "-"
    ("" where the figure has no control)."""

    title: str
    layout: Mapping[str, Any]
    frames: Mapping[str, Frame]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """Plots side by side under the same controls. height: of each plot, in CSS pixels."""

    kind: ClassVar[str] = "figure"
    name: str
    title: str
    caption: str
    panes: tuple[Pane, ...]
    controls: tuple[Control, ...] = ()
    height: int = 380

    def data(self) -> dict[str, Any]:
        """What the script draws."""
        panes = [
            {"layout": pane.layout, "frames": {key: {"data": frame.data, "layout": frame.layout} for key, frame in pane.frames.items()}}
            for pane in self.panes
        ]
        return {"name": self.name, "panes": panes}


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """Pictures side by side that need no script. svgs: of scatter.py, or others of our own making: they become part of the page as they are."""

    kind: ClassVar[str] = "picture"
    caption: str
    svgs: tuple[str, ...]

    def drawn(self) -> tuple[Markup, ...]:
        """For the template."""
        return tuple(map(Markup, self.svgs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Other pages, with what they are. to: file name relative to this page -> words."""

    kind: ClassVar[str] = "links"
    to: Mapping[str, str]

    def hrefs(self) -> dict[str, str]:
        """As addresses, which never leave the folder's tree by a scheme of their own."""
        return {f"./{quote(name)}": words for name, words in self.to.items()}


Part = Table | Words | Code | Figure | Picture | Links


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page with a heading. name: its anchor."""

    name: str
    title: str
    parts: tuple[Part, ...]


def section(name: str, title: str, parts: Iterable[Part | None]) -> Section:
    """A section of the parts that there are."""
    return Section(name=name, title=title, parts=tuple(part for part in parts if part))


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The whole. plotly: the source of plotly.js, needed where there are figures. dark: the colours of figures, in light -> in dark. about: what it
    is, such as "inspect: MODEL", for pages beside it that link to it."""

    title: str
    subtitle: str
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    plotly: str = ""
    dark: Mapping[str, str] = field(default_factory=dict)
    about: str = ""


def render(page: Page) -> str:
    """The page as one HTML document. Raises PlanishError if it has figures and no plotly.js."""
    if not page.plotly and any(part.kind == "figure" for section in page.sections for part in section.parts):
        raise PlanishError(f"page {page.title}: it has figures, but no plotting script to draw them.")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["script_json"] = _script_json
    style, script = (Markup(_asset(name)) for name in ("page.css", "page.js"))
    return environment.from_string(_asset("page.html")).render(page=page, style=style, script=script, plotly=Markup(page.plotly))


def _asset(name: str) -> str:
    return _ASSETS.joinpath(name).read_text(encoding="utf-8")


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _script_json(data: Any) -> Markup:
    """Data for a <script type="application/json">: no "<" in it, so that nothing ends the element or begins a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
