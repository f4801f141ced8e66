"""A compressed checkpoint on disk, opened like any other: its quantized linears come to life as QuantizedLinear."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...quant.errors import PlanishError
from ...quant.linear import Parts, QuantizedLinear, share_input
from ...quant.transforms.factors import Chain
from ..blocks.prefix import PrefixCache, from_tensors, tensor_names
from ..blocks.topology import Topology, topology
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.shards import read_json
from .extension import Extension, SiteInput, chain_prefix
from .key_values import hold_in
from .layout import Layout, fitting, header_faults, read_layout
from .packing import GUARD, Packed, clipped, stored_names
from .quantized import put, stored_parts
from .side import expected_tensors, side_name, side_names


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheckpoint(Checkpoint):
    """A checked compressed model on disk. packed: its quantized linears by name, and how they are stored. linears: (N, K) of every linear layer, N
    outputs and K inputs. extension: what else is to be done. own: planish alone runs it."""

    packed: dict[str, Packed] = field(repr=False)
    linears: Mapping[str, tuple[int, int]] = field(repr=False)
    extension: Extension = Extension()
    own: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is not quantized, as config.json says."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16

    def load_module(self, module: nn.Module, prefix: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        """As of any checkpoint; the quantized linears inside are replaced by QuantizedLinear modules that compute in dtype."""
        self.load_quantized(module, f"{prefix}." if prefix else "", dtype or self.dtype, device)
        Checkpoint.load_module(self, module, prefix, dtype=dtype, device=device)

    def load_quantized(self, module: nn.Module, root: str, dtype: torch.dtype, device: torch.device | str) -> None:
        """Put the quantized linears into the module, and let its attention hold keys and values as declared. root: what their names begin with, and
        their paths in the module do not."""
        names = [name for name in self.packed if name.startswith(root)]
        for name, layer in self.quantized(names, dtype, device).items():
            put(module, name.removeprefix(root), layer)
        self.hold_key_values(module, root)

    def hold_key_values(self, module: nn.Module, root: str) -> None:
        """Let the module's attention see keys and values in codes, if the checkpoint says so. root: as in load_quantized."""
        if self.extension.held is not None:
            for path in self._attentions(root):
                hold_in(module.get_submodule(path), self.extension.held)

    def _attentions(self, root: str) -> Iterator[str]:
        """The paths behind root of the modules that compute scores."""
        known = topology(self.config)
        scores = [(known.block_name(index), known.block(index).attention) for index in range(known.block_count)]
        names = [f"{block}.{attention.module}" for block, attention in scores if attention is not None]
        yield from (name.removeprefix(root) for name in names if name.startswith(root))

    def quantized(self, names: Sequence[str], dtype: torch.dtype, device: torch.device | str) -> dict[str, QuantizedLinear]:
        """These quantized linears, ready to run; those of one site prepare their input once."""
        layers = {name: QuantizedLinear(*parts) for name, parts in self.parts(names, dtype, device)}
        for readers in self.sites(names) if self.extension.sites else []:
            share_input([layers[name] for name in readers])
        return layers

    def parts(self, names: Sequence[str], dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple[str, Parts]]:
        """What each of these quantized linears is made of, one after the other. The readers of a site have the same chain, as an object."""
        chains, inputs = self._chains(names, device), self._inputs(names)
        for name in names:
            local = [f"{name}.{part}" for part in stored_names(self.packed[name])]
            local += [f"{name}.bias"] if f"{name}.bias" in self.tensors else []
            local += side_names(name, self.tensors).values()
            read = self.read(local)
            self._check_shape(name, read.get(f"{name}.weight_shape"))
            tensors = {key: tensor.to(device) for key, tensor in read.items()}
            yield name, stored_parts(name, tensors, self.packed[name], chains, inputs, dtype)

    def _check_shape(self, name: str, said: Tensor | None) -> None:
        """PlanishError if the shape that goes with packed codes is another than the layer's."""
        if said is not None and tuple(said.tolist()) != self.linears[name]:
            where = f"{self.path}: {name}.weight_shape says {tuple(said.tolist())}, but the layer is {self.linears[name]}"
            raise PlanishError(f"{where}. The checkpoint is damaged: copy it again, or compress again.")

    def sites(self, names: Iterable[str]) -> list[list[str]]:
        """These linears by the input that they read, an expert's apart, each list in the order of `names`. PlanishError: a family without a table."""
        sites, known = dict[object, list[str]](), topology(self.config)
        for name in names:
            address = known.address(name)
            sites.setdefault(name if address is None else (address[0], address[1].name, name.rpartition(".")[0]), []).append(name)
        return list(sites.values())

    def _chains(self, linears: Iterable[str], device: torch.device | str) -> dict[str, Chain]:
        """What the inputs of these linears go through; readers of one site share theirs."""
        if not self.extension.sites:
            return {}
        known = topology(self.config)
        chains: dict[str, Chain] = {}
        for block, site in dict.fromkeys(address for name in linears if (address := known.address(name)) is not None):
            if site_input := self.extension.sites.get(f"{block}.{site.name}"):
                start = chain_prefix(known.block_name(block), site.name)
                tensors = {name: tensor.to(device) for name, tensor in self.read(n for n in self.tensors if n.startswith(start)).items()}
                width = self.linears[f"{known.block_name(block)}.{site.readers[0]}"][1]
                try:
                    chain = fitting(site_input, known.block_name(block), site.name, tensors, width)
                except PlanishError as error:
                    raise PlanishError(f"{self.path}: {error}") from error
                chains |= dict.fromkeys((f"{known.block_name(block)}.{path}" for path in site.readers), chain)
        return chains

    def _inputs(self, linears: Iterable[str]) -> dict[str, SiteInput]:
        """What is said of these linears' inputs."""
        known = topology(self.config) if self.extension.sites else None
        found = {name: _site_input(name, self.extension, known) for name in linears} if known else {}
        return {name: site_input for name, site_input in found.items() if site_input is not None}

    def prefix_cache(self, dtype: torch.dtype, device: torch.device | str) -> PrefixCache | None:
        """The prefix that stands before every text; None if there is none."""
        if not self.extension.prefix:
            return None
        known = topology(self.config)
        blocks = [known.block_name(index) for index in range(known.block_count)]
        tensors = self.read(name for block in blocks for name in tensor_names(block))
        return from_tensors(len(self.extension.prefix), blocks, {name: tensor.to(device, dtype) for name, tensor in tensors.items()})

    @staticmethod
    def release(module: nn.Module) -> None:
        """Give the module's memory back."""
        for path, part in list(module.named_modules()):
            if isinstance(part, QuantizedLinear):
                put(module, path, nn.Identity())
        Checkpoint.release(module)

    def check_finite(self, report: Callable[[int, int], None] | None = None) -> None:
        """As of any checkpoint, for the tensors of a floating-point type."""
        floats = {name: info for name, info in self.tensors.items() if info.dtype.is_floating_point}
        Checkpoint(path=self.path, config=self.config, tensors=floats, aliases={}, unused=()).check_finite(report)


def is_compressed(folder: Path) -> bool:
    """Whether config.json there describes a quantized model."""
    return bool(read_json(folder / "config.json").get("quantization_config"))


def open_stored(folder: str | Path) -> StoredCheckpoint:
    """Open a compressed checkpoint. Raises PlanishError: as open_checkpoint, and for quantization that planish does not read."""
    layout = read_layout(Path(folder))
    folder, skeleton, tensors, extension = layout.folder, layout.skeleton, layout.tensors, layout.extension
    known = topology(layout.config) if extension else None
    packed = {name: _with_clip(how, name, extension, known) for name, how in layout.packed.items()} if known else layout.packed
    aliases = {target: source for target, source in skeleton.all_tied_weights_keys.items() if target not in tensors and source in tensors}
    needed = {name for name, _ in skeleton.named_parameters()} - aliases.keys() - {f"{name}.weight" for name in packed}
    needed |= {f"{name}.{part}" for name, how in packed.items() for part in stored_names(how)}
    needed |= {name for index in range(known.block_count) for name in tensor_names(known.block_name(index))} if known and extension.prefix else set()
    needed |= {side for name in packed for side in _side_needed(name, extension, known)} if known else set()
    missing = sorted(needed - tensors.keys())
    if missing:
        raise PlanishError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}. The checkpoint is incomplete: compress again.")
    _check_headers(layout)
    guarded = {f"{name}.{GUARD}" for name in packed}
    unused = tuple(sorted(name for name in tensors.keys() - needed - guarded if ".planish." not in name))
    return StoredCheckpoint(
        path=folder,
        config=layout.config,
        tensors=dict(tensors),
        aliases=aliases,
        unused=unused,
        packed=dict(packed),
        linears=layout.linears,
        extension=extension,
        own=layout.own,
    )


def _check_headers(layout: Layout) -> None:
    """PlanishError if the weight files hold other tensors than config.json declares."""
    faults = list(header_faults(layout))
    if faults:
        more = f", and {len(faults) - 1} more of the kind" if len(faults) > 1 else ""
        advice = "config.json and the weights are not of one checkpoint: copy it again, or compress again. `planish verify` lists what is wrong."
        raise PlanishError(f"{layout.folder}: {faults[0]}{more}. {advice}")


def _with_clip(packed: Packed, name: str, extension: Extension, known: Topology) -> Packed:
    site_input = _site_input(name, extension, known)
    return packed if site_input is None or packed.scheme.activations is None else clipped(packed, site_input.clip)


def _site_input(name: str, extension: Extension, known: Topology) -> SiteInput | None:
    """What is said of the input of the linear of this full name."""
    address = known.address(name)
    return None if address is None else extension.sites.get(f"{address[0]}.{address[1].name}")


def _side_needed(name: str, extension: Extension, known: Topology) -> Iterator[str]:
    """The tensors of its side path."""
    address, site_input = known.address(name), _site_input(name, extension, known)
    if address is not None and site_input is not None:
        path = name.removeprefix(f"{known.block_name(address[0])}.")
        yield from (side_name(name, local) for local in expected_tensors(site_input, path, 0, 0))


def open_any(model: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """A compressed checkpoint if the local folder holds one, else what open_checkpoint opens."""
    path = Path(model).expanduser()
    if (path / "config.json").is_file() and is_compressed(path):
        return open_stored(path)
    return open_checkpoint(model, allow_pickle=allow_pickle)
