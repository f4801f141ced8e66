"""What an inspection found, in sentences: what breaks a model at low bits first, what helps last."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import median

from ..calib.outliers.diagnosis import SCHEMES, Intervention, MassiveActivation, OutlierReport, SiteFigures, SuperWeight
from ..calib.outliers.interventions import AVERAGED, UNCHANGED, ZEROED
from ..eval.pages.outlier_view import number, quoted

RUINOUS, HARMLESS = 0.5, 0.02  # shares by which a change makes the quality figure worse
NAMED = 4  # things that a sentence names


def findings(report: OutlierReport) -> tuple[str, ...]:
    """Plain sentences with numbers, worst first."""
    parts = (_massive, _worth, _spiked, _hard, _super_weights, _tokens, _heads, _rounding)
    return tuple(sentence for part in parts for sentence in part(report))


def _massive(report: OutlierReport) -> Iterator[str]:
    massive = [one for one in report.massive if one.massive]
    if not massive:
        limits, ratio = report.thresholds, max((record.top[0] / record.median for record in report.magnitudes if record.median), default=0.0)
        bars = f"above {limits.massive_floor:g} and above {limits.massive_ratio:,.0f} times its layer's median"
        yield f"No massive activations: no value is, in a quarter of the samples, {bars}; on average a sample's largest is {_number(ratio)} times it."
    places: dict[object, list[MassiveActivation]] = {}
    for one in massive:
        places.setdefault((one.position, one.token, one.born), []).append(one)
    for group in places.values():
        yield _one_place(report, group)


def _one_place(report: OutlierReport, group: Sequence[MassiveActivation]) -> str:
    """Those at one position. The smaller channels that go with them are named too."""
    first = group[0]
    until = "to the end" if first.died is None else f"to layer {first.died - 1}'s"
    kind = "nearly the same in every sample" if first.constant else "different from sample to sample"
    text = (
        f"Channel {first.channel} carries {_number(first.value)} on average, at most {_number(first.largest)}, at {_place(first)}: "
        f"{_number(first.ratio)} times the median, {kind} (standard deviation {first.spread:.1%}). "
        f"Born in {_layer(first.born)} output, it lives {until}."
    )
    others = [*group[1:], *(one for one in report.massive if not one.massive and (one.position, one.born) == (first.position, first.born))]
    if others and first.position is not None:
        named = _listed(f"{one.channel} ({_number(one.value)})" for one in others[:NAMED])
        text += f" Channel{'s' * (len(others) > 1)} {named} stand{'s' * (len(others) == 1)} out there too."
    return text


def _place(one: MassiveActivation) -> str:
    token = "" if one.token is None else f" ({quoted(one.token)})"
    return f"{'varying positions' if one.position is None else f'position {one.position}'}{token}"


def _layer(layer: int) -> str:
    return "the embeddings'" if layer < 0 else f"layer {layer}'s"


def _worth(report: OutlierReport) -> Iterator[str]:
    """What zeroing and averaging do, layer by layer."""
    for zeroed, averaged in _pairs(report.interventions):
        lost, kept = _change(report, zeroed.quality), _change(report, averaged.quality)
        verdict = "ruins the model" if lost > RUINOUS else "harms the model" if lost > HARMLESS else "hardly changes the model"
        if kept > HARMLESS:
            meaning = "harms it too: they carry information" if lost > HARMLESS else "harms it"
        else:
            meaning = "hardly changes it: they are a constant bias, not information" if lost > HARMLESS else "changes as little"
        yield (
            f"Setting the massive activations born in {_layer(-1 if zeroed.layer is None else zeroed.layer)} output to zero {verdict} "
            f"({_quality(report, zeroed.quality)}); setting them to their mean over samples {meaning} ({_quality(report, averaged.quality)})."
        )


def _pairs(interventions: Sequence[Intervention]) -> list[tuple[Intervention, Intervention]]:
    averaged = {one.layer: one for one in interventions if one.name == AVERAGED}
    return [(one, averaged[one.layer]) for one in interventions if one.name == ZEROED]


def _base(report: OutlierReport) -> float:
    return next(one.quality for one in report.interventions if one.name == UNCHANGED)


def _change(report: OutlierReport, quality: float) -> float:
    """How much worse, as a share; of vision models the figure is one."""
    return quality / _base(report) - 1 if report.quality == "perplexity" else quality


def _quality(report: OutlierReport, quality: float) -> str:
    if report.quality != "perplexity":
        return f"{report.quality} {quality:.1%}"
    change = _change(report, quality)
    share = f"{change:+.1%}".replace("-", "−") if change < 10 else f"{number(change + 1)} times"
    return f"{report.quality} {_base(report):.2f} to {number(quality) if change >= 10 else f'{quality:.2f}'}, {share}"


def _super_weights(report: OutlierReport) -> Iterator[str]:
    if not report.super_weights:
        yield "No super weights: no single weight makes a spike of the residual stream."
    for one in report.super_weights[:NAMED]:
        worth = "" if one.quality is None else f"; without it: {_quality(report, one.quality)}"
        published = {None: "", True: " It is in the published index.", False: " The published index does not list it."}[one.published]
        spikes = f"an input of {_number(one.activation)} and an output of {_number(one.output)}"
        yield f"Super weight {_where(one)} = {_number(one.value)} stands between {spikes}{worth}.{published}"
    if len(report.super_weights) > NAMED:
        yield f"{len(report.super_weights) - NAMED} more super weights: {_listed(map(_where, report.super_weights[NAMED : 2 * NAMED]))}."


def _where(one: SuperWeight) -> str:
    return f"{one.module}[{one.row}, {one.column}]"


def _spiked(report: OutlierReport) -> Iterator[str]:
    """Sites whose largest values are those of sink tokens."""
    limits = report.thresholds
    spiked = [site for site in report.sites if site.sink_tokens and site.every.absmax > limits.site_spike * site.ordinary.absmax]
    for name, sites in _by_kind(spiked, lambda site: site.every.absmax):
        reach = _listed(f"{_number(site.every.absmax)} in {_site_layer(site)}" for site in sites[:NAMED])
        mild = [site for site in sites if site.ordinary.kurtosis <= limits.site_kurtosis]
        rest = _listed(_number(site.ordinary.absmax) for site in mild[:NAMED])
        tails = _listed(_number(site.ordinary.kurtosis) for site in mild[:NAMED])
        without = (
            f"without {_sinks(report)}, {_layers(mild)} become{'s' * (len(mild) == 1)} mild (at most {rest}, kurtosis {tails})"
            if mild
            else f"no layer is mild without {_sinks(report)} either"
        )
        yield f"The input of {name} reaches {reach}, at {_sinks(report)} only: {without}."


def _hard(report: OutlierReport) -> Iterator[str]:
    """Sites that are hard without sink tokens."""
    hard = [site for site in report.sites if site.ordinary.kurtosis > report.thresholds.site_kurtosis]
    for name, sites in _by_kind(hard, lambda site: site.ordinary.kurtosis):
        worst = sorted(sites, key=lambda site: -site.ordinary.kurtosis)
        tails = _listed(f"{_number(site.ordinary.kurtosis)} in {_site_layer(site)}" for site in worst[:NAMED])
        state = f"stays hard without {_sinks(report)}" if any(site.sink_tokens for site in sites) else "is hard"
        meaning = "Rare values of ordinary tokens set a static range there."
        yield f"The input of {name} in {_layers(sites)} {state}: kurtosis {tails} (3 for a Gaussian). {meaning}"


def _by_kind(sites: Iterable[SiteFigures], worst: Callable[[SiteFigures], float]) -> list[tuple[str, list[SiteFigures]]]:
    """In the order of blocks; of a block's experts the one with the most of `worst`."""
    chosen: dict[tuple[str, int], SiteFigures] = {}
    for site in sites:
        before = chosen.setdefault((site.kind, site.block), site)
        chosen[site.kind, site.block] = max(before, site, key=worst)
    return [(kind, [site for _, site in group]) for kind, group in groupby(sorted(chosen.items(), key=itemgetter(0)), key=lambda item: item[0][0])]


def _site_layer(site: SiteFigures) -> str:
    expert = site.site.removeprefix(site.kind).removeprefix(".")
    return f"layer {site.block} (expert {expert})" if expert else f"layer {site.block}"


def _sinks(report: OutlierReport) -> str:
    """What the sink tokens are."""
    positions = {one.position for one in report.massive if one.massive}
    return f"position {positions.pop()}" if len(positions) == 1 and None not in positions else "sink tokens"


def _layers(sites: Sequence[SiteFigures]) -> str:
    blocks = sorted(site.block for site in sites)
    return f"layer{'s' * (len(blocks) > 1)} {_listed(map(str, blocks))}"


def _tokens(report: OutlierReport) -> Iterator[str]:
    bar = f"{report.thresholds.outlier_token:g} times the median token's"
    vision = report.quality != "perplexity"
    initial = sum(token.initial for token in report.outlier_tokens)
    if initial:
        first = "The class token" if vision else "The first token"
        yield f"{first} is an outlier in {_share(initial, report)}{'' if vision else ', whichever it is'} (its maximum is above {bar})."
    inside = sorted((token for token in report.outlier_tokens if token.inside), key=lambda token: -token.inside)
    if inside:
        more = f", and {len(inside) - NAMED} others" if len(inside) > NAMED else ""
        named = _listed(f"{quoted(token.text)} (in {token.inside} of the {token.present} samples that hold it)" for token in inside[:NAMED])
        yield f"{'Other outlier tokens' if vision else 'Outlier tokens beyond the first'}: {named}{more}."
    if report.prefix is not None:
        left = [token for token in inside if token.token_id not in report.prefix.token_ids]
        why = "; no other token is an outlier in most of the samples that hold it" if left else ""
        yield f"Suggested prefix, to be kept in full precision before every text: {quoted(report.prefix.text)}{why}."


def _share(count: int, report: OutlierReport) -> str:
    return "every sample" if count >= report.samples else f"{count} of {report.samples} samples"


def _heads(report: OutlierReport) -> Iterator[str]:
    if report.attention is None:
        return
    heads = sum(map(len, report.attention.score))
    dormant = sum(head.dormant for head in report.sink_heads)
    rest = f"; {dormant} {'is' if dormant == 1 else 'are'} dormant, reading nearly nothing there" if dormant else ""
    first, bar = "token 0" if report.quality == "perplexity" else "the class token", report.thresholds.sink_score
    yield f"{len(report.sink_heads)} of {heads} heads are sink heads: they give {first} more than {bar:.0%} of their attention{rest}."


def _rounding(report: OutlierReport) -> Iterator[str]:
    """What low bits cost, and what helps."""
    measured = [site for site in report.sites if site.errors]
    if not measured:
        return
    for scheme in SCHEMES[::-1]:
        middle = {name: median(site.errors[scheme][name] for site in measured) for name in measured[0].errors[scheme]}
        plain = middle.pop("plain")
        worst = max(measured, key=lambda site: site.errors[scheme]["plain"])
        helps = ", ".join(f"{_TRANSFORMS[name]} {error:.1%}" for name, error in middle.items())
        yield (
            f"Rounded plainly to {scheme.upper()}, the median site's output is off by {plain:.1%} "
            f"(the worst, {worst.name}, by {worst.errors[scheme]['plain']:.1%}); with {helps}."
        )


_TRANSFORMS = {"smooth": "smoothing", "hadamard": "a Hadamard rotation", "both": "both"}


def _number(value: float) -> str:
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}").replace("-", "−")


def _listed(parts: Iterable[str]) -> str:
    """a, b and c."""
    *front, last = parts
    return f"{', '.join(front)} and {last}" if front else last
