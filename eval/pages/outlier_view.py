"""What the page and the terminal both say of an OutlierReport: which sites are worst, and numbers as people read them."""

import math
from collections.abc import Iterable

from ...calib.outliers.diagnosis import SCHEMES, TRANSFORMS, MassiveActivation, OutlierReport, SiteFigures

TRANSFORM_NAMES = {"plain": "none", "smooth": "smoothing", "hadamard": "Hadamard", "both": "smoothing + Hadamard"}
SCHEME_NAMES = {"w8a8": "W8A8", "w4a8": "W4A8", "w4a4": "W4A4"}


def number(value: float) -> str:
    """Three significant digits: 25,300, 0.0123, 1.2e-05, ∞."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2e}".replace("-", "−", 1) if value < 0 else f"{value:.2e}"
    rounded = float(f"{value:.3g}") if abs(value) < 1e5 else float(f"{value:.4g}")
    digits = max(0, 2 - math.floor(math.log10(abs(rounded)))) if rounded else 0
    return f"{rounded:,.{digits}f}".replace("-", "−")


def percent(share: float) -> str:
    """A share as 1.2 %, 24 % or 1,300 %."""
    if math.isinf(share):
        return number(share)
    digits = 0 if abs(share) >= 0.0995 or share == 0 else 1 if abs(share) >= 0.00995 else 2
    return f"{100 * share:,.{digits}f} %"


def quality(value: float, unit: str) -> str:
    """A quality of that unit: perplexities with two decimals."""
    return f"{value:,.2f}" if unit == "perplexity" and abs(value) < 1000 else number(value)


def change(quality: float, unchanged: float) -> str:
    """How far a quality is from that of the unchanged model: +2.3 %, or × 305."""
    ratio = quality / unchanged if unchanged else math.inf
    if math.isnan(ratio):
        return "–"
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−") if ratio < 10 else f"× {number(ratio)}"


def scheme_shown(report: OutlierReport) -> str | None:
    """The scheme with the fewest bits at which errors were measured. None: at no scheme."""
    measured = {scheme for site in report.sites for scheme in site.errors}
    return next((scheme for scheme in reversed(SCHEMES) if scheme in measured), None)


def hardness(site: SiteFigures, scheme: str | None) -> float:
    """What sites are ranked by: the output error of plain rounding on ordinary tokens, or the difficulty where no error was measured."""
    value = site.errors.get(scheme or "", {}).get("plain", math.nan) if scheme else site.ordinary.difficulty
    return -math.inf if math.isnan(value) else value


def worst_first(report: OutlierReport) -> list[SiteFigures]:
    """The sites, the hardest first."""
    scheme = scheme_shown(report)
    return sorted(report.sites, key=lambda site: -hardness(site, scheme))


def best_transform(site: SiteFigures, scheme: str | None) -> tuple[str, float] | None:
    """The transform with the smallest error on ordinary tokens, and that error. None where none was measured."""
    errors = {name: site.errors.get(scheme or "", {}).get(name, math.nan) for name in TRANSFORMS}
    known = {name: error for name, error in errors.items() if not math.isnan(error)}
    return min(known.items(), key=lambda item: item[1]) if known else None


def life(activation: MassiveActivation, blocks: int) -> str:
    """The layers after which it is above the bar of its class: 11–27, or embeddings–29."""
    first, last = ("embeddings" if activation.born < 0 else str(activation.born)), (blocks if activation.died is None else activation.died) - 1
    return first if last <= activation.born else f"{first}–{last}"


def place(activation: MassiveActivation) -> str:
    """The tokens it stands at: position 0, "<s>", or varying positions, "\\n"."""
    where = "varying positions" if activation.position is None else f"position {activation.position}"
    return where if activation.token is None else f"{where}, {quoted(activation.token)}"


def quoted(token: str) -> str:
    """A token's text in quotes, what does not show spelled out: "\\n"."""
    return '"' + "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in token) + '"'


def ranges(values: Iterable[int]) -> str:
    """Whole numbers as 0–3, 7, 9–11."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def unchanged_quality(report: OutlierReport) -> float | None:
    """The quality of the model as it is."""
    return next((each.quality for each in report.interventions if each.layer is None), None)
