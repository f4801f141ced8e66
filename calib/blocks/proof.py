"""A family's table held against a real block: its structure, the order of its sites, and its hosts.

Shape suffixes: C channels of a site, R rows of a host's output.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...quant.errors import PlanishError
from .experts import seeing_all
from .sites import BlockTopology, Host, Site, absorb, reader_weight, reads

TOLERANCE = 1e-5  # float32 reaches 1e-7 where the table is right
CORRECT = "Correct the family's table in calib/blocks/families.py."


def check_structure(block: nn.Module, topology: BlockTopology, name: str = "block") -> None:
    """Every linear layer of the block is read at one site only, and all paths and sizes of the table fit; else PlanishError. Works on meta."""
    modules = dict(block.named_modules())
    linear = {path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    taken: set[str] = set()
    for site in topology.sites:
        where = f"{topology.family}, {name}, site {site.name}"
        for path in site.readers:
            if path not in linear:
                raise PlanishError(f"{where}: reader {path} is {_what(modules, path)}, not a linear layer. {CORRECT}")
            if path in taken:
                raise PlanishError(f"{where}: {path} is listed twice as a reader, but a linear layer reads one site. {CORRECT}")
            taken.add(path)
        for path in (*site.routers, *site.beside):
            if path not in modules or not reads(modules[path]):
                raise PlanishError(f"{where}: {path} is {_what(modules, path)}, which reads nothing. {CORRECT}")
            taken.add(path)
        _check_host(site, modules, where)
    taken.update(path for path, module in modules.items() if isinstance(module, nn.Conv1d) and module.groups == module.in_channels)  # mixes none
    for path, parameter in block.named_parameters():
        if parameter.dim() > 1 and path.rpartition(".")[0] not in taken:
            raise PlanishError(f"{topology.family}, {name}: no site reads {path}, shape {tuple(parameter.shape)}. {CORRECT}")


def _what(modules: dict[str, nn.Module], path: str) -> str:
    return type(modules[path]).__name__ if path in modules else "missing"


def _check_host(site: Site, modules: dict[str, nn.Module], where: str) -> None:
    widths = {path: reader_weight(modules[path]).shape[1] for path in site.all_readers}
    channels = widths[site.readers[0]]
    if set(widths.values()) != {channels}:
        raise PlanishError(f"{where}: its readers have different input sizes {widths}, so they cannot read one activation. {CORRECT}")
    if site.host is None:
        return
    module, index = modules.get(site.host.module), site.host.index
    if index is None:
        weight = getattr(module, "weight", None)
        if weight is None or weight.shape != (channels,):
            raise PlanishError(
                f"{where}: host {site.host.module} is {_what(modules, site.host.module)}, not a norm of {channels} channels. {CORRECT}"
            )
    elif not isinstance(module, nn.Linear | Conv1D):
        raise PlanishError(f"{where}: host {site.host.module} is {_what(modules, site.host.module)}, not a linear layer. {CORRECT}")
    elif len(index) != channels or not 0 <= min(index) <= max(index) < reader_weight(module).shape[0]:
        raise PlanishError(
            f"{where}: the row map gives {len(index)} channels from rows {min(index)} to {max(index)}, but the site has {channels} channels "
            f"and host {site.host.module} has {reader_weight(module).shape[0]} rows. {CORRECT}"
        )


@torch.no_grad()
def prove(block: nn.Module, topology: BlockTopology, run: Callable[[nn.Module], Tensor], name: str = "block", seed: int = 0) -> float:
    """Hold the table against one real block; the block is left exactly as it was. Returns the worst relative error.

    run(block): the block's output (..., C) for some fixed real input, in eval mode; called once, and once more per hosted site.
    Checked: the structure; the readers of a site receive one tensor and the sites come in the listed order; a random scale at each hosted
    site leaves the output unchanged. Scales are powers of two from 1/4 to 4, exact in every binary float: the bar is 1e-5 of each token's own
    output norm, whatever the dtype. Only a norm with an offset rounds anew; below float32 its bar is 4 eps of its dtype.
    PlanishError names family, block, site and error.
    """
    check_structure(block, topology, name)
    where = f"{topology.family}, {name}"
    with _watched(block, topology.sites, where):
        reference = run(block)
    if not reference.isfinite().all():
        raise PlanishError(f"{where}: its output is not finite. Its weights or its input hold NaN, infinity or numbers too large for their dtype.")
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for site in topology.sites:
        if site.host is None:
            continue
        with _restored(block, site):
            absorb(block, site, _random_scale(block, site, generator))
            error = _token_error(run(block), reference)
        bar = _bar(block, site.host)
        if not error <= bar:
            raise PlanishError(
                f"{where}, site {site.name}: a scale moved from {', '.join(site.readers)} to {site.host.module} changes some token's output "
                f"by {error:.2g} of its size, and {bar:.0e} is allowed. {CORRECT}"
            )
        worst = max(worst, error)
    return worst


def _bar(block: nn.Module, host: Host) -> float:
    dtype = next(block.get_submodule(host.module).parameters()).dtype
    rounds = host.offset != 0 and torch.finfo(dtype).bits < 32
    return 4 * torch.finfo(dtype).eps if rounds else TOLERANCE


def _random_scale(block: nn.Module, site: Site, generator: torch.Generator) -> Tensor:
    """(C,) powers of two in [1/4, 4], drawn per host row: drawn per channel and then tied, large groups would all end at 4."""
    assert site.host is not None
    weight = reader_weight(block.get_submodule(site.readers[0]))
    index_C = torch.arange(weight.shape[1]) if site.host.index is None else torch.tensor(site.host.index)
    exponents_R = torch.randint(-2, 3, (int(index_C.max()) + 1,), generator=generator)
    return torch.exp2(exponents_R.float())[index_C].to(weight.device)


def _token_error(output: Tensor, reference: Tensor) -> float:
    """max over tokens of |output - reference| / |reference|, Euclidean norms."""
    difference = (output.float() - reference.float()).norm(dim=-1)
    size = reference.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float((difference / size).max())


@contextmanager
def _restored(block: nn.Module, site: Site) -> Iterator[None]:
    """The modules that absorb touches get their values back at the end; only theirs are copied."""
    assert site.host is not None
    modules = [block.get_submodule(path) for path in (site.host.module, *site.all_readers)]
    saved = [(parameter, parameter.clone()) for module in modules for parameter in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for parameter, value in saved:
            parameter.copy_(value)


class _Order:
    """Sees every call of a reader and raises as soon as one does not fit the list of sites. A block may run several times, but only as a whole.

    A site ends before the next begins, unless its readers are apart: those of experts come one expert after the other."""

    def __init__(self, sites: tuple[Site, ...], where: str) -> None:
        self.sites, self.where = sites, where
        self.place = {reader: number for number, site in enumerate(sites) for reader in site.readers}
        self.rounds = 0
        self.seen: dict[int, Tensor] = {}
        self.waiting = set(self.place)

    def call(self, reader: str, x: Tensor) -> None:
        number = self.place[reader]
        due = next((i for i, site in enumerate(self.sites) if i >= len(self.seen) or (not site.apart and self.waiting & set(site.readers))), None)
        if reader not in self.waiting or (due is not None and number > due):
            expected = [path for path in (self.place if due is None else self.sites[due].readers) if path in self.waiting]
            where = f"{self.where}, site {self.sites[number if due is None else min(number, due)].name}"
            raise PlanishError(
                f"{where}: {reader} ran when {', '.join(expected)} was due. Sites are listed in the order in which they run. {CORRECT}"
            )
        where = f"{self.where}, site {self.sites[number].name}"
        x = x.flatten(0, -2)
        if not torch.equal(self.seen.setdefault(number, x), x):
            raise PlanishError(f"{where}: {reader} receives another tensor than the site's other readers. {CORRECT}")
        self.waiting.remove(reader)
        if not self.waiting:
            self.rounds += 1
            self.seen, self.waiting = {}, set(self.place)

    def finish(self) -> None:
        if self.rounds == 0 or self.seen:
            left = [path for path in self.place if path in self.waiting]
            raise PlanishError(f"{self.where}, site {self.sites[self.place[left[0]]].name}: {', '.join(left)} did not run with the block. {CORRECT}")


@contextmanager
def _watched(block: nn.Module, sites: tuple[Site, ...], where: str) -> Iterator[None]:
    order = _Order(sites, where)

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: order.call(path, args[0])

    handles = [block.get_submodule(path).register_forward_pre_hook(hook(path)) for site in sites for path in site.readers]
    try:
        with seeing_all(block):
            yield
        order.finish()
    finally:
        for handle in handles:
            handle.remove()
