"""A LayerView as a section of a page: maps of the errors over blocks and sites, what restoring sites gains, and every figure in a table."""

from collections.abc import Callable, Sequence

from ..scores.layers import LayerView, SiteView
from .page import Card, Column, Control, Figure, Frame, Page, Pane, Section, Table, Words, render
from .pictures import DARK, Grid, axis, colour_axis, heat, layout, limits, plotly_script

PARTS: dict[str, Callable[[SiteView], float | None]] = {
    "weights and activations": lambda site: site.error,
    "weights alone": lambda site: site.weights,
    "activations alone": lambda site: site.activations,
}


def layers_section(view: LayerView) -> Section:
    """What is known of a checkpoint's sites. Its figures need plotly.js."""
    return Section(name="layers", title="Site by site", parts=(_words(view), _errors(view), *_gains(view), _table(view)))


def layers_page(view: LayerView) -> str:
    """That section as a page of its own. Raises PlanishError if the package plotly is not installed."""
    whole = view.whole
    cards = (
        Card(label="perplexity before", value=f"{whole.base.perplexity:.3f}"),
        Card(
            label="perplexity after", value=f"{whole.quantized.perplexity:.3f}", note=f"{whole.quantized.perplexity / whole.base.perplexity - 1:+.2%}"
        ),
        Card(label="KL divergence", value=f"{whole.kl:.4f}", note="nats per token", target="layers"),
        Card(label="sites", value=str(len(view.sites)), note=f"{sum(site.restored is not None for site in view.sites)} restored", target="layers"),
    )
    about = f"{view.windows} window{'' if view.windows == 1 else 's'} of {view.length} tokens of {view.text}, against {view.model}"
    page = Page(title=view.checkpoint, subtitle=about, cards=cards, sections=(layers_section(view),), plotly=plotly_script(), dark=DARK)
    return render(page)


def _words(view: LayerView) -> Words:
    inputs = "the original model's, so that each error is the site's own" if view.inputs == "base" else "those of the quantized model as it runs"
    return Words(
        lines=(
            f"Errors are relative, of the outputs of all layers that read a site, sink tokens left out. The inputs are {inputs}.",
            "A restored site is in full precision while everything else stays quantized. What that changes in the whole model was measured where a "
            "figure stands, not elsewhere.",
        )
    )


def _grid(view: LayerView, value: Callable[[SiteView], float | None]) -> tuple[list[str], list[int], Grid]:
    """Sites, blocks, and the values by site and block."""
    known = {(site.block, site.site): value(site) for site in view.sites}
    names, blocks = list(dict.fromkeys(site.site for site in view.sites)), sorted({site.block for site in view.sites})
    return names, blocks, [[known.get((block, name)) for block in blocks] for name in names]


def _errors(view: LayerView) -> Figure:
    parts = {name: value for name, value in PARTS.items() if any(value(site) is not None for site in view.sites)}
    low, high = limits([_grid(view, value)[2] for value in parts.values()], log=True)
    frames: dict[str, Frame] = {}
    for number, value in enumerate(parts.values()):
        names, blocks, values = _grid(view, value)
        frames[str(number)] = Frame(data=(heat(blocks, names, values, log=True, hover="block %{x}, %{y}: %{customdata:.2%}"),))
    shape = layout(axis("block"), axis("", type="category"), colours=colour_axis(low, high, "relative error", log=True, above=1.05))
    return Figure(
        name="layer-errors",
        title="Error of each site",
        caption="How far the outputs of a site's readers are off, on a log scale.",
        panes=(Pane(title="", layout=shape, frames=frames),),
        controls=(Control(label="by", options=tuple(parts)),),
        height=300,
    )


def _gains(view: LayerView) -> tuple[Figure, ...]:
    """What restoring gains, where it was measured anywhere."""
    if not any(site.restored is not None for site in view.sites):
        return ()
    names, blocks, values = _grid(view, lambda site: None if site.restored is None else view.whole.kl - site.restored.kl)
    found = [value for row in values for value in row if value is not None]
    shape = layout(axis("block"), axis("", type="category"), colours=colour_axis(min(found), max(found), "KL gained", log=False, above=1.05))
    frame = Frame(data=(heat(blocks, names, values, log=False, hover="block %{x}, %{y}: %{customdata:.5f} nats per token"),))
    return (
        Figure(
            name="layer-gains",
            title="What restoring one site gains",
            caption=f"By how much the divergence from the original, {view.whole.kl:.4f} nats per token, falls. Empty: not measured.",
            panes=(Pane(title="", layout=shape, frames={"": frame}),),
            height=300,
        ),
    )


def _table(view: LayerView) -> Table:
    def share(heading: str, note: str) -> Column:
        return Column(heading=heading, note=note, numeric=True, show=lambda value: f"{value:.2%}")

    columns = (
        Column(heading="site"),
        Column(heading="format", long=True),
        share("error", "by weights and activations"),
        share("weights", "by the weights alone"),
        share("activations", "by the activations alone"),
        Column(heading="KL gained", note="when this site alone is in full precision", numeric=True, show=lambda value: f"{value:.5f}"),
        Column(heading="perplexity then", numeric=True, show=lambda value: f"{value:.3f}"),
    )
    return Table(caption="Every site", columns=columns, rows=tuple(_rows(view, sorted(view.sites, key=lambda site: -site.error))))


def _rows(view: LayerView, sites: Sequence[SiteView]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for site in sites:
        gain = None if site.restored is None else view.whole.kl - site.restored.kl
        after = None if site.restored is None else site.restored.quantized.perplexity
        rows.append((site.name, site.format, site.error, site.weights, site.activations, gain, after))
    return rows
