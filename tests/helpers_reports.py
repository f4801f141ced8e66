"""Reports as compress, compare and eval make them, made up, for whatever shows reports."""

import math

from planish.comparing.pareto import COSTS, front, picks
from planish.comparing.report import Base, ComparisonReport, Quality, Row, Text
from planish.compressing.report import ArithmeticReport, Bytes, CompressReport, EvaluationReport, Machine, PlanReport, ScoreReport, SiteFormat
from planish.eval.scores.evaluation import Evaluation, MetricBase, MetricResult, TaskResult, TextBase, TextResult
from planish.eval.scores.gate import Gate
from planish.eval.scores.paired import Flips, Measured
from planish.walk.records import BlockRecord, SiteRecord

BLOCKS = 30
HARD = {"qkv": 0.05, "o": 0.09, "gate_up": 0.06, "down": 0.12}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"}
NASTY = '<b>bold</b> | & "quoted"'


def blocks() -> tuple[BlockRecord, ...]:
    """30 of 4 sites; one site of the third is in full precision, the fourth has notes."""
    return tuple(
        BlockRecord(
            index=index,
            error=0.02 * math.exp(index / 12),
            equivalence=3e-6,
            sites={
                name: SiteRecord(
                    error=None if (index, name) == (2, "down") else error * (1 + 0.5 * math.sin(index)),
                    damping=0.01,
                    strength=0.5,
                    clip=0.9,
                    chain=[{"kind": "scale"}, {"kind": "hadamard", "block": 192}],
                    chosen="scale + hadamard",
                    candidates={"scale + hadamard": 0.1, "cat": 0.09},
                    note=NASTY if index == 3 else "",
                )
                for name, error in HARD.items()
            },
        )
        for index in range(BLOCKS)
    )


def compress_report() -> CompressReport:
    """W4A4 of a model of 30 blocks and 4 sites, one of them kept in one block; the gate is missed."""
    kept = SiteFormat(blocks=tuple(range(BLOCKS)), weights="int4 per channel", activations="int4 per token", layout=None)
    plan = PlanReport(
        recipe={"name": "w4a4-auto", "steps": ["shift", {"clip": {"grid": 8}}], "scheme": {"weights": {"bits": 4}}},
        model="/models/smollm2",
        family="llama",
        blocks=BLOCKS,
        sites=dict.fromkeys(HARD, (kept,)),
        bytes=Bytes(before=269_060_552, after=112_000_000),
        bits_per_weight=4.3,
        arithmetic=ArithmeticReport(dtype="bfloat16", device="cpu"),
        memory={"program": 500_000_000, "total": 700_000_000},
        memory_evaluating={"program": 500_000_000, "total": 800_000_000},
        memory_writing=None,
        prefix=(1,),
        offload=False,
        replay=False,
        disk=300_000_000,
        seconds=70.0,
        seconds_evaluating=20.0,
        servers=("planish",),
        notes=("planish alone runs this checkpoint: inputs are transformed at run time.", NASTY),
    )
    evaluation = EvaluationReport(
        source="builtin, evaluation half",
        windows=4,
        length=2048,
        dtype="float32",
        seconds=21.0,
        base=ScoreReport(nll=2.281, perplexity=9.79, tokens=8188),
        quantized=ScoreReport(nll=2.42, perplexity=11.25, tokens=8188),
        kl=0.143,
        agreement=0.843,
    )
    return CompressReport(
        planish="0.1.0",
        finished="2026-11-22T20:00:00+00:00",
        model="demo:smollm2",
        model_sha256="1f" * 32,
        recipe_sha256="2e" * 32,
        checkpoint="/somewhere/out",
        bytes=Bytes(before=269_060_552, after=112_345_678),
        bits_per_weight=4.31,
        evaluation=evaluation,
        gate=Gate(kl=0.1, perplexity_ratio=1.2).judge({"kl": Measured(value=0.143), "perplexity_ratio": Measured(value=1.149)}, "the built-in text"),
        seconds=82.9,
        peak_bytes=715_000_000,
        machine=Machine(platform="Linux-6.1-x86_64", cpus=2, threads=2, versions=VERSIONS),
        blocks=blocks(),
        plan=plan,
    )


def row(name: str, kl: float, size: int, seconds: float, servers: tuple[str, ...] = ("planish", "transformers", "vLLM")) -> Row:
    """A recipe's result on two texts."""
    quality = {
        text: Quality(perplexity=9.79 * math.exp(factor * kl), change=math.exp(factor * kl) - 1, kl=factor * kl, agreement=1 - kl)
        for text, factor in (("builtin", 1.0), ("wiki", 1.4))
    }
    return Row(
        recipe=name,
        description="",
        sha256="3d" * 32,
        calibration_sha256=None,
        bits_per_weight=8 * size / 269e6,
        bytes=size,
        seconds=seconds,
        peak_bytes=700_000_000,
        resumed=False,
        servers=servers,
        notes=(),
        quality=quality,
        checkpoint=None,
    )


def comparison_report() -> ComparisonReport:
    """Six recipes on two texts."""
    rows = (
        row("w8a8", 0.006, 164_000_000, 36),
        row("w4a8-samples=8-damping=0.01", 0.21, 112_000_000, 30),
        row("w4a8-samples=32-damping=0.01", 0.17, 112_000_000, 56),
        row("w4a16-g128", 0.08, 114_600_000, 44),
        row("w4a4-fast", 0.24, 113_000_000, 29, ("planish",)),
        row("w4a8-best", 0.07, 121_000_000, 81, ("planish",)),
    )
    return ComparisonReport(
        planish="0.1.0",
        finished="2026-11-22T20:00:00+00:00",
        model="demo:smollm2",
        model_sha256="1f" * 32,
        family="llama",
        blocks=BLOCKS,
        arithmetic="bfloat16",
        device="cpu",
        platform="Linux-6.1-x86_64",
        threads=1,
        jobs=2,
        versions=VERSIONS,
        texts=tuple(Text(name=name, source=name, windows=4, length=2048, sha256="4c" * 32) for name in ("builtin", "wiki")),
        base=Base(bits=16, bytes=269_060_552, perplexity={"builtin": 9.79, "wiki": 20.25}),
        rows=rows,
        fronts={what: front(rows, cost) for what, cost in COSTS.items()},
        picks=picks(rows, 0.05),
        notes=("builtin is what is kept for evaluation of the text that was calibrated on.",),
    )


def evaluation() -> Evaluation:
    """A text and two tasks against the base model, with a gate."""
    base = MetricBase(
        value=0.62,
        error=0.01,
        difference=Measured(value=-0.02, error=0.006),
        recovery=Measured(value=96.8, error=0.9),
        flips=Flips(lost=31, gained=12, p_value=0.005),
    )
    main = MetricResult(value=0.60, error=0.01, higher_is_better=True, right_or_wrong=True, base=base)
    tasks = tuple(
        TaskResult(name=name, version="1", samples=570, shots=0, sha256="5b" * 32, main="acc", metrics={"acc": main}, base_cached=False)
        for name in ("arc_easy", "piqa")
    )
    text = TextResult(
        source="builtin",
        sha256="6a" * 32,
        windows=4,
        length=2048,
        stride=2048,
        bos="none",
        tokens=8188,
        dtype="float32",
        perplexity=Measured(value=11.25, error=0.4),
        base=TextBase(
            perplexity=9.79,
            ratio=Measured(value=1.149, error=0.01),
            kl=Measured(value=0.143, error=0.004),
            agreement=Measured(value=0.84, error=0.01),
        ),
    )
    return Evaluation(
        planish="0.1.0",
        finished="2026-11-22T20:00:00+00:00",
        model="out",
        model_sha256="7f" * 32,
        against="demo:smollm2",
        against_sha256="1f" * 32,
        limit=None,
        batch_size=8,
        dtype="bfloat16",
        device="cpu",
        threads=2,
        versions={"torch": "2.13.0", "lm-eval": "0.4.9"},
        seconds=300.0,
        text=text,
        tasks=tasks,
        recovery=Measured(value=96.8, error=0.7),
        gate=Gate(recovery=95).judge({"recovery": Measured(value=96.8, error=0.7)}, "arc_easy, piqa"),
    )
