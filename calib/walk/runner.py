"""Running a model a block at a time: embeddings, each block, head; each is in memory only while its turn lasts.

The model's own code does everything between its blocks (masks, rotary tables, logit caps): the runner only puts stand-ins where
the blocks are, so that no family needs a forward pass of its own here.

Shapes: batches are ids (B, L), token numbers, or images (B, 3, H, W), as the family takes them (Topology.input); hidden (B, L, D).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.integrations import sdpa_attention

from ...quant.errors import PlanishError
from ..blocks.prefix import PrefixCache, PrefixStream
from ..blocks.topology import Topology, reader_weight, topology
from ..files.checkpoint import Checkpoint

HEAD_TOKENS = 32  # tokens whose logits are in memory at a time


@dataclass(slots=True)
class Call:
    """What the model hands to each of its blocks besides the hidden states, for one shape of input."""

    extra: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def arguments(self, block: nn.Module, index: int) -> dict[str, Any]:
        """What the block is given besides the hidden states, by name."""
        args, kwargs = self.extra[index]
        found = inspect.signature(block.forward).bind(None, *args, **kwargs).arguments
        return {**found, **found.get("kwargs", {})}

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """The block's output: (B, L, D)."""
        args, kwargs = self.extra[index]
        out = block(hidden, *args, **kwargs)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return result


class _Recorder(nn.Module):
    """Stands where a block is: notes what it is given and hands the hidden states on."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call.extra.append((args, kwargs))
        self.hidden = hidden_states
        return hidden_states


class _Injector(nn.Module):
    """Stands where the first block is: replaces whatever comes in by the hidden states that a real last block made."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, _hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.hidden


def _keep_float32_fused() -> None:
    """Let transformers repeat keys and values of float32 for their groups of queries on CUDA: no fused kernel there takes them as they are, and the
    one that does instead holds all scores, heads x length²."""
    before = sdpa_attention.use_gqa_in_sdpa
    if hasattr(before, "planish"):
        return

    def use_gqa_in_sdpa(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
        return before(attention_mask, key, value) and not (key.is_cuda and key.dtype == torch.float32)

    use_gqa_in_sdpa.planish = True  # type: ignore[attr-defined]
    sdpa_attention.use_gqa_in_sdpa = use_gqa_in_sdpa


class BlockRunner:
    """One model, block by block, in `dtype` on `device`."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        if device.type != "cpu":
            _keep_float32_fused()
        self.topology: Topology = topology(checkpoint.config)
        self.prefix: PrefixCache | None = checkpoint.prefix_cache(dtype, device)
        self.model = checkpoint.skeleton(dtype)
        blocks = self.model.get_submodule(self.topology.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self.outer = [name for name in self._owners() if not name.startswith(self.topology.blocks + ".")]
        for module in (module for name in self.outer for module in self.model.get_submodule(name).modules()):
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    module.register_buffer(key, buffer.to(device), persistent=False)

    def site_widths(self) -> dict[tuple[int, str], int]:
        """The input channels of every site, by block and name."""
        first = ((index, self.topology.block(index).site(name)) for index, name in self.topology.addresses)
        return {(index, site.name): reader_weight(self.blocks[index].get_submodule(site.readers[0])).shape[1] for index, site in first}

    def _owners(self) -> list[str]:
        """The modules with parameters or buffers of their own, topmost ones only: what is inside them is loaded with them. Of a model that takes
        images too those that texts pass."""
        owners: list[str] = []
        for name, module in self.model.named_modules():
            if self._on_the_way(name) and (module._parameters or module._buffers) and not name.startswith(tuple(f"{owner}." for owner in owners)):
                owners.append(name)
        return owners

    def _on_the_way(self, name: str) -> bool:
        """Whether the module is of the language model."""
        known = self.topology
        return not known.body or name.startswith(f"{known.body}.") or name == known.head

    def _has_weights(self, name: str) -> bool:
        return any(True for _ in self.model.get_submodule(name).parameters())

    @contextmanager
    def _loaded(self, names: list[str]) -> Iterator[None]:
        for name in names:
            self.checkpoint.load_module(self.model.get_submodule(name), name, dtype=self.dtype, device=self.device)
        try:
            yield
        finally:
            for name in names:
                self.checkpoint.release(self.model.get_submodule(name))

    @contextmanager
    def _stand_ins(self, stand_ins: list[nn.Module], replaced: Mapping[str, nn.Module]) -> Iterator[None]:
        """The blocks, and the modules named in `replaced`, give way to others."""
        parent_of = {name: name.rpartition(".")[::2] for name in (self.topology.blocks, *replaced)}
        before = {name: self.model.get_submodule(name) for name in parent_of}
        after = {self.topology.blocks: nn.ModuleList(stand_ins), **replaced}
        for name, (parent, child) in parent_of.items():
            setattr(self.model.get_submodule(parent), child, after[name])
        try:
            yield
        finally:
            for name, (parent, child) in parent_of.items():
                setattr(self.model.get_submodule(parent), child, before[name])

    def start(self, batches: list[Tensor], past: Cache | None = None) -> Iterator[tuple[Tensor, Call]]:
        """The hidden states that enter block 0, and what the blocks are called with, for each batch (ids or images).

        Batches of one shape share one Call. past: the keys and values that blocks attend to besides; default: the prefix.
        """
        past = self.prefix if past is None else past
        extra = {} if past is None else {"past_key_values": past}
        calls: dict[torch.Size, Call] = {}
        skipped = {name: nn.Identity() for name in (self.topology.norm, self.topology.head) if name}
        names = [name for name in self.outer if self._has_weights(name) and name not in skipped]
        with self._loaded(names):
            for batch in batches:
                call = Call()
                recorders: list[nn.Module] = [_Recorder(call) for _ in self.blocks]
                with self._stand_ins(recorders, skipped):
                    self.model(**{self.topology.input: self._placed(batch)}, **dict(self.topology.call), **extra)
                first = recorders[0]
                assert isinstance(first, _Recorder)
                assert first.hidden is not None
                yield first.hidden, calls.setdefault(batch.shape, call)

    def lay_prefix(self, ids: Sequence[int]) -> PrefixStream:
        """Let these tokens stand before every batch started from now on. The stream must pass each block before any batch does."""

        def start(seen: Cache) -> tuple[Tensor, Callable[[nn.Module, int, Tensor], Tensor]]:
            ((hidden, call),) = self.start([torch.tensor(ids)[None]], seen)
            return hidden, call.run

        self.prefix = None
        stream = PrefixStream(PrefixCache(len(ids), self.topology.block_count), self.checkpoint.dtype, start)
        self.prefix = stream.cache
        return stream

    def _placed(self, batch: Tensor) -> Tensor:
        """The batch on the runner's device, images also in its dtype."""
        return batch.to(self.device, self.dtype) if batch.is_floating_point() else batch.to(self.device)

    def block_name(self, index: int) -> str:
        """The full name of block `index`, as in the checkpoint's tensor names."""
        return self.topology.block_name(index)

    def load_block(self, index: int, dtype: torch.dtype | None = None) -> nn.Module:
        """Block `index` with its weights in memory, in `dtype` (the runner's own when None)."""
        block = self.blocks[index]
        self.checkpoint.load_module(block, self.block_name(index), dtype=dtype or self.dtype, device=self.device)
        return block

    def release_block(self, index: int) -> None:
        """Give block `index`'s memory back."""
        self.checkpoint.release(self.blocks[index])

    @contextmanager
    def features(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What turns the last block's output into the model's features, both (B, L, D): the last norm, in memory while the `with` lasts.

        The identity where the model has no last norm.
        """
        name = self.topology.norm
        with self._loaded([name] if name else []):
            yield self.model.get_submodule(name) if name else lambda hidden: hidden

    @contextmanager
    def head(self) -> Iterator["Head"]:
        """The final norm and the head, in memory while the `with` lasts. PlanishError for a model without a head."""
        if self.topology.head is None:
            raise PlanishError(f"{self.checkpoint.path}: a {self.topology.family} encoder has no head that makes logits. Use its features.")
        embedding = self.model.get_input_embeddings()
        names = [n for n in self.outer if self._has_weights(n) and self.model.get_submodule(n) is not embedding]
        with self._loaded(names):
            yield Head(self)

    def stand_in_for_head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden (1, t, D): (t, V) in the runner's dtype. Only inside `head()`."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        nothing = torch.zeros(1, hidden.shape[1], embedding.embedding_dim, dtype=self.dtype, device=self.device)
        stand_ins: list[nn.Module] = [_Injector(hidden) for _ in self.blocks]
        with self._stand_ins(stand_ins, {}):
            logits = self.model(inputs_embeds=nothing, use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits[0]


class Head:
    """The final norm and the language-model head of a runner."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner

    def logits(self, hidden_LD: Tensor) -> Iterator[Tensor]:
        """Logits of the final hidden states, in float32 pieces of at most HEAD_TOKENS tokens: (t, V)."""
        for start in range(0, len(hidden_LD), HEAD_TOKENS):
            yield self._runner.stand_in_for_head(hidden_LD[None, start : start + HEAD_TOKENS]).float()
