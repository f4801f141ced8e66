"""What a run will take: resident memory at its highest, bytes of the new checkpoint, seconds. From sizes; what the process holds already is measured.

Memory is a sum of named parts, formed for each moment that can be the highest: a block's turn at each of its sites, the head, and both heads when the
result is evaluated.
"""

import time
from dataclasses import dataclass

import psutil
import torch

from ..calib.blocks.families import is_mixture
from ..calib.blocks.family import EXPERTS
from ..calib.blocks.sites import BlockTopology, reader_weight
from ..calib.blocks.topology import topology
from ..calib.compressed.packing import Packed, stored_size
from ..calib.data.own_text import BATCH
from ..calib.data.windows import Calibration
from ..calib.files.checkpoint import Checkpoint
from ..calib.files.rewritten import Rewritten
from ..calib.machine.precision import working_dtype
from ..calib.machine.workers import workers_for
from ..calib.walk.runner import HEAD_TOKENS, BlockRunner
from ..quant.solvers.columns import launches
from ..quant.solvers.gptq import piece
from ..quant.transforms import Auto, Flat, Keeping, Polish, SideStep
from ..recipe.resolve import Address, matches
from ..recipe.schema import Recipe
from ..walk.polishing import JUDGEMENTS

WINDOWS = 4  # of the built-in evaluation text, at most
LENGTH = 2048  # tokens a window, or as many as the model takes
LATER = 35_000_000  # what the program grows by after it is measured: text to evaluate on, what torch sets up for itself when it first works
HOLES = 0.35  # of all that waits and passes: lost at most in the heap between tensors that stay and tensors that went
COPIES = 6  # of the rows that a solver rounds at a time, in float32: original, ordered, current, deviations, scales, zero points
DOUBLES = 4  # square matrices in float64 with which a side path is found: the Hessian, flipped, its factor, and that flipped back
CHOOSING = 6  # square matrices in float32 while auto chooses: moments of all tokens, of those fitted to, of the readers; the last two behind a step
PASSING = 24  # bytes for each token of a batch and channel of the widest site, made and let go on the way
KEPT = 24  # bytes for each token of a batch and channel of each site that the way back needs
ROUNDED = 32  # bytes for each weight that is rounded with a gradient
ROUNDED_SECONDS = 5e-8  # for each weight, and each value of a batch, that is; measured
SOFTMAX = 1200  # products in whose time both models' softmax and divergence are done, for each token and vocabulary entry; measured
NEXT = 36  # bytes for each text that is written at once and vocabulary entry: logits, sorted, with places, softmax and sums; measured
LOGITS = 10  # of a piece of tokens, in float32: of both models, their logarithms, probabilities and differences


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Resident memory in bytes at one moment, by part.

    program: interpreter, libraries, tokenizer and text, as measured. weights: of the block, or of the heads. streams: hidden states between blocks
    that are in memory. waiting: what batches hold while they stand inside a block (one of each worker when replayed). passing: what a batch of each
    worker makes and lets go on its way. solver: Hessians, their factors, the rows at work; or what a transform is learned from. holes: what the heap
    loses between all these.
    """

    program: int
    weights: int
    streams: int = 0
    waiting: int = 0
    passing: int = 0
    solver: int = 0
    holes: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return self.program + self.weights + self.streams + self.waiting + self.passing + self.solver + self.holes


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True, slots=True)
class _Site:
    """width: input channels; weights: of all readers; packed: how they are stored."""

    width: int
    weights: int
    packed: Packed | None

    @property
    def coded(self) -> bool:
        """Whether its activations become codes."""
        return self.packed is not None and self.packed.scheme.activations is not None


@dataclass(frozen=True, slots=True)
class _Kind:
    """Blocks that are alike. count: of them; parameters: of one; sites: of one; known: what is read where."""

    count: int
    parameters: int
    sites: tuple[_Site, ...]
    known: BlockTopology

    @property
    def widths(self) -> list[int]:
        """Of its sites."""
        return [site.width for site in self.sites]


class Sizes:
    """The sizes of a run, and what follows from them."""

    def __init__(self, runner: BlockRunner, recipe: Recipe, packed: dict[Address, Packed | None]) -> None:
        config, text = runner.model.config.get_text_config(), recipe.calibration
        self.runner, self.recipe, self.packed, self.dtype = runner, recipe, packed, runner.dtype
        samples, self.length, self.batch = (0, 0, 0) if text is None else (text.samples, text.length, min(text.batch_size, text.samples))
        self.tokens = samples * self.length
        self.workers = workers_for(-(-samples // self.batch), runner.device) if samples else 1
        self.width: int = config.hidden_size
        self.vocabulary: int = config.vocab_size
        embedding = runner.model.get_input_embeddings()
        self.embedding = sum(p.numel() for p in embedding.parameters())
        self.longest = _longest(runner.checkpoint)
        self.all_heads: int = config.num_attention_heads
        self.heads = self.all_heads if config._attn_implementation == "eager" else 0
        self.kinds = [self._kind(number) for number in range(len(runner.topology.kinds))]
        self.widest = max(width for kind in self.kinds for width in kind.widths)
        self.out_bytes, self.bits, self.quantized = self._stored()

    def _kind(self, number: int) -> _Kind:
        """Of the topology's kinds the one with this number."""
        topology = self.runner.topology
        known, first = topology.kinds[number], topology.kind_at.index(number)
        block, sites = self.runner.blocks[first], []
        for site in known.sites:
            readers = [reader_weight(block.get_submodule(path)) for path in site.readers]
            mine = (how for (index, name), how in self.packed.items() if name == site.name and topology.kind_at[index] == number)
            how = next((one for one in mine if one is not None), None)
            sites.append(_Site(readers[0].shape[1], sum(weight.numel() for weight in readers), how))
        parameters = sum(parameter.numel() for parameter in block.parameters())
        return _Kind(topology.kind_at.count(number), parameters, tuple(sites), known)

    def _stored(self) -> tuple[int, float, int]:
        """Bytes of the new checkpoint's weights; bits per quantized weight with scales, zero points and side paths; how many weights these are."""
        quantized, code_bits = 0, 0.0
        for (index, name), how in self.packed.items():
            if how is None or how.scheme.weights is None:
                continue
            for path in self.runner.topology.block(index).site(name).readers:
                out_channels, in_channels = reader_weight(self.runner.blocks[index].get_submodule(path)).shape
                quantized += out_channels * in_channels
                code_bits += 8 * stored_size(how, out_channels, in_channels, self.runner.checkpoint.dtype.itemsize)
                beside = [step for step in self.recipe.steps if isinstance(step, Keeping | SideStep) and matches(step.sites, index, name)]
                code_bits += sum(step.side_bits(out_channels, in_channels, 8 * self.runner.checkpoint.dtype.itemsize) for step in beside)
        kept = self.runner.checkpoint.nbytes - quantized * self.runner.checkpoint.dtype.itemsize
        return kept + int(code_bits / 8), code_bits / quantized if quantized else 16.0, quantized

    @property
    def streams(self) -> int:
        """Bytes of all hidden states between two blocks: full-precision, quantized, and those before the block where the solver compares."""
        return self.tokens * self.width * self.dtype.itemsize * (3 if self.recipe.solver.needs_cross else 2)

    def compressing(self, program: int, offload: bool, replay: bool) -> Memory:
        """The compression at its highest."""
        streams = 0 if offload else self.streams
        moments = [self._at_site(kind, i, program, streams, replay, offload) for kind in self.kinds for i in range(len(kind.sites))]
        learned = [moment for kind in self.kinds for moment in (self._polishing(kind, program, streams), self._together(kind, program, streams))]
        return max(self._at_head(program, streams), *learned, *moments, key=lambda memory: memory.total)

    @property
    def _polish(self) -> Polish | None:
        return next((step for step in self.recipe.steps if isinstance(step, Polish)), None)

    def _polishing(self, kind: _Kind, program: int, streams: int) -> Memory:
        """A block polished: codes and their float32 matrices, and what a batch leaves behind for the way back."""
        if self._polish is None:
            return Memory(program=program, weights=0)
        return Memory(program=program + LATER, weights=5 * kind.parameters, streams=streams, passing=self._behind(kind))

    def _behind(self, kind: _Kind) -> int:
        """What a batch leaves in a block for the way back."""
        widths = sum(kind.widths) + 4 * self.width
        heads = self.heads if self.runner.device.type == "cpu" else self.all_heads  # ordered_attention
        return self.batch * self.length * (KEPT * widths + 2 * heads * self.length * self.dtype.itemsize)

    def _together(self, kind: _Kind, program: int, streams: int) -> Memory:
        """A block whose transforms are learned together: its weights as they are, moved, and in what each rounding leaves for the way back."""
        if not any(step.objective == "block" for step in self._learning):
            return Memory(program=program, weights=0)
        weights = (8 + self.dtype.itemsize + ROUNDED) * kind.parameters
        return Memory(program=program + LATER, weights=weights, streams=streams, passing=2 * self._behind(kind))

    def _at_site(self, kind: _Kind, at: int, program: int, streams: int, replay: bool, offload: bool) -> Memory:
        """All batches wait at this site, and it is being solved."""
        cross = self.recipe.solver.needs_cross and self.tokens > 0
        waiting = (self.workers * self.batch * self.length if replay else self.tokens) * self._held(kind.sites[at], cross)
        passing = self.workers * self._passing(self.batch, self.length, self.dtype.itemsize)
        return Memory(
            program=program + LATER,
            weights=self._weights(kind, at, cross),
            streams=streams,
            waiting=waiting,
            passing=passing,
            solver=self._solver(kind.sites[at]),
            holes=0 if offload else int(HOLES * (streams + waiting + passing)),
        )

    def _weights(self, kind: _Kind, at: int, cross: bool) -> int:
        """Float32 where they are still to be solved, else codes and the matrix that multiplies; the full-precision twin's besides."""
        wide = self.dtype.itemsize
        done, left = sum(site.weights for site in kind.sites[:at]), sum(site.weights for site in kind.sites[at:])
        return 4 * left + (1 + wide) * done + (wide * (kind.parameters + done) if cross else 0)

    def _held(self, site: _Site, cross: bool) -> int:
        """Bytes for each token that waits at the site: its input there, as codes too, the residual and its norm; twice with the twin."""
        plain = (site.width + 2 * self.width) * self.dtype.itemsize
        return plain + (site.width if site.coded else 0) + (plain if cross else 0)

    def _passing(self, batch: int, length: int, itemsize: int) -> int:
        """Values of the widest site; and of attention that makes all scores at once these, masked, and their softmax in float32."""
        return batch * length * self.widest * PASSING + batch * self.heads * length * length * (2 * itemsize + 4)

    def _solver(self, site: _Site) -> int:
        """Matrices: the Hessian, ordered, flipped, factored; with GPTAQ also what is missing and what follows; where settings are
        chosen the held-out text's; for side paths in float64."""
        if site.packed is None:
            return 0
        solver = self.recipe.solver
        matrices = 0 if not solver.needs_moments else 6 if solver.needs_cross else 4
        matrices += 0 if not solver.held_share else 2 if solver.needs_cross else 1
        matrices = max(matrices, CHOOSING if any(isinstance(step, Auto) for step in self.recipe.steps) else 0)
        beside = any(isinstance(step, SideStep) and step.needs_moments for step in self.recipe.steps)
        wide = 8 * (DOUBLES * site.width**2 + 3 * site.weights) if beside else 0
        learning = max((step.held_bytes(site.width, site.weights, self.tokens) for step in self._learning), default=0)
        return max(learning, wide + 4 * matrices * site.width**2 + 4 * COPIES * min(site.weights, piece(self.runner.device)) + site.weights)

    @property
    def _learning(self) -> list[Flat]:
        return [step for step in self.recipe.steps if isinstance(step, Flat)]

    def _at_head(self, program: int, streams: int) -> Memory:
        """Embeddings or the head: as stored, and in the arithmetic where that is another; rewritten ones are checked in float32."""
        dtype = torch.float32 if isinstance(self.runner.checkpoint, Rewritten) else self.dtype
        weights = self.embedding * dtype.itemsize + self._as_stored(dtype)
        return Memory(program=program + LATER, weights=weights, streams=streams, passing=self._logits(4))

    def _as_stored(self, dtype: torch.dtype) -> int:
        stored = self.runner.checkpoint.dtype
        return 0 if stored is dtype else self.embedding * stored.itemsize

    def _logits(self, copies: int) -> int:
        return copies * 4 * HEAD_TOKENS * self.vocabulary

    def evaluating(self, program: int, offload: bool) -> Memory:
        """The evaluation at its highest: both heads in float32, and the hidden states that both models end in."""
        weights = 2 * 4 * self.embedding + self._as_stored(torch.float32)
        hidden = 2 * 4 * WINDOWS * self.longest * self.width
        passing = max(self._logits(LOGITS), workers_for(WINDOWS, self.runner.device) * self._passing(1, self.longest, 4))
        holes = 0 if offload else int(HOLES * (hidden + passing))
        return Memory(program=program + LATER, weights=weights, streams=hidden, passing=passing, holes=holes)

    def seconds(self, replay: bool) -> float:
        """From the arithmetic of forward passes, Hessians and solver at the speed of one measured product, and what learning takes; good to a factor
        of two or so."""
        rate = products_per_second(self.dtype, self.runner.device)
        slow = products_per_second(torch.float32, self.runner.device)
        return sum(kind.count * self._seconds(kind, replay, rate, slow) for kind in self.kinds)

    def _seconds(self, kind: _Kind, replay: bool, rate: float, slow: float) -> float:
        """Of a block, at these speeds."""
        passes = (4 if replay else 2) * self.tokens * kind.parameters
        hessians = self.tokens * sum(w * w for w in kind.widths)
        solver = 6 * sum(w * kind.parameters / len(kind.widths) for w in kind.widths)
        learning = sum(step.seconds(width) for step in self._learning for width in kind.widths if step.objective == "site")
        together = max((step.steps for step in self._learning if step.objective == "block"), default=0)
        learning += together * ROUNDED_SECONDS * (kind.parameters + self.batch * self.length * sum(kind.widths))
        polishing = 0.0
        if self._polish is not None and self.tokens:
            held = round(self._polish.held_out * self.tokens) * (JUDGEMENTS + 1)
            polishing = (3 * self._polish.steps * self.batch * self.length + held) * kind.parameters / rate
        return 0.3 + passes / rate + hessians / slow + solver / slow + self._launching(kind) + learning + polishing

    def _launching(self, kind: _Kind) -> float:
        """For a block, what a GPU takes to be told of columns that are rounded one after the other, those of heads' rows one by one."""
        solver, device = self.recipe.solver, self.runner.device
        if device.type == "cpu" or not solver.needs_moments:
            return 0.0
        found, attention = 0, kind.known.attention
        for site, known in zip(kind.sites, kind.known.sites, strict=True):
            if site.packed is not None:
                rows = attention.size if solver.attention and attention is not None and attention.q.module in known.readers else 0
                found += (-(-site.weights // piece(device)) + rows) * launches(site.width, device)
        return found * seconds_per_launch(device)


def writing(checkpoint: Checkpoint, calibration: Calibration, device: torch.device, program: int) -> Memory:
    """While the model writes the text that it is calibrated on: all its weights, keys and values of the samples written at once (of one layer twice,
    while they grow), and the next token's likelihoods."""
    config, dtype = checkpoint.config.get_text_config(), working_dtype(checkpoint.dtype, device)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    at_once = min(BATCH, calibration.samples)
    layers = 2 * heads * width * dtype.itemsize * (config.num_hidden_layers + 1)
    return Memory(
        program=program,
        weights=checkpoint.nbytes // checkpoint.dtype.itemsize * dtype.itemsize,
        waiting=at_once * (calibration.length + 1) * layers,
        passing=NEXT * at_once * config.vocab_size,
    )


def evaluating_seconds(checkpoint: Checkpoint, device: torch.device) -> float:
    """To evaluate a compressed model and the original, both in float32: what all weights and attention multiply, and the vocabulary's softmax."""
    config, length = checkpoint.config.get_text_config(), _longest(checkpoint)
    width: int = config.hidden_size
    vocabulary: int = config.vocab_size
    weights = checkpoint.nbytes / checkpoint.dtype.itemsize - (0 if checkpoint.tied else vocabulary * width)  # of two tables one is looked up in
    weights -= _idle(checkpoint)
    attention: int = 2 * length * width * config.num_hidden_layers
    products = 2 * (weights + attention) + SOFTMAX * vocabulary
    return WINDOWS * length * products / products_per_second(torch.float32, device)


def _idle(checkpoint: Checkpoint) -> float:
    """How many weights of experts a token is not sent to."""
    config = checkpoint.config.get_text_config()
    if not is_mixture(checkpoint.config):
        return 0.0
    sizes = [info.nbytes / checkpoint.dtype.itemsize for name, info in checkpoint.tensors.items() if f".{EXPERTS}." in name]
    experts = max(sum(site.readers[0].startswith(f"{EXPERTS}.") for site in kind.inside) for kind in topology(config).kinds)
    used: int = config.num_experts_per_tok
    return (1 - used / experts) * sum(sizes)


def _longest(checkpoint: Checkpoint) -> int:
    """Tokens of a window of the evaluation."""
    return int(min(LENGTH, getattr(checkpoint.config.get_text_config(), "max_position_embeddings", LENGTH)))


def products_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications, each with its addition, that a matrix product makes in a second here: measured now, in a few milliseconds."""
    size = 4096 if device.type == "cuda" else 512  # of smaller ones a GPU is not filled
    a = torch.ones(size, size, dtype=dtype, device=device)
    (a @ a).sum().item()  # once before the clock runs
    start = time.perf_counter()
    for _ in range(3):
        a = (a @ a) * 1e-3
    a.sum().item()
    return 3 * size**3 / (time.perf_counter() - start)


def seconds_per_launch(device: torch.device) -> float:
    """What an operation on few values takes there, which is what telling the device of it takes: measured now."""
    a = torch.zeros(64, device=device)
    a.sum().item()
    start = time.perf_counter()
    for _ in range(100):
        a.add_(1)
    a.sum().item()
    return (time.perf_counter() - start) / 100
