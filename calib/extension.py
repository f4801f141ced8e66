"""What a checkpoint says beyond compressed-tensors, under the key `planish` of config.json: transforms of sites' inputs, clips, the prefix.

No other consumer executes any of it, so the checkpoint's format gets a name that no other library knows (packing.EXTENDED): they refuse it.

{"version": 1, "prefix": [ids], "sites": {"0.qkv": {"clip": 0.9, "chain": [{"kind": "hadamard", "block": 576}]}}}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..quant.errors import PlanishError
from ..quant.transforms.factors import Chain, restore

KEY = "planish"
VERSION = 1


@dataclass(frozen=True, slots=True)
class SiteInput:
    """What happens to a site's input before it becomes codes. clip: as ActivationFormat.clip. chain: as factors.store describes it."""

    clip: float = 1.0
    chain: tuple[Mapping[str, object], ...] = ()

    def __bool__(self) -> bool:
        return self.clip != 1 or bool(self.chain)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "SiteInput":
        """What `to_dict` made."""
        return cls(float(data["clip"]), tuple(dict(factor) for factor in data["chain"]))

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {"clip": self.clip, "chain": [dict(factor) for factor in self.chain]}


@dataclass(frozen=True, slots=True)
class Extension:
    """All of it. prefix: its tokens. sites: by address, such as 0.qkv; only those with something to say."""

    prefix: tuple[int, ...] = ()
    sites: Mapping[str, SiteInput] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.prefix) or any(self.sites.values())

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        sites = {address: site.to_dict() for address, site in self.sites.items() if site}
        return {"version": VERSION, "prefix": list(self.prefix), "sites": sites}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Extension":
        """Of a config.json; empty where it has none. Raises PlanishError: another version, or not what this class writes."""
        data = config.get(KEY)
        if data is None:
            return cls()
        try:
            if data["version"] != VERSION:
                raise PlanishError(f"config.json: {KEY}.version is {data['version']!r}, and this planish reads {VERSION}. Use the one that wrote it.")
            sites = {address: SiteInput.read(site) for address, site in data["sites"].items()}
            return cls(tuple(int(token) for token in data["prefix"]), sites)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanishError(f"config.json: {KEY} is damaged ({error!r}). Compress the model again.") from error


def chain_prefix(block: str, site: str) -> str:
    """What the names of a site's chain tensors begin with."""
    return f"{block}.planish.{site}."


def restored(site_input: SiteInput, block: str, site: str, tensors: Mapping[str, Tensor]) -> Chain:
    """The chain of a site, in float32. tensors: of the block, by full name."""
    start = chain_prefix(block, site)
    mine = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return restore(site_input.chain, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in mine.items()})
