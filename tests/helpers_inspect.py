"""A report as `planish inspect` makes it, with SmolLM2-135M's known figures, for whatever shows reports."""

from dataclasses import replace

import numpy as np

from planish.calib.outliers.diagnosis import (
    SCHEMES,
    TRANSFORMS,
    Attention,
    Choice,
    Figures,
    Intervention,
    Landscape,
    LayerMagnitudes,
    MassiveActivation,
    OutlierReport,
    OutlierToken,
    Prefix,
    Recommendation,
    SinkHead,
    SiteFigures,
    SuperWeight,
    Thresholds,
)

BLOCKS, HIDDEN, HEADS = 30, 576, 9
WIDTHS = {"qkv": 576, "o": 576, "gate_up": 576, "down": 1536}
HARD = {2: 9.0, 9: 5.0, 10: 6.5}  # down inputs that stay hard without position 0
SPIKES = {11: 3183.0, 28: 2384.0}  # down inputs with a spike at position 0
BORN, DIED, PEAK = 11, 28, 25_300.0
CHANNELS = {507: PEAK, 247: -2140.0, 14: 1610.0, 100: -1130.0}
TOKENS = ("<|im_start|>", "user", "\n", "The", " sea", " was", " calm", ".", " <b>", " and", ' "', "quoted", '"', "</script>", " text", "!")

RECIPE = """\
# 4-bit weights and activations; the spikes at position 0 stay in 8 bits.
name: w4a4-inspected
description: int4 weights and activations; down_proj of layers 2, 9 and 10 at 8 bits.
calibration: {source: builtin, samples: 32, length: 512, seed: 0}
scheme:
  weights: {bits: 4, granularity: channel}
  activations: {bits: 4, granularity: token}
overrides:
  - sites: ["2.down", "9.down", "10.down"]
    activations: {bits: 8, granularity: token}
solver:
  gptaq: {alpha: 0.5, order: diagonal, damping: 0.01}
"""


def smollm2_report() -> OutlierReport:
    """32 samples of 512 tokens through 30 layers of 4 sites. Made, not measured, but for the figures that are known."""
    dice = np.random.default_rng(507)
    return OutlierReport(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        family="llama",
        blocks=BLOCKS,
        hidden=HIDDEN,
        compressed=False,
        text="builtin, evaluation half",
        samples=32,
        length=512,
        thresholds=Thresholds(),
        quality="perplexity",
        magnitudes=_magnitudes(dice),
        massive=_massive(),
        interventions=(
            Intervention(name="unchanged", layer=None, quality=20.25),
            Intervention(name="massive activations set to zero", layer=BORN, quality=6183.4),
            Intervention(name="massive activations set to their mean", layer=BORN, quality=20.31),
        ),
        super_weights=(_super_weight(),),
        **_attention(dice),
        outlier_tokens=(
            OutlierToken(token_id=1, text="<|im_start|>", count=32, initial=32, inside=0, present=2, ratio=412.0, site="11.down"),
            OutlierToken(token_id=198, text="\n", count=3, initial=0, inside=3, present=32, ratio=71.2, site="2.down"),
        ),
        prefix=Prefix(token_ids=(1,), text="<|im_start|>", length=1),
        sites=tuple(_site(dice, block, site) for block in range(BLOCKS) for site in WIDTHS),
        landscapes=tuple(_landscape(dice, layer) for layer in range(-1, BLOCKS)),
        recommendation=Recommendation(
            recipe=RECIPE,
            scheme="w4a4",
            choices=(
                Choice(what="Hadamard rotation at every site", why="it lowers the median W4A4 error from 24 % to 9 %; smoothing alone to 17 %."),
                Choice(what="8-bit activations at 2.down, 9.down and 10.down", why="they keep errors above 20 % after every transform."),
                Choice(what='prefix "<|im_start|>"', why="down_proj of layers 11 and 28 carry spikes 400 times the median at position 0 only."),
            ),
        ),
        findings=(
            "Channel 507 carries 25,300 at position 0, from layer 11's output to layer 27's: 52,000 times the median, and the same for every text.",
            "It is a bias, not information: setting it to zero ruins the model (perplexity 20.25 to 6,183), its mean does not (20.31).",
            "down_proj's input reaches 3,183 in layer 11 and 2,384 in layer 28, both at position 0 only: without it they are mild.",
            "down_proj of layers 2, 9 and 10 stays hard without position 0 (kurtosis 2,000 to 39,000).",
            "142 of 270 heads are sink heads.",
        ),
        seconds=97.4,
        peak_bytes=1_630_000_000,
    )


def compressed_report() -> OutlierReport:
    """The same model after compression: nothing is measured of its rounding, and nothing recommended."""
    base = smollm2_report()
    return replace(
        base,
        model="build/smollm2-w8a8",
        compressed=True,
        sites=tuple(
            replace(site, errors={}, errors_every={}, channel_absmax_after={}, ordinary=_scaled(site.ordinary, 0.6), every=_scaled(site.every, 0.6))
            for site in base.sites
        ),
        interventions=(Intervention(name="unchanged", layer=None, quality=20.71), *base.interventions[1:]),
        recommendation=None,
        findings=("The massive activation is still there: 25,100 in channel 507.", "The hardest site, 2.down, is 40 % easier than it was."),
        seconds=61.0,
    )


def bare_report() -> OutlierReport:
    """The least a report can hold: of a model with nothing to find, or a vision transformer without text."""
    base = smollm2_report()
    return replace(
        base,
        model="tiny",
        quality="feature change",
        magnitudes=(),
        massive=(),
        interventions=(),
        super_weights=(),
        sink_heads=(),
        attention=None,
        outlier_tokens=(),
        prefix=None,
        sites=(),
        landscapes=(),
        recommendation=None,
        findings=(),
    )


def _scaled(figures: Figures, factor: float) -> Figures:
    return replace(figures, kurtosis=figures.kurtosis * factor, crest=figures.crest * factor, difficulty=figures.difficulty * factor)


def _peak(layer: int, channel: int) -> float:
    """A massive channel along depth, layer -1 first."""
    value = CHANNELS[channel]
    if layer < BORN or layer >= DIED:
        return float(np.sign(value) * (3.0 + 0.4 * (layer + 2)))
    return value * (1.0 + 0.0009 * (layer - BORN))


def _magnitudes(dice: np.random.Generator) -> tuple[LayerMagnitudes, ...]:
    rows = []
    for layer in range(-1, BLOCKS):
        median = 0.08 * 1.08 ** (layer + 1)
        alive = BORN <= layer < DIED
        usual = (40 + 12 * dice.random(3)) * median * (1 + (layer >= 2) * 3)
        top = sorted((abs(_peak(layer, channel)) for channel in CHANNELS), reverse=True)[:3] if alive else sorted(usual, reverse=True)
        rows.append(
            LayerMagnitudes(
                layer=layer,
                top=(float(top[0]), float(top[1]), float(top[2])),
                median=median,
                massive=4 * 32 if alive else 0,
                large=192 if alive else int(layer > 2) * 14,
                residual_peak=float(310 * dice.uniform(0.9, 1.1)) if alive else float(dice.uniform(0.9, 1.4)),
            )
        )
    return tuple(rows)


def _massive() -> tuple[MassiveActivation, ...]:
    return tuple(
        MassiveActivation(
            layer=DIED - 1,
            position=0,
            token="<|im_start|>",
            channel=channel,
            value=value,
            largest=value * 1.0154,
            ratio=abs(value) / 0.485,
            spread=0.0004 if channel == 507 else 0.012,
            constant=True,
            share=1.0,
            born=BORN,
            died=DIED,
            massive=True,
            by_layer=tuple(_peak(layer, channel) for layer in range(-1, BLOCKS)),
        )
        for channel, value in CHANNELS.items()
    )


def _super_weight() -> SuperWeight:
    name = "model.layers.11.mlp.down_proj"
    return SuperWeight(module=name, layer=11, row=507, column=1021, value=-1.92, activation=-3183.0, output=6120.0, quality=212.7)


def _attention(dice: np.random.Generator) -> dict[str, object]:
    layers = np.arange(BLOCKS)[:, None]
    score = np.clip(dice.beta(1.3, 2.2, (BLOCKS, HEADS)) * 0.4 + 0.72 * ((layers >= 12) & (dice.random((BLOCKS, HEADS)) < 0.83)), 0, 0.98)
    drain = np.clip(1.1 - score * 1.05 + dice.normal(0, 0.05, score.shape), 0.03, None)
    rows = [(layer, head) for layer, head in np.argwhere(score > 0.3)]
    heads = [
        SinkHead(
            layer=int(layer),
            head=int(head),
            score=float(score[layer, head]),
            drain=float(drain[layer, head]),
            dormant=bool(score[layer, head] > 0.9),
        )
        for layer, head in rows
    ]
    return {
        "sink_heads": tuple(heads),
        "attention": Attention(score=tuple(map(tuple, score.tolist())), drain=tuple(map(tuple, drain.tolist())), windows=4),
    }


def _site(dice: np.random.Generator, block: int, site: str) -> SiteFigures:
    heavy = {"qkv": 2.2, "o": 1.1, "gate_up": 1.6, "down": 1.0}[site] * (HARD.get(block, 1.0) if site == "down" else 1.0)
    spread = np.abs(dice.lognormal(0, 0.55, 256)) * heavy
    spread[dice.integers(256)] *= 8 * heavy
    mild = Figures(
        absmax=float(spread.max()),
        kurtosis=float(30 * heavy**3 * dice.uniform(0.5, 1.5)),
        crest=float(spread.max() / 0.7),
        difficulty=float(spread.std()),
        token_ratio=float(dice.uniform(2, 9) * heavy),
    )
    spike = SPIKES.get(block, 0.0) if site == "down" else 0.0
    every = replace(mild, absmax=spike, kurtosis=411_000.0, crest=spike / 0.7, difficulty=61.0, token_ratio=400.0) if spike else mild
    after = {"smooth": spread**0.6, "hadamard": np.full(256, spread.mean()) * dice.uniform(0.9, 1.5, 256)}
    after["both"] = after["hadamard"] * 0.8
    errors = _errors(dice, heavy)
    return SiteFigures(
        block=block,
        site=site,
        channels=WIDTHS[site],
        every=every,
        ordinary=mild,
        sink_tokens=32,
        hosted=site != "down" or block % 2 == 0,
        errors=errors,
        errors_every={scheme: {name: error * (3 if spike else 1.05) for name, error in row.items()} for scheme, row in errors.items()},
        channel_absmax=tuple(spread.tolist()),
        channel_absmax_after={name: tuple(values.tolist()) for name, values in after.items()},
    )


def _errors(dice: np.random.Generator, heavy: float) -> dict[str, dict[str, float]]:
    bits, help_ = {"w8a8": 0.012, "w4a8": 0.09, "w4a4": 0.16}, {"plain": 1.0, "smooth": 0.75, "hadamard": 0.5, "both": 0.46}
    assert tuple(bits) == SCHEMES
    assert tuple(help_) == TRANSFORMS
    return {
        scheme: {name: float(base * factor * heavy**0.6 * dice.uniform(0.85, 1.15)) for name, factor in help_.items()}
        for scheme, base in bits.items()
    }


def _landscape(dice: np.random.Generator, layer: int) -> Landscape:
    positions, edges = 64, np.arange(0, HIDDEN, 5)
    median = 0.08 * 1.08 ** (layer + 1)
    values = np.abs(dice.standard_normal((positions, len(edges)))) * median * dice.lognormal(0.4, 0.6, len(edges))
    for channel in CHANNELS:
        values[0, np.searchsorted(edges, channel, side="right") - 1] = abs(_peak(layer, channel))
    return Landscape(
        layer=layer,
        positions=tuple(range(positions)),
        tokens=tuple(TOKENS[index % len(TOKENS)] if index else "<|im_start|>" for index in range(positions)),
        channels=tuple(edges.tolist()),
        width=HIDDEN,
        values=tuple(tuple(float(f"{value:.4g}") for value in row) for row in values.tolist()),
    )


def small(report: OutlierReport) -> OutlierReport:
    """The same with only a corner of one landscape: quick to write and to check."""
    corners = (replace(each, positions=each.positions[:2], tokens=each.tokens[:2], values=each.values[:2]) for each in report.landscapes[:1])
    return replace(report, landscapes=tuple(corners))
