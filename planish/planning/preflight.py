"""Preflight: everything that can be known before the first block, and refused: topology, sites, formats, text, memory, disk, time, consumers.

The topology is held against the first and the last block's real weights here, so that a wrong table costs a second and not an hour.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..calib.blocks.prefix import prefix_ids
from ..calib.blocks.proof import check_structure, prove
from ..calib.blocks.sites import Topology
from ..calib.compressed.key_values import check_key_values
from ..calib.compressed.packing import Layout, Packed, default_layout
from ..calib.data.own_text import SOURCE, is_written, own_text
from ..calib.data.windows import Calibration
from ..calib.files.checkpoint import Checkpoint, check_language, open_checkpoint
from ..calib.machine.device import free_bytes, own_memory, pick_device
from ..calib.machine.heap import separate_large, trim
from ..calib.machine.precision import bfloat16_products, working_dtype
from ..calib.walk.runner import BlockRunner
from ..common.outfile import check_writable
from ..common.units import counted, size
from ..quant.errors import PlanishError
from ..quant.formats import NVFP4, Scheme
from ..quant.transforms import Prefix
from ..recipe.resolve import Address, Resolved, resolve
from ..recipe.schema import Recipe, load_recipe
from ..walk.attention import check_attention
from ..walk.beside import check_beside
from ..walk.fused import Fused, fused
from ..walk.raising_check import check_raising
from .estimate import Memory, Sizes, evaluating_seconds, resident, writing
from .idle import idle
from .servers import PLAIN_LINEARS, misread_experts, servers

ARITHMETIC = (torch.float32, torch.bfloat16)  # of the walk; float16 has no room for massive activations
AVAILABLE_SHARE = 0.6  # of the memory that is free, what a run may take before its streams move to disk
PROOF_TOKENS = 8  # evenly from the whole vocabulary
NAMED = 3  # of the tensors that are left out


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a run would do, and what it takes.

    fused: what the steps absorb into the weights before the walk, if anything. offload: the streams lie on disk, in offload_dir or (None) beside the
    output; replay: blocks are run anew for each site instead of waiting inside.
    quantized: how many weights become codes; bits_per_weight: of these, transforms that come yet aside.
    memory: of the compression at its highest; evaluation: of measuring the result afterwards; writing: of the model while it
    writes the text, None where it writes none. out_bytes: of the new checkpoint's weights;
    disk: bytes needed while the run lasts. seconds: of the compression; seconds_evaluating: of measuring.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    fused: Fused | None
    topology: Topology
    device: torch.device
    dtype: torch.dtype
    packed: dict[Address, Packed | None]
    ids: Tensor | None
    prefix: tuple[int, ...]
    notes: tuple[str, ...]
    servers: tuple[str, ...]
    quantized: int
    bits_per_weight: float
    offload: bool
    offload_dir: Path | None
    replay: bool
    memory: Memory
    evaluation: Memory
    writing: Memory | None
    out_bytes: int
    disk: int
    seconds: float
    seconds_evaluating: float

    @property
    def source(self) -> Checkpoint:
        """What the walk sees: the checkpoint, or what the steps made of it."""
        return self.checkpoint if self.fused is None else self.fused.source


def make_plan(
    recipe: Recipe | str | Path,
    model: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    offload_dir: str | Path | None = None,
    out: Path | None = None,
    allow_pickle: bool = False,
    ids_NL: Tensor | None = None,
) -> Plan:
    """Check that the recipe can be carried out on the model and say what it will take. Of the weights, reads embeddings, first and last block.

    Raises PlanishError: anything wrong with model or recipe, a topology that does not hold, groups that do not divide, patterns without a site,
    too little text, disk or memory. ids_NL: the calibration's tokens, if known already; where the model writes them it is run for that.
    """
    _begin(out, offload_dir)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    original = runner = _opened(model, device, dtype, allow_pickle)
    checkpoint, topology = runner.checkpoint, runner.topology
    widths = runner.site_widths()
    resolved = resolve(recipe, topology, lambda block, site: widths[block, site])
    packed = _packed(recipe, resolved, topology.family)
    raising = _check(recipe, packed, runner)
    written = _writing(recipe.calibration, runner, ids_NL)
    ids = None if recipe.calibration is None else _ids(recipe.calibration, runner, ids_NL)
    _prove(runner)
    trim()
    found, notes = fused(recipe.steps, runner, resolved.schemes)
    runner = runner if found is None else BlockRunner(found.source, original.dtype, original.device)
    sizes, program = Sizes(runner, recipe, packed), resident()
    elsewhere = None if offload_dir is None else Path(offload_dir)
    offload, replay = _saving(sizes, program, elsewhere is not None)
    moved = sizes.streams if offload else 0
    _check_disk(out, 2 * sizes.out_bytes, elsewhere, moved)
    return Plan(
        recipe=recipe,
        checkpoint=checkpoint,
        fused=found,
        topology=topology,
        device=original.device,
        dtype=original.dtype,
        packed=packed,
        ids=ids,
        prefix=_prefix(recipe, checkpoint),
        notes=(*_unused(checkpoint), *_few(ids, recipe, widths), *notes, *raising, *_of_formats(recipe, resolved, packed, topology)),
        servers=("planish",) if recipe.extended else servers(packed, topology),
        quantized=sizes.quantized,
        bits_per_weight=sizes.bits,
        offload=offload,
        offload_dir=elsewhere,
        replay=replay,
        memory=sizes.compressing(program, offload, replay),
        evaluation=sizes.evaluating(program, offload),
        writing=written,
        out_bytes=sizes.out_bytes,
        disk=2 * sizes.out_bytes + moved,
        seconds=sizes.seconds(replay),
        seconds_evaluating=evaluating_seconds(checkpoint, original.device),
    )


def _begin(out: Path | None, offload_dir: str | Path | None) -> None:
    """PlanishError if the output exists. Where memory is to be saved, the heap does not grow by what planning reads: it would keep that."""
    if out is not None:
        _check_free(out)
    if offload_dir is not None:
        check_writable(Path(offload_dir) / "streams")
        separate_large()


def _check_disk(out: Path | None, written: int, elsewhere: Path | None, moved: int) -> None:
    """PlanishError if there is no room for so many bytes written at `out`, and moved there or elsewhere."""
    needs = {} if out is None else {out: written + (moved if elsewhere is None else 0)}
    check_room(needs if elsewhere is None else {**needs, elsewhere: moved})


def _opened(model: str | Path, device: str | None, dtype: torch.dtype | None, allow_pickle: bool) -> BlockRunner:
    """The model, checked as far as names and shapes go, and how it will be computed."""
    if dtype is not None and dtype not in ARITHMETIC:
        raise PlanishError(f"dtype is {dtype!r}, but the arithmetic of a compression is torch.float32 or torch.bfloat16. Give one, or leave it out.")
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    check_language(checkpoint, "compress it")
    where = pick_device(device)
    runner = BlockRunner(checkpoint, dtype or working_dtype(checkpoint.dtype, where), where)
    _check_structure(runner)
    return runner


def _check(recipe: Recipe, packed: dict[Address, Packed | None], runner: BlockRunner) -> tuple[str, ...]:
    """Whether the model can have what the recipe does to it; notes. PlanishError."""
    check_beside(recipe.steps, packed, runner)
    check_attention(recipe.solver, runner.topology, packed)
    _check_key_values(recipe, runner)
    if not runner.topology.takes_prefix and any(isinstance(step, Prefix) for step in recipe.steps):
        why = "has no cache of keys and values in every block, which is what a prefix is stored as"
        why = "counts positions by the images before a text, which a prefix would move" if runner.topology.has_cache else why
        raise PlanishError(
            f"steps: prefix: a {runner.topology.family} model {why}. "
            "Take the step out: `planish recipes show NAME > mine.yaml` prints a shipped recipe."
        )
    return check_raising(recipe.steps, packed)


def _check_key_values(recipe: Recipe, runner: BlockRunner) -> None:
    """Whether the model can hold them as the recipe says. PlanishError."""
    window = getattr(runner.model.config.get_text_config(), "sliding_window", None)
    check_key_values(recipe.kv_cache, runner.topology, window, any(isinstance(step, Prefix) for step in recipe.steps))


def _packed(recipe: Recipe, resolved: Resolved, family: str) -> dict[Address, Packed | None]:
    """How the linears of each site are stored; None: in full precision. PlanishError as `layout_for`."""
    own = misread_experts(resolved.schemes)
    return {
        address: None if scheme is None else Packed(scheme, layout_for(recipe, scheme, family, own)) for address, scheme in resolved.schemes.items()
    }


def _saving(sizes: Sizes, program: int, asked: bool) -> tuple[bool, bool]:
    """Whether the streams go to disk, asked for or not, and whether blocks are run anew for each site."""
    room = program + int(free_bytes(sizes.runner.device) * AVAILABLE_SHARE)
    offload = asked or sizes.compressing(program, offload=False, replay=True).total > room
    replay = offload or sizes.compressing(program, offload=False, replay=False).total > room
    device = sizes.runner.device
    memory = sizes.compressing(program, offload, replay)
    needed = memory.total - memory.program
    if own_memory(device) is not None and needed > free_bytes(device):
        raise PlanishError(
            f"{device}: {size(free_bytes(device))} free, but the run needs about {size(needed)} there, with activations on disk. Use a larger GPU, "
            "--device cpu, or another solver: gptq takes less than gptaq, rtn least."
        )
    return offload, replay


def layout_for(recipe: Recipe, scheme: Scheme, family: str, own: bool = False) -> Layout:
    """How the recipe stores linears of this scheme. own: in a checkpoint of planish's own, whatever recipe and family. PlanishError: a layout that
    such a checkpoint does not have."""
    own, layout = own or recipe.extended or family in PLAIN_LINEARS, recipe.export.layout
    if scheme.weights is not None and scheme.weights.type == "float":
        return _float_layout(scheme, own, layout)
    if own and layout == "int-quantized":
        raise PlanishError(
            "export.layout: int-quantized is for other consumers, but planish alone runs this one, and packs its codes. Leave export.layout out."
        )
    return default_layout(scheme, own=own) if layout == "auto" else layout


def _float_layout(scheme: Scheme, own: bool, layout: str) -> Layout:
    if layout != "auto":
        raise PlanishError(f"export.layout: {layout} is for integers, and floats have {default_layout(scheme)} alone. Leave export.layout out.")
    if own:
        raise PlanishError(
            "scheme: floats in a checkpoint that planish alone runs (transforms at run time, clips, side paths, a prefix, keys and values in codes, "
            "Conv1D layers, experts of one block in several formats). Leave those out, or use integers."
        )
    return default_layout(scheme)


def _prefix(recipe: Recipe, checkpoint: Checkpoint) -> tuple[int, ...]:
    tokens = [token for step in recipe.steps if isinstance(step, Prefix) and step.tokens != "auto" for token in step.tokens]
    return prefix_ids(tokens, checkpoint.tokenizer()) if tokens else ()


def _check_structure(runner: BlockRunner) -> None:
    """There are blocks, and the family's table fits each of them by names and shapes."""
    if not len(runner.blocks):
        raise PlanishError(f"{runner.checkpoint.path}: config.num_hidden_layers is 0, so there is nothing to quantize. Give a model with blocks.")
    for index, block in enumerate(runner.blocks):
        check_structure(block, runner.topology.block(index), runner.block_name(index))


def _ids(calibration: Calibration, runner: BlockRunner, known_NL: Tensor | None) -> Tensor:
    """The calibration's tokens, made now unless they are known, which the model's tables of embeddings must have: (N, L)."""
    path, config = runner.checkpoint.path, runner.model.config.get_text_config()
    learned = len(runner.topology.embeddings) > 1  # positions come from a table too, which ends somewhere
    if learned and calibration.length > config.max_position_embeddings:
        raise PlanishError(
            f"calibration.length is {calibration.length}, but {path} has no more than {config.max_position_embeddings} positions. Lower it."
        )
    ids = _tokens(calibration, runner) if known_NL is None else known_NL
    if int(ids.max()) >= config.vocab_size:
        raise PlanishError(
            f"{path}: the tokenizer makes token {int(ids.max())}, but the model has {config.vocab_size} tokens. "
            "The tokenizer's files are another model's: copy the right ones there."
        )
    return ids


def _writing(calibration: Calibration | None, runner: BlockRunner, known_NL: Tensor | None) -> Memory | None:
    """What the model takes while it writes its text. PlanishError if there is no room, unless it is written already."""
    if calibration is None or calibration.source != SOURCE:
        return None
    device = runner.device
    memory = writing(runner.checkpoint, calibration, device, resident())
    needed, free = memory.total - memory.program, free_bytes(device)
    if known_NL is None and needed > free and not is_written(runner.checkpoint, calibration.samples, calibration.length, calibration.seed or 0):
        raise PlanishError(
            f"calibration.source: model: all of the model is in memory while it writes, about {size(needed)}, but {size(free)} are free on {device}. "
            "Give another source, such as builtin, or fewer samples."
        )
    return memory


def _tokens(calibration: Calibration, runner: BlockRunner) -> Tensor:
    """The calibration's tokens: of a text, or written by the model."""
    if calibration.source == SOURCE:
        return own_text(runner.checkpoint, calibration.samples, calibration.length, calibration.seed or 0, runner.device)
    return calibration.tokens(runner.checkpoint.tokenizer())


@torch.no_grad()
def _prove(runner: BlockRunner) -> None:
    """Hold the topology against a block of each kind and the last, on a few tokens; each is in memory in float32 only while its turn lasts."""
    vocabulary = runner.model.config.get_text_config().vocab_size
    ((hidden, call),) = runner.start([torch.linspace(0, vocabulary - 1, PROOF_TOKENS).long()[None]])
    for index in runner.topology.samples:
        block, run = runner.load_block(index, torch.float32), partial(call.run, index=index, hidden=hidden.float())
        try:
            with bfloat16_products(False):
                if not run(block).isfinite().all():
                    runner.checkpoint.check_finite()  # says which tensor it is
                prove(block, runner.topology.block(index), run, runner.block_name(index))
        finally:
            runner.release_block(index)


def _check_free(out: Path) -> None:
    """Nothing there yet, and leave to make something."""
    if out.exists() or out.is_symlink():
        raise PlanishError(f"{out}: exists, and planish overwrites nothing. Choose another output folder, or remove this one.")
    check_writable(out)


def check_room(needs: Mapping[Path, int]) -> None:
    """Enough disk. needs: bytes by folder, which need not exist yet; folders on one disk share its room."""
    needed_on: dict[int, int] = {}
    for folder, needed in needs.items():
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not parent.is_dir():
            raise PlanishError(f"{folder}: {parent} is a file. Choose another folder.")
        disk = parent.stat().st_dev
        needed_on[disk] = needed_on.get(disk, 0) + needed
        free = shutil.disk_usage(parent).free
        if free < needed_on[disk]:
            raise PlanishError(f"{parent}: {size(free)} free, but the run needs {size(needed_on[disk])} there. Free some, or write elsewhere.")


def _unused(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the files hold and the new checkpoint will not."""
    names = checkpoint.unused
    if not names:
        return ()
    more = f" and {counted(len(names) - NAMED, 'other')}" if len(names) > NAMED else ""
    held = f"{counted(len(names), 'tensor')} that the model has no place for"
    return (f"{checkpoint.path} holds {held}, left out of the output: {', '.join(names[:NAMED])}{more}.",)


def _few(ids: Tensor | None, recipe: Recipe, widths: Mapping[Address, int]) -> tuple[str, ...]:
    """That there is less text than second moments need."""
    widest = max(widths, key=lambda address: widths[address])
    if ids is None or not recipe.solver.needs_moments or ids.numel() >= widths[widest]:
        return ()
    return (
        f"calibration has {counted(ids.numel(), 'token')}, fewer than the {widths[widest]} channels of {widest[1]}'s input: what the solver knows of "
        "so many is mostly noise. Take more samples, or longer ones.",
    )


def _of_formats(recipe: Recipe, resolved: Resolved, packed: dict[Address, Packed | None], topology: Topology) -> tuple[str, ...]:
    """What follows from formats: of sites, of steps that have nothing to do there, and of who runs the checkpoint."""
    return (*resolved.notes, *idle(recipe.steps, resolved.schemes), *_warnings(packed, topology, recipe))


def _warnings(packed: dict[Address, Packed | None], topology: Topology, recipe: Recipe) -> tuple[str, ...]:
    if recipe.misread is not None:
        return (f"{recipe.misread}: so others refuse the checkpoint, and run it only with planish (docs/serving.md).",)
    if recipe.extended:
        return (
            "transforms at run time, clips, side paths, a prefix, or keys and values in codes: others run the checkpoint only with planish "
            "(docs/serving.md).",
        )
    if topology.family in PLAIN_LINEARS:
        return (f"{topology.family}: its linear layers are Conv1D modules; transformers runs the checkpoint only with planish, vLLM refuses it.",)
    quantized = [how.scheme.activations for how in packed.values() if how and how.scheme.activations is not None]
    if any(act.kind == NVFP4 for act in quantized):
        return ("NVFP4: vLLM multiplies it on GPUs from Blackwell on; on older ones it leaves activations in full precision (docs/serving.md).",)
    if any(act.bits != 8 for act in quantized):
        return ("activations of other than 8 bits: transformers simulates them, vLLM refuses the checkpoint.",)
    return ()
