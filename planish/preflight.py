"""Preflight: everything that can be known before the first block, and refused: topology, sites, formats, memory, disk, time, consumers."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from .calib.checkpoint import Checkpoint, check_language, open_checkpoint
from .calib.packing import Packed, default_layout
from .calib.precision import pick_device, working_dtype
from .calib.proof import check_structure
from .calib.runner import BlockRunner
from .calib.sites import Topology, reader_weight
from .quant.errors import PlanishError
from .recipe import Recipe, load_recipe
from .resolve import SERVED_GROUPS, Address, resolve
from .units import size

PROGRAM_BYTES = 450_000_000  # resident memory of Python with torch and transformers imported
AVAILABLE_SHARE = 0.6  # of the memory that is free, what the streams may take before they move to disk
PLAIN_LINEARS = ("gpt2",)  # families whose linear layers are transposed Conv1D modules, which servers and transformers refuse quantized


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated peak memory in bytes, by part. waiting: what batches hold while they stand inside a block (none when replayed)."""

    program: int
    block: int
    streams: int
    waiting: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.program + self.block + self.streams + self.waiting


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a run would do, and what it takes.

    offload: the streams lie on disk, in offload_dir or (None) beside the output; replay: blocks are run anew for each site instead of waiting inside.
    out_bytes: of the new checkpoint's weights; disk: bytes needed while the run lasts.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    topology: Topology
    device: torch.device
    dtype: torch.dtype
    packed: dict[Address, Packed | None]
    ids: Tensor | None
    notes: tuple[str, ...]
    servers: tuple[str, ...]
    bits_per_weight: float
    offload: bool
    offload_dir: Path | None
    replay: bool
    memory: Memory
    out_bytes: int
    disk: int
    seconds: float


def make_plan(
    recipe: Recipe | str | Path,
    model: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    offload_dir: str | Path | None = None,
    out: Path | None = None,
    allow_pickle: bool = False,
) -> Plan:
    """Check that the recipe can be carried out on the model and say what it will take. Reads headers, no weights.

    Raises PlanishError: anything wrong with model or recipe, groups that do not divide, patterns without a site, too little text, disk or memory.
    """
    if out is not None:
        _check_free(out)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    check_language(checkpoint, "compress it")
    where = pick_device(device)
    working = dtype or working_dtype(checkpoint.dtype, where)
    runner = BlockRunner(checkpoint, working, where)
    topology = runner.topology
    for index, block in enumerate(runner.blocks):
        check_structure(block, topology, runner.block_name(index))
    widths = {site.name: reader_weight(runner.blocks[0].get_submodule(site.readers[0])).shape[1] for site in topology.sites}
    resolved = resolve(recipe, topology, lambda _block, site: widths[site])
    layout = recipe.export.layout
    packed = {a: None if s is None else Packed(s, default_layout(s) if layout == "auto" else layout) for a, s in resolved.schemes.items()}
    ids = None if recipe.calibration is None else recipe.calibration.tokens(checkpoint.tokenizer())
    sizes = _Sizes.of(runner, recipe, packed, widths)
    streams, waiting = sizes.streams(working, recipe.solver.needs_cross), sizes.waiting(working)
    free = int(psutil.virtual_memory().available * AVAILABLE_SHARE)
    offload = offload_dir is not None or streams + sizes.block_bytes > free
    replay = offload or streams + waiting + sizes.block_bytes > free
    memory = Memory(PROGRAM_BYTES, sizes.block_bytes, 0 if offload else streams, sizes.batch_waiting(working) if replay else waiting)
    moved = streams if offload else 0
    elsewhere = None if offload_dir is None else Path(offload_dir)
    if out is not None:
        _check_room({out: 2 * sizes.out_bytes + moved} if elsewhere is None else {out: 2 * sizes.out_bytes, elsewhere: moved})
    return Plan(
        recipe=recipe,
        checkpoint=checkpoint,
        topology=topology,
        device=where,
        dtype=working,
        packed=packed,
        ids=ids,
        notes=resolved.notes + _warnings(packed, topology),
        servers=servers(packed, topology),
        bits_per_weight=sizes.bits,
        offload=offload,
        offload_dir=elsewhere,
        replay=replay,
        memory=memory,
        out_bytes=sizes.out_bytes,
        disk=2 * sizes.out_bytes + moved,
        seconds=sizes.seconds(working, where, replay),
    )


def _check_free(out: Path) -> None:
    """Nothing there yet."""
    if out.exists() or out.is_symlink():
        raise PlanishError(f"{out}: exists, and planish overwrites nothing. Choose another output folder, or remove this one.")


def _check_room(needs: Mapping[Path, int]) -> None:
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


@dataclass(frozen=True, slots=True)
class _Sizes:
    tokens: int
    batches: int
    width: int
    site_widths: tuple[int, ...]
    block_parameters: int
    block_count: int
    block_bytes: int
    out_bytes: int
    bits: float

    @classmethod
    def of(cls, runner: BlockRunner, recipe: Recipe, packed: dict[Address, Packed | None], widths: dict[str, int]) -> "_Sizes":
        calibration = recipe.calibration
        block = sum(p.numel() for p in runner.blocks[0].parameters())
        quantized, code_bits = 0, 0.0
        for (index, name), how in packed.items():
            if how is None or how.scheme.weights is None:
                continue
            site = next(s for s in runner.topology.sites if s.name == name)
            for path in site.readers:
                out_channels, in_channels = reader_weight(runner.blocks[index].get_submodule(path)).shape
                fmt = how.scheme.weights
                scales = out_channels * fmt.groups(in_channels) if fmt.granularity != "tensor" else 1
                quantized += out_channels * in_channels
                stored = 8 if how.layout == "int-quantized" else fmt.bits
                code_bits += out_channels * in_channels * stored + scales * (16 + (0 if fmt.symmetric else stored))
        kept = runner.checkpoint.nbytes - quantized * runner.checkpoint.dtype.itemsize
        hessian = 4 * 4 * max(widths.values()) ** 2 if recipe.solver.needs_moments else 0
        return cls(
            tokens=0 if calibration is None else calibration.samples * calibration.length,
            batches=0 if calibration is None else -(-calibration.samples // calibration.batch_size),
            width=runner.model.config.get_text_config().hidden_size,
            site_widths=tuple(widths.values()),
            block_parameters=block,
            block_count=runner.topology.block_count,
            block_bytes=3 * 4 * block + hessian,
            out_bytes=kept + int(code_bits / 8),
            bits=code_bits / quantized if quantized else 16.0,
        )

    def streams(self, dtype: torch.dtype, cross: bool) -> int:
        return self.tokens * self.width * dtype.itemsize * (3 if cross else 2)

    def waiting(self, dtype: torch.dtype) -> int:
        return self.tokens * (max(self.site_widths) * (dtype.itemsize + 1) + 2 * self.width * dtype.itemsize)

    def batch_waiting(self, dtype: torch.dtype) -> int:
        return self.waiting(dtype) // max(self.batches, 1)

    def seconds(self, dtype: torch.dtype, device: torch.device, replay: bool) -> float:
        """From the arithmetic of forward passes, Hessians and solver at the speed of one measured product; good to a factor of two or so."""
        rate = _products_per_second(dtype, device)
        slow = _products_per_second(torch.float32, device)
        passes = (4 if replay else 2) * self.tokens * self.block_parameters
        hessians = self.tokens * sum(w * w for w in self.site_widths)
        solver = 6 * sum(w * self.block_parameters / len(self.site_widths) for w in self.site_widths)
        return self.block_count * (0.3 + passes / rate + hessians / slow + solver / slow)


def _products_per_second(dtype: torch.dtype, device: torch.device) -> float:
    a = torch.ones(512, 512, dtype=dtype, device=device)
    (a @ a).sum().item()  # once before the clock runs
    start = time.perf_counter()
    for _ in range(3):
        a = (a @ a) * 1e-3
    a.sum().item()
    return 3 * 512**3 / (time.perf_counter() - start)


def servers(packed: dict[Address, Packed | None], topology: Topology) -> tuple[str, ...]:
    """Who runs such a checkpoint as it was measured. planish.load always does."""
    schemes = {how for how in packed.values() if how is not None}
    others = {"transformers": _in_transformers, "vLLM": _in_vllm}
    return ("planish", *(name for name, runs in others.items() if topology.family not in PLAIN_LINEARS and all(map(runs, schemes))))


def _in_transformers(how: Packed) -> bool:
    fmt = how.scheme.weights
    assert fmt is not None
    return how.layout == "int-quantized" or fmt.symmetric or fmt.granularity == "tensor"  # it has no room for packed zero points (5.23)


def _in_vllm(how: Packed) -> bool:
    fmt, act = how.scheme.weights, how.scheme.activations
    assert fmt is not None
    if act is not None:
        return act.bits == 8 and fmt.symmetric and fmt.granularity in ("tensor", "channel") and fmt.bits in (4, 8) and how.layout == "int-quantized"
    served = fmt.granularity == "channel" or fmt.group_size in SERVED_GROUPS
    return fmt.bits in (4, 8) and how.layout == "pack-quantized" and served


def _warnings(packed: dict[Address, Packed | None], topology: Topology) -> tuple[str, ...]:
    if topology.family in PLAIN_LINEARS:
        return (f"{topology.family}: its linear layers are Conv1D modules; vLLM and transformers refuse the checkpoint, planish.load runs it.",)
    if any(how and how.scheme.activations is not None and how.scheme.activations.bits != 8 for how in packed.values()):
        return ("activations of other than 8 bits: transformers simulates them, vLLM refuses the checkpoint.",)
    return ()
