"""The whole job: recipe and model in, a verified checkpoint out; resumable, and the output folder appears by one rename."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ..calib.blocks.sites import by_kind, kind_of
from ..calib.compressed.packing import Packed, clipped, made_dynamic
from ..calib.compressed.stored import open_stored
from ..calib.data.windows import start_token
from ..calib.files.shards import read_header, read_tensor
from ..calib.machine.device import device_name
from ..calib.machine.heap import separate_large, trim
from ..calib.machine.precision import bfloat16_products
from ..calib.machine.workers import share_of_threads, workers_for
from ..calib.outliers.outlier_tokens import search_prefix
from ..calib.walk.runner import BlockRunner
from ..calib.walk.stream import Stream
from ..common.files import BusyError, locked, once
from ..common.interruption import interruptible
from ..eval.verifying.probe import check_probe, read_probe, record_probe
from ..planning.preflight import Plan, make_plan
from ..quant.errors import PlanishError
from ..quant.transforms import Prefix, RaiseActivations, Step, SuperWeights
from ..recipe.resolve import Address
from ..recipe.schema import Recipe, digest
from ..walk.beside import located
from ..walk.block import BlockCompressor, Streams
from ..walk.callbacks import Callback, Progress, Told
from ..walk.fused import settled
from ..walk.journal import Journal
from ..walk.looks import Looks
from ..walk.raising import Need, decide, few_samples, needs_again, needs_kept, noted, summary, with_raised
from ..walk.raising_check import raising_step
from ..walk.records import BlockRecord
from .export import publish, write_checkpoint

JOURNAL = "journal.json"
BEGUN = ("journal.json.new", "lock")  # all that there is where a run was killed as it began
PROBE = (4, 32)  # samples and tokens on which smoothing is searched and checked


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A finished compression. seconds: of this call; a resumed run's earlier part is not in it. stored_bytes: size of the weight files.

    bits_per_weight: of the quantized weights, with scales and transforms.
    """

    out: Path
    plan: Plan
    blocks: tuple[BlockRecord, ...]
    seconds: float
    stored_bytes: int
    bits_per_weight: float


def compress(
    recipe: Recipe | str | Path,
    model: str | Path,
    out: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    offload_dir: str | Path | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Compress `model` as `recipe` says and write the checkpoint to the new folder `out`.

    recipe: a Recipe, a shipped name or a file. model: local folder, Hub name, GGUF file or demo:smollm2. dtype: of the walk's arithmetic (default:
    bfloat16 where model and hardware have it, else float32). offload_dir: keep the activation streams on disk there (default: in memory where they
    fit, else beside `out`). progress: who shows what happens; callbacks: who else is told, and gets every block's record and the results.
    Nothing is evaluated, so the recipe's gate is not judged: `recipe.gate.judge` does that with an evaluation's metrics.
    The same call after an interruption goes on at the block where it was and ends in the same bytes.
    Raises PlanishError; then nothing new is left behind.
    """
    target = Path(out)
    plan = make_plan(recipe, model, device=device, dtype=dtype, offload_dir=offload_dir, out=target, allow_pickle=allow_pickle)
    told = Told(progress, callbacks)
    for note in plan.notes:
        told.say(note)
    return carry_out(plan, target, told)


@torch.no_grad()
def carry_out(plan: Plan, out: Path, progress: Progress, looks: Path | None = None, finished: Callable[[Result], None] | None = None) -> Result:
    """What the plan says, into the new folder `out`. A progress that is a Callback gets the numbers too. looks: folder that runs share.

    finished: told of the result as the folder is about to get its name, so that what it notes is there whenever the folder is.
    """
    start, numbers = time.monotonic(), progress if isinstance(progress, Callback) else Callback()
    if plan.offload:
        separate_large()  # whoever saves memory on streams pays a little time for the rest too
    progress.stage("checking weights", plan.checkpoint.nbytes)
    plan.checkpoint.check_finite(lambda done, _all: progress.step(done))
    with _working_folder(out, plan) as journal, _stream_folder(out, plan, journal.folder) as folder_of_streams:
        if journal.blocks:
            progress.say(f"going on: {len(journal.blocks)} of {plan.topology.block_count} blocks are done")
        plan, runner, steps = begun(plan, progress, journal.folder)
        plan, needs = _raised(plan, steps, folder_of_streams, progress, journal.folder)
        streams = streams_of(plan, runner, folder_of_streams)
        shared = None if looks is None else Looks(looks, f"{plan.dtype} {device_name(plan.device)} {torch.get_num_threads()} {plan.prefix}")
        compressor = BlockCompressor(runner, plan.recipe.solver, steps, plan.packed, streams, shared)
        progress.stage("blocks", plan.topology.block_count)
        for index in range(plan.topology.block_count):
            if index < len(journal.blocks):
                tensors = _stored_block(journal.block_file(index), plan.device)
                compressor.advance(journal.blocks[index], tensors, packed_linears(plan, journal.blocks[index]))
            else:
                result = compressor.compress(index)
                noted(result.record, needs)
                journal.add(result.record, result.tensors)
            progress.step(index + 1, _describe(journal.blocks[index]))
            numbers.on_block(journal.blocks[index])
        trim()
        probe = None if streams is None else _probe(plan, runner, streams)
        del streams, compressor, runner
        trim()
        progress.stage("writing and reloading", 2)
        folder = journal.folder / "checkpoint"
        linears = {name: how for block in journal.blocks for name, how in packed_linears(plan, block).items()}
        bits = write_checkpoint(plan, journal, linears, probe, folder)
        progress.step(1)
        _check(folder, plan)
        progress.step(2)
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found = Result(out, plan, tuple(journal.blocks), time.monotonic() - start, stored, bits)
        if finished is not None:
            finished(found)
        publish(folder, out)
    numbers.on_metrics({"bits_per_weight": bits, "bytes": stored, "seconds": found.seconds})
    return found


@contextmanager
def _working_folder(out: Path, plan: Plan) -> Iterator[Journal]:
    """OUT.partial while the work lasts: removed when it is done or refused, left for the next try when it was interrupted."""
    folder = out.with_name(out.name + ".partial")
    fresh = not folder.exists()
    if not fresh and not (folder / JOURNAL).exists() and any(path.name not in BEGUN for path in folder.iterdir()):
        raise PlanishError(f"{folder}: exists and is no unfinished run of planish, which would work there. Move it, or choose another output folder.")
    parents = [parent for parent in folder.absolute().parents if not parent.exists()]
    mark = fingerprint(plan)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder), interruptible():  # whoever works there is not told of the remains of a run
            yield Journal.open(folder, mark)
    except BusyError:
        raise
    except PlanishError:
        if fresh:
            shutil.rmtree(folder)
            with suppress(OSError):  # somebody else's files lie there by now
                for parent in parents:
                    parent.rmdir()
        raise
    shutil.rmtree(folder)


@contextmanager
def _stream_folder(out: Path, plan: Plan, working: Path) -> Iterator[Path | None]:
    """Where the activation streams lie, None: in memory. Empty at first and gone at the end; a killed run's is found again by its output's name."""
    if not plan.offload:
        yield None
        return
    mark = hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:8]
    folder = working / "streams" if plan.offload_dir is None else plan.offload_dir / f"{out.name}.streams-{mark}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint(plan: Plan) -> str:
    """SHA-256 (hex) of all that decides the result's bytes: recipe, model, text, versions, arithmetic, threads."""
    parts = [
        digest(plan.recipe),
        plan.checkpoint.fingerprint(),
        *(f"{name} {version(name)}" for name in ("planish", "torch", "transformers", "compressed-tensors")),
        f"{plan.dtype} {device_name(plan.device)} {torch.get_num_threads()}",
        "" if plan.ids is None else hashlib.sha256(plan.ids.numpy().tobytes()).hexdigest(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def begun(plan: Plan, progress: Progress, kept: Path | None = None) -> tuple[Plan, BlockRunner, tuple[Step, ...]]:
    """What is found before the walk: the plan with weights rewritten and with its prefix, how that model runs, the steps with their places.

    kept: the folder where that is kept, for a run that goes on.
    """
    plan = _prefixed(_settled(plan, progress, kept), progress, kept)
    runner = BlockRunner(plan.source, plan.dtype, plan.device)
    return plan, runner, _located(plan, runner, progress, kept)


def _settled(plan: Plan, progress: Progress, kept: Path | None) -> Plan:
    """With the rewritten weights as they will be, and checked."""
    if plan.fused is None:
        return plan
    progress.stage("rewriting", 1)
    found = settled(plan.recipe.steps, BlockRunner(plan.checkpoint, plan.dtype, plan.device), plan.ids, kept)
    trim()
    progress.step(1, f"off by {max(found.errors.values()):.2g}")
    return replace(plan, fused=found)


def _prefixed(plan: Plan, progress: Progress, kept: Path | None) -> Plan:
    """With the tokens of a prefix that is to be found, which takes a stage of its own."""
    if not any(isinstance(step, Prefix) and step.tokens == "auto" for step in plan.recipe.steps):
        return plan
    assert plan.ids is not None
    progress.stage("prefix", plan.topology.block_count)
    tokenizer = plan.checkpoint.tokenizer()
    ids = plan.ids

    def find() -> tuple[int, ...]:
        with bfloat16_products(plan.dtype is torch.bfloat16):
            runner = BlockRunner(plan.checkpoint, plan.dtype, plan.device)
            found = search_prefix(runner, ids, lambda token: str(tokenizer.decode([token])), start_token(tokenizer), progress.step)
        return () if found is None else found.token_ids

    tokens = once(kept, "prefix", find, lambda found: (found, {}), lambda found, _: tuple(found))
    if not tokens:
        progress.say("no prefix: no token of the calibration text is an outlier.")
        return plan
    progress.say(f"prefix {tokenizer.decode(list(tokens))!r} ({', '.join(map(str, tokens))}): the tokens that are outliers.")
    return replace(plan, prefix=tokens)


def _located(plan: Plan, runner: BlockRunner, progress: Progress, kept: Path | None) -> tuple[Step, ...]:
    """The recipe's steps with the places of super weights, which take a stage of its own to find."""
    if not any(isinstance(step, SuperWeights) and step.places == "auto" for step in plan.recipe.steps):
        return plan.recipe.steps
    progress.stage("super weights", plan.topology.block_count)
    steps = located(plan.recipe.steps, runner, plan.ids, progress.step, kept)
    if not any(isinstance(step, SuperWeights) and step.places for step in steps):
        progress.say("no super weights: no single weight makes a spike of the residual stream at the step's sites.")
    return steps


def _raised(plan: Plan, steps: tuple[Step, ...], folder: Path | None, progress: Progress, kept: Path) -> tuple[Plan, Mapping[Address, Need]]:
    """The plan with more bits for the activations of a few sites, if a step asks for it, which takes a stage of its own; and what was measured."""
    step = raising_step(steps)
    if step is None:
        return plan, {}
    progress.stage("activations' needs", plan.topology.block_count)
    needs = once(kept, "needs", partial(_needs, plan, step, steps, folder, progress), needs_kept, needs_again)
    progress.say(summary(needs))
    return replace(plan, packed=with_raised(plan.packed, needs)), needs


def _needs(plan: Plan, step: RaiseActivations, steps: tuple[Step, ...], folder: Path | None, progress: Progress) -> Mapping[Address, Need]:
    """What the sites' activations need, by a pass over a few samples; its streams on disk in the folder, None: in memory."""
    assert plan.ids is not None
    few, folder = replace(plan, ids=plan.ids[: few_samples(plan.ids)]), None if folder is None else folder / "needs"
    runner = BlockRunner(plan.source, plan.dtype, plan.device)
    streams = streams_of(few, runner, folder)
    assert streams is not None
    streams.before = Stream(None if folder is None else folder / "before")
    needs = decide(step, BlockCompressor(runner, plan.recipe.solver, steps, plan.packed, streams), streams, plan.packed, progress.step)
    if folder is not None:
        shutil.rmtree(folder)
    return needs


def streams_of(plan: Plan, runner: BlockRunner, folder: Path | None) -> Streams | None:
    """What flows through the walk, before its first block; None where the recipe needs no text. folder: on disk there, None: in memory."""
    calibration = plan.recipe.calibration
    if calibration is None or plan.ids is None:
        return None
    ids, prefix = plan.ids, runner.lay_prefix(plan.prefix) if plan.prefix else None
    batches = [ids[start : start + calibration.batch_size] for start in range(0, len(ids), calibration.batch_size)]
    probe = ids[: PROBE[0], : PROBE[1]]

    def stream(name: str) -> Stream:
        return Stream(None if folder is None else folder / name)

    full, quant = stream("full"), stream("quant")
    calls = []
    for i, (hidden, call) in enumerate(runner.start([*batches, probe])):
        if i < len(batches):
            full[i] = hidden
            quant[i] = hidden
        calls.append(call)
    before = stream("before") if plan.recipe.solver.needs_cross else None
    held = plan.recipe.held_key_values(len(plan.prefix))
    return Streams(full, quant, before, calls[:-1], calls[-1], (probe.shape[0], probe.shape[1]), plan.replay, prefix, held)


def _stored_block(file: Path, device: torch.device) -> dict[str, Tensor]:
    return {name: read_tensor(info).to(device) for name, info in read_header(file).items()}


def packed_linears(plan: Plan, record: BlockRecord) -> dict[str, Packed]:
    """How a finished block's quantized linears are stored, by full name."""
    linears: dict[str, Packed] = {}
    for site in plan.topology.block(record.index).sites:
        how = plan.packed[record.index, site.name]
        if how is not None:
            how = made_dynamic(how) if record.sites[site.name].made_dynamic else how
            how = how if record.sites[site.name].clip == 1 else clipped(how, record.sites[site.name].clip)
            linears.update({f"{plan.topology.blocks}.{record.index}.{path}": how for path in site.readers})
    return linears


def _describe(record: BlockRecord) -> str:
    parts = [] if record.error is None else [f"error {record.error:.4f}"]
    parts += [] if record.polished is None else [f"polished {record.polished[0]:.4f} to {record.polished[1]:.4f}"]
    figures: dict[str, dict[str, object]] = {"smoothing": {}, "scaling": {}, "auto": {}}
    for name, site in record.sites.items():
        settings = {f"chosen {setting}": f"{value:g}" for setting, value in site.settings.items()}
        for words, value in {"smoothing": site.strength, "scaling": site.exponent, "auto": site.chosen, **settings}.items():
            figures.setdefault(words, {}).update({} if value is None else {name: value})
    parts += [f"{words} {', '.join(_each(values))}" for words, values in figures.items() if values]
    notes: dict[tuple[str, str], list[str]] = {}
    for name, site in record.sites.items():
        if site.note:
            notes.setdefault((kind_of(name), site.note), []).append(name)
    parts += [f"{names[0] if len(names) == 1 else f'{kind} of {len(names)} experts'}: {note}" for (kind, note), names in notes.items()]
    return ", ".join(parts)


def _each(values: Mapping[str, object]) -> list[str]:
    """What was decided for each site; experts together, from the smallest to the largest."""
    words = []
    for kind, names in by_kind(values).items():
        found = sorted({values[name] for name in names}, key=str)
        words.append(f"{names[0] if len(names) == 1 else kind} {found[0]}{f' to {found[-1]}' if len(found) > 1 else ''}")
    return words


def _probe(plan: Plan, runner: BlockRunner, streams: Streams) -> dict[str, Tensor]:
    """What the quantized model in memory says of the first calibration batch."""
    assert plan.recipe.calibration is not None
    assert plan.ids is not None
    ids = plan.ids[: plan.recipe.calibration.batch_size]
    with bfloat16_products(plan.dtype is torch.bfloat16):
        return record_probe(runner, streams.quant[0], ids, share_of_threads(workers_for(len(streams.calls), plan.device)))


def _check(folder: Path, plan: Plan) -> None:
    """Reload the written checkpoint: it computes what the model in memory did."""
    checkpoint, probe = open_stored(folder), read_probe(folder)
    if probe is None:
        return
    found = check_probe(checkpoint, probe, device=plan.device, report=lambda _done, _all: trim())
    if not found.ok:
        raise PlanishError(
            f"{folder}: reloaded, the checkpoint differs from the model in memory by {found.logprob_mean:.3g} nats per token "
            f"(at most {found.tolerance.mean:g}). Try again; if it happens again, the disk or planish is broken."
        )
