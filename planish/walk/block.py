"""One block's turn: look at it, smooth it, quantize it site by site; both activation streams go on.

Shape suffixes: P probe samples, L tokens, D width, T tokens of a batch, C channels of a site.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calib.blocks.experts import seeing_all
from ..calib.blocks.prefix import PrefixStream, tensor_names
from ..calib.compressed.extension import SiteInput, chain_prefix, restored
from ..calib.compressed.key_values import hold, holding
from ..calib.compressed.packing import Packed, made_dynamic
from ..calib.compressed.quantized import load_rest, quantized_readers
from ..calib.compressed.side import side_name, side_tensors
from ..calib.machine.heap import WORTH_TRIMMING, trim
from ..calib.machine.precision import bfloat16_products
from ..calib.machine.workers import Workers, workers_for
from ..calib.walk.observe import Observation, observe, sinks
from ..calib.walk.runner import BlockRunner, Call
from ..calib.walk.site_walk import Pass, SiteWalk, replaced, walking
from ..calib.walk.stream import Stream, squares
from ..quant.key_values import HeldKeyValues
from ..quant.linear import StaticGrid
from ..quant.solvers import Solver
from ..quant.solvers.attention import Heads
from ..quant.transforms import Auto, ClipSearch, Flat, Polish, Step
from ..quant.transforms.factors import Chain, store
from ..quant.transforms.inputs import InputStep
from ..recipe.resolve import matches
from .attention import heads_of
from .beside import solve_beside, take_out
from .blocksteps import BlockSteps
from .flatten import Known, flatten
from .looks import Looks
from .polishing import Flow, polish
from .records import BlockRecord, SiteRecord
from .smoothing import Probe, sink_ratio, static_grid
from .solving import Readers, gather, output_error, settle
from .together import learn_together

STATIC_SINK_RATIO = 4.0  # a static range that sink tokens exceed by this would clip what makes them sinks


@dataclass(slots=True, eq=False)
class Streams:
    """What flows through the walk.

    full, quant: the full-precision and the quantized hidden states; before: keeps what entered a block, for solvers that compare both.
    calls: how the blocks are called, by batch; probe: likewise for the first probe_shape (samples, tokens) of all.
    prefix: what stands before every sample, in full precision; None if nothing does. held: how keys and values are held in the quantized model.
    """

    full: Stream
    quant: Stream
    before: Stream | None
    calls: list[Call]
    probe: Call
    probe_shape: tuple[int, int]
    replay: bool
    prefix: PrefixStream | None = None
    held: HeldKeyValues | None = None

    def probe_hidden(self) -> Tensor:
        """The probe's full-precision hidden states before the block to come: (P, L, D)."""
        samples, length = self.probe_shape
        taken: list[Tensor] = []
        for i in range(len(self.full)):
            taken.append(self.full[i][:samples, :length])
            samples -= taken[-1].shape[0]
            if not samples:
                break
        return torch.cat(taken)


@dataclass(slots=True, eq=False)
class BlockResult:
    """A block as it will be stored: tensors by full name, and how each quantized linear is packed."""

    tensors: dict[str, Tensor]
    packed: dict[str, Packed]
    record: BlockRecord


class BlockCompressor:
    """Compresses the blocks of one model, one after the other, as one recipe says. packed: by (block, site); None stays in full precision.

    looks: where what is seen in full precision is shared with other runs."""

    def __init__(
        self,
        runner: BlockRunner,
        solver: Solver,
        steps: Sequence[Step],
        packed: Mapping[tuple[int, str], Packed | None],
        streams: Streams | None,
        looks: Looks | None = None,
    ) -> None:
        self.runner, self.solver, self.packed, self.streams, self.looks = runner, solver, packed, streams, looks
        self.steps = BlockSteps.of(steps, runner.topology)
        self.workers = 1 if streams is None else workers_for(len(streams.calls), runner.device)

    @torch.no_grad()
    def compress(self, index: int) -> BlockResult:
        """Block `index` as it will be stored; both streams are past it afterwards."""
        turn = Turn(self, index)
        with self._loaded(index) as block:
            if self.streams is None:
                turn.round(block)
            else:
                turn.look(block, self.streams)
                trim()
                with holding(block, turn.topology, self.streams.held):
                    turn.walk(block, self.streams)
            return turn.result(block)

    @contextmanager
    def _loaded(self, index: int) -> Iterator[nn.Module]:
        """The block, in memory while the `with` lasts; its experts see all tokens in all that is done to it, so that it computes the same bits."""
        try:
            block = self.runner.load_block(index)
            with bfloat16_products(self.runner.dtype is torch.bfloat16), seeing_all(block):
                yield block
        finally:
            self.runner.release_block(index)
            trim()

    @torch.no_grad()
    def advance(self, record: BlockRecord, tensors: Mapping[str, Tensor], packed: Mapping[str, Packed]) -> None:
        """Take both streams past a block that an earlier run finished and stored."""
        index = record.index
        if self.streams is None:
            return
        with self._loaded(index) as block:
            name = self.runner.block_name(index)
            if self.streams.prefix is not None:
                self.streams.prefix.advance(block, index)
            self._forward(block, index, self.streams.full)
            if self.streams.prefix is not None:
                self.streams.prefix.cache.put(index, *(tensors[part].to(self.runner.dtype) for part in tensor_names(name)))
            load_rest(block, name, tensors)
            chains, inputs = self._chains(record, tensors), self._inputs(record)
            layers = quantized_readers(name, tensors, packed, chains, inputs, self.runner.dtype)
            with holding(block, self.runner.topology.block(index), self.streams.held), replaced(block, layers):
                self._forward(block, index, self.streams.quant)

    def _chains(self, record: BlockRecord, tensors: Mapping[str, Tensor]) -> dict[str, Chain]:
        """What the inputs of a finished block's linears go through, by full name."""
        name = self.runner.block_name(record.index)
        chains = {site: restored(done.site_input, name, site, tensors) for site, done in record.sites.items() if done.chain}
        mine = self.runner.topology.block(record.index)
        return {f"{name}.{path}": chain for site, chain in chains.items() for path in mine.site(site).readers}

    def _inputs(self, record: BlockRecord) -> dict[str, SiteInput]:
        """What a checkpoint says of the inputs of a finished block's linears, by full name."""
        name, mine = self.runner.block_name(record.index), self.runner.topology.block(record.index)
        return {f"{name}.{path}": done.site_input for site, done in record.sites.items() for path in mine.site(site).readers}

    def _forward(self, block: nn.Module, index: int, stream: Stream) -> None:
        assert self.streams is not None
        streams = self.streams

        def move(batch: int) -> None:
            stream[batch] = streams.calls[batch].run(block, index, stream[batch])

        with Workers(self.workers) as crew:
            list(crew.map(move, range(len(streams.calls))))


class Turn:
    """The state of one block's turn."""

    def __init__(self, owner: BlockCompressor, index: int) -> None:
        self.runner, self.solver, self.index, self.topology = owner.runner, owner.solver, index, owner.runner.topology.block(index)
        self.sites = {site.name: site for site in self.topology.sites}
        self.workers, self.steps, self.looks = owner.workers, owner.steps, owner.looks
        self.beside = {name: [step for step in owner.steps.beside if matches(step.sites, index, name)] for name in self.sites}
        self.dtype, self.stored = owner.runner.dtype, owner.runner.checkpoint.dtype
        self.packed = {name: owner.packed[index, name] for name in self.sites}
        self.static: dict[str, StaticGrid | None] = dict.fromkeys(self.sites)
        self.readers: dict[str, Readers] = {}
        self.record = BlockRecord(index, sites={name: SiteRecord() for name in self.sites})
        self.observation = Observation()
        self.scales: Mapping[str, Tensor] = {}
        self.known: Mapping[str, Known] = {}

    def look(self, block: nn.Module, streams: Streams) -> None:
        """Send the full-precision stream through, then choose and absorb the scales. The block is float32 afterwards."""
        if streams.prefix is not None:
            streams.prefix.advance(block, self.index)
        hidden = streams.probe_hidden()
        known, original = self.topology, self.runner.checkpoint.original_stream
        squares = self.steps.squares(self.index, known)

        def looked() -> Observation:
            return observe(
                block, self.index, known.sites, streams.calls, streams.full, streams.before, self.workers, original=original, squares=squares
            )

        self.observation = looked() if self.looks is None else self.looks.observe(block, self.index, streams.full, streams.before, squares, looked)
        self.record.sink_tokens = self.observation.sink_tokens
        passed = streams.probe.run(block, self.index, hidden)
        probe = Probe(streams.probe, self.index, hidden, ~sinks(original(hidden).flatten(0, 1), original(passed).flatten(0, 1)), streams.prefix)
        schemes = {name: None if packed is None else packed.scheme for name, packed in self.packed.items()}
        block.float()
        absorbed = self.steps.absorb(block, known, schemes, self.observation, probe, self.stored)
        self.record.equivalence, self.scales = absorbed.error, absorbed.scales
        for name in self.sites:
            if name in absorbed.chosen:
                self.record.sites[name].note_scale(absorbed.chosen[name])
            self._fix_range(name, absorbed.scales.get(name))

    def _fix_range(self, name: str, scale_C: Tensor | None, shifts: Chain = ()) -> None:
        """The static grid of a site; where sink tokens lie far outside it, the site's activations become dynamic instead."""
        packed, seen, sinks_C = self.packed[name], self.observation.seen[name], self.observation.sinks_C[name]
        if packed is None:
            return
        self.static[name] = static_grid(seen, sinks_C, packed.scheme, scale_C, shifts)
        if self.static[name] is None or (packed.scheme.activations is not None and packed.scheme.activations.dynamic):
            return
        ratio = sink_ratio(seen, sinks_C, scale_C, shifts)
        if ratio > STATIC_SINK_RATIO:
            self.packed[name] = made_dynamic(packed)
            self.static[name] = None
            self.record.sites[name].made_dynamic = True
            self.record.sites[name].note = f"sink tokens reach {ratio:.0f} times the static range: dynamic per token instead"

    def round(self, block: nn.Module) -> None:
        """Quantize without data."""
        self._collect(block.float())
        for name, readers in self.readers.items():
            self.take_out(readers)
            solve_beside(readers, self.beside[name], self.solver, None, self.stored)

    def _collect(self, block: nn.Module) -> None:
        self.readers = {name: Readers.of(block, site, self.packed[name], self.static[name], self.stored) for name, site in self.sites.items()}
        for readers in self.readers.values():
            readers.take(block)

    def walk(self, block: nn.Module, streams: Streams) -> None:
        """Send the quantized stream through, solving each site when all batches stand before it. The block is float32."""
        self.known = self._learned(block, streams)
        sites = list(self.sites.values())
        with ExitStack() as stack:
            full = None
            if streams.before is not None:
                weights = {id(p): nn.Parameter(p.detach().to(self.dtype), requires_grad=False) for p in block.parameters()}
                twin = copy.deepcopy(block, weights)
                if streams.held is not None:
                    hold(twin, self.topology, None)
                full = stack.enter_context(walking(twin, sites, self.passes(twin, streams, streams.before), streams.replay, self.workers))
            self._collect(block)
            walk = stack.enter_context(walking(block, sites, self.passes(block, streams, streams.quant), streams.replay, self.workers))
            for parameter in block.parameters():
                parameter.data = parameter.data.to(self.stored).to(self.dtype)
            widest = max(readers.width for readers in self.readers.values())  # where most is held while the solver works
            for name, readers in self.readers.items():
                plain = Readers(readers.site, None, None, dict(readers.weights), dict(readers.biases), {})
                self.take_out(readers)
                self.flatten_input(readers, walk)
                if readers.packed is not None and (self.solver.needs_moments or any(step.needs_moments for step in self.beside[name])):
                    moments = gather(readers, walk, self.observation.keep_T, full, self.solver.held_share)
                    if len(moments.second_II) == widest:
                        trim()
                    solution = solve_beside(readers, self.beside[name], self.solver, moments, self.stored, self._heads(plain, walk, block, streams))
                    assert solution is not None
                    self.record.sites[name].note_solution(solution, output_error(readers, moments))
                else:
                    solve_beside(readers, self.beside[name], self.solver, None, self.stored)
                settle(readers, walk, self.dtype, self.stored)
                if full is not None:
                    settle(plain, full, self.dtype, torch.float32)
                del plain
                if readers.drop_solved() > WORTH_TRIMMING:
                    trim()
            if self.steps.polish is None:
                self._finish(walk.outputs(), streams)
        if self.steps.polish is not None:
            self._polish(self.steps.polish, block, streams)

    def _heads(self, plain: Readers, walk: SiteWalk, block: nn.Module, streams: Streams) -> Heads | None:
        """What attention makes of the rows of q and k, at their site and where the solver asks for it."""
        known, prefix = self.topology.attention, self.runner.prefix
        if not self.solver.attention or known is None or known.q.module not in plain.weights:
            return None
        before_PKD = None if prefix is None else prefix.tensors(self.index)["key"][0].transpose(0, 1).float()
        scaling = float(block.get_submodule(known.module).scaling)  # type: ignore[arg-type]
        return heads_of(plain, known, walk, scaling, [call.arguments(block, self.index) for call in streams.calls], before_PKD)

    def take_out(self, readers: Readers) -> None:
        """Take super weights out, and note it."""
        record = self.record.sites[readers.site.name]
        taken = take_out(readers, self.beside[readers.site.name], self.index, self.stored)
        record.note = "; ".join(filter(None, (record.note, taken)))

    def flatten_input(self, readers: Readers, walk: SiteWalk) -> None:
        """Transform the site's input as the recipe's steps say, and note it."""
        name = readers.site.name
        steps, clip = self.input_steps(name)
        if readers.packed is None or not (steps or clip):
            return
        done = flatten(readers, steps, clip, walk, self.observation.keep_T, self.stored, f"{self.index}.{name}")
        record = self.record.sites[name]
        record.chain, record.note = store(done.chain)[0], "; ".join(filter(None, (record.note, done.note)))
        if readers.static is not None:
            self._fix_range(name, self.scales.get(name), done.chain)
            readers.packed, readers.static = self.packed[name], self.static[name]
        if done.choice is not None:
            record.note_choice(done.choice)
        self.record.equivalence = max(self.record.equivalence, done.error)

    def _learned(self, block: nn.Module, streams: Streams) -> Mapping[str, Known]:
        """The transforms of inputs that are learned together, by site."""
        wanted: dict[str, list[InputStep]] = {}
        for name in self.sites:
            steps = [step for step in self.input_steps(name)[0] if not isinstance(step, Auto)]
            at = next((i for i, step in enumerate(steps) if isinstance(step, Flat) and step.objective == "block"), None)
            if at is not None and self.packed[name] is not None:
                wanted[name] = steps[: at + 1]
        if not wanted:
            return {}
        flow = Flow(self.index, streams.calls, streams.quant, streams.full, self.observation.keep_T)
        readers = {name: Readers.of(block, self.sites[name], self.packed[name], self.static[name], self.stored) for name in wanted}
        return learn_together(block, readers, wanted, flow, self.dtype)

    def _polish(self, step: Polish, block: nn.Module, streams: Streams) -> None:
        """Move what may be moved of the block together, then let the batches go through it as it will run."""
        flow = Flow(self.index, streams.calls, streams.quant, streams.full, self.observation.keep_T)
        with replaced(block, {path: layer for found in self.readers.values() for path, layer in found.whole_layers(self.dtype, self.stored).items()}):
            done = polish(step, block, self.readers, flow, self.stored)
            self.record.polished = None if done is None else [done.before, done.after]
            layers = {path: layer for found in self.readers.values() for path, layer in found.layers(self.dtype).items()}
            with replaced(block, layers), Workers(self.workers) as crew:
                self._finish(crew.map(lambda pass_: pass_.run(), self.passes(block, streams, streams.quant), ahead=not streams.replay), streams)

    def input_steps(self, name: str) -> tuple[list[InputStep | Auto], ClipSearch | None]:
        """The steps that transform the input of this site, and the search of its clip."""
        known = self.known.get(name)
        steps = [
            known if known is not None and isinstance(step, Flat) else step for step in self.steps.inputs if matches(step.sites, self.index, name)
        ]
        return steps, next((step for step in self.steps.clips if matches(step.sites, self.index, name)), None)

    def passes(self, block: nn.Module, streams: Streams, stream: Stream) -> list[Pass]:
        """Of every batch of the stream through the block."""

        def start(batch: int) -> Callable[[], Tensor]:
            return lambda: streams.calls[batch].run(block, self.index, stream[batch])

        return [Pass(start(batch)) for batch in range(len(streams.calls))]

    def _finish(self, outputs: Iterable[Tensor], streams: Streams) -> None:
        off = size = 0.0
        for i, out in enumerate(outputs):
            keep_T, full = self.observation.keep_T[i], streams.full[i]
            off += squares(out - full, keep_T)
            size += squares(full, keep_T)
            streams.quant[i] = out
        self.record.error = (off / size) ** 0.5 if size else 0.0

    def result(self, block: nn.Module) -> BlockResult:
        """The block's tensors as they will be stored, and how its linears are packed."""
        prefix = self.runner.block_name(self.index)
        tensors: dict[str, Tensor] = {}
        packed: dict[str, Packed] = {}
        for name, readers in self.readers.items():
            self.record.sites[name].clip = 1.0 if readers.activations is None else readers.activations.clip
            if readers.packed is not None:
                packed |= dict.fromkeys((f"{prefix}.{path}" for path in readers.solved), readers.packed)
                tensors |= {f"{prefix}.{name}": tensor for name, tensor in readers.stored(self.stored).items()}
        tensors |= self._extras(prefix)
        quantized = {f"{path}.weight" for readers in self.readers.values() for path in readers.solved}
        for name, parameter in block.state_dict().items():
            if name not in quantized and f"{prefix}.{name}" not in tensors:
                tensors[f"{prefix}.{name}"] = parameter.to(self.stored) if parameter.is_floating_point() else parameter
        return BlockResult({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, packed, self.record)

    def _extras(self, prefix: str) -> dict[str, Tensor]:
        """What the checkpoint holds of the block besides weights: biases as they became, chains, side paths, the prefix's keys and values."""
        tensors: dict[str, Tensor] = {}
        for readers in self.readers.values():
            self.record.sites[readers.site.name].note_beside(readers)
            tensors |= {f"{prefix}.{path}.bias": bias for path, bias in readers.biases.items() if bias is not None}
            for path in readers.solved:
                side = readers.side(path)
                beside = {} if side is None else side_tensors(side, self.stored)
                tensors |= {side_name(f"{prefix}.{path}", local): tensor for local, tensor in beside.items()}
            for local, tensor in store(readers.chain)[1].items():
                name = chain_prefix(prefix, readers.site.name) + local
                tensors[name] = tensor.to(self.stored) if tensor.is_floating_point() else tensor
        if self.runner.prefix is not None:
            tensors |= zip(tensor_names(prefix), (t.to(self.stored) for t in self.runner.prefix.tensors(self.index).values()), strict=True)
        return tensors
