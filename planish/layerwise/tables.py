"""What `planish layers` found: the whole model in one line, then every site, those with the largest error first."""

from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from ..common.fitting import Table
from ..common.units import counted, duration
from ..eval.scores.layers import LayerView, SiteView


def layers_tables(view: LayerView, html: Path | None = None) -> tuple[RenderableType, ...]:
    """What to print, one below the other; a format that all sites have stands below their table. html: the written page, if there is one."""
    whole = view.whole
    formats = {site.format for site in view.sites}
    measured = sum(site.restored is not None for site in view.sites)
    lines = [
        *([f"  all sites: {next(iter(formats))}"] if len(formats) == 1 else []),
        f"  perplexity {whole.base.perplexity:.3f} before, {whole.quantized.perplexity:.3f} after; KL {whole.kl:.4f} nats per token",
        f"  {counted(view.windows, 'window')} of {view.length} tokens of {view.text}; errors on the inputs of the {view.inputs} model; "
        f"{measured} of {len(view.sites)} sites restored; took {duration(view.seconds)}",
        *(["  –: not measured: --sites takes more, --all-sites all"] if measured < len(view.sites) else []),
        *([] if html is None else [f"  {html}"]),
    ]
    return Text(view.checkpoint, style="bold") + Text(f"  against {view.model}", style="not bold dim"), _sites(view), "", *map(Text, lines)


def _sites(view: LayerView) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    several = len({site.format for site in view.sites}) > 1
    for heading in ("  site", *(["format"] if several else []), "error", "weights", "activations", "KL without", "perplexity"):
        table.add_column(heading, justify="left" if heading in ("  site", "format") else "right", no_wrap=heading != "format")
    for site in sorted(view.sites, key=lambda site: -site.error):
        table.add_row(f"  {site.name}", *([site.format] if several else []), *_cells(site, view))
    return table


def _cells(site: SiteView, view: LayerView) -> tuple[str, ...]:
    shares = ["–" if part is None else f"{part:.2%}" for part in (site.error, site.weights, site.activations)]
    effect = ["–", "–"]
    if site.restored is not None:
        effect = [f"{site.restored.kl:.4f} ({site.restored.kl - view.whole.kl:+.4f})", f"{site.restored.quantized.perplexity:.3f}"]
    return *shares, *effect
