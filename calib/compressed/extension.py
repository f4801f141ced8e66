"""What a checkpoint says beyond compressed-tensors, under the key `planish` of config.json: transforms of sites' inputs, clips, side paths,
the prefix, how keys and values are held.

No other consumer executes any of it, so the checkpoint gets a quant_method of its own and guards (packing.OWN, GUARD): they refuse it.

{"version": 1, "prefix": [ids], "sites": {"0.qkv": {"clip": 0.9, "chain": [{"kind": "hadamard", "block": 576}], "kept": 64, "kept_bits": 8, "ranks":
{"self_attn.q_proj": 32}}}}
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ...quant.errors import PlanishError
from ...quant.key_values import HeldKeyValues, KvCache
from ...quant.transforms.factors import Chain, restore

KEY = "planish"
VERSION, NEWER = 1, 2  # the newer where keys and values are held in codes, which older readers would overlook


@dataclass(frozen=True, slots=True)
class SiteInput:
    """What happens to a site's input before it becomes codes, and beside them.

    clip: as ActivationFormat.clip. chain: as factors.store describes it. kept: so many first channels are no codes, but as linear.Kept has them,
    kept_bits: of these, None: full precision. ranks: of the low-rank paths beside readers, by path in the block.
    """

    clip: float = 1.0
    chain: tuple[Mapping[str, object], ...] = ()
    kept: int = 0
    kept_bits: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self != SiteInput()

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "SiteInput":
        """What `to_dict` made."""
        chain = tuple(dict(factor) for factor in data["chain"])
        bits, ranks = data["kept_bits"], {str(path): int(rank) for path, rank in data["ranks"].items()}
        return cls(float(data["clip"]), chain, int(data["kept"]), None if bits is None else int(bits), ranks)

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        chain = [dict(factor) for factor in self.chain]
        return {"clip": self.clip, "chain": chain, "kept": self.kept, "kept_bits": self.kept_bits, "ranks": dict(self.ranks)}


@dataclass(frozen=True, slots=True)
class Extension:
    """All of it. prefix: its tokens. sites: by address, such as 0.qkv; only those with something to say. declared: also where nothing is said.
    held: of keys and values; its first tokens are the prefix."""

    prefix: tuple[int, ...] = ()
    sites: Mapping[str, SiteInput] = field(default_factory=dict)
    declared: bool = False
    held: HeldKeyValues | None = None

    def __bool__(self) -> bool:
        return self.declared or self.held is not None or bool(self.prefix) or any(self.sites.values())

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        sites = {address: site.to_dict() for address, site in self.sites.items() if site}
        if self.held is None:
            return {"version": VERSION, "prefix": list(self.prefix), "sites": sites}
        kv_cache = {**asdict(self.held.cache), "rotated": self.held.rotated}
        return {"version": NEWER, "prefix": list(self.prefix), "sites": sites, "kv_cache": kv_cache}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Extension":
        """Of a config.json; empty where it has none. Raises PlanishError: another version, or not what this class writes."""
        data = config.get(KEY)
        if data is None:
            return cls()
        try:
            if data["version"] not in (VERSION, NEWER):
                raise PlanishError(
                    f"config.json: {KEY}.version is {data['version']!r}, and this planish reads {VERSION} and {NEWER}. Use the one that wrote it."
                )
            sites = {address: SiteInput.read(site) for address, site in data["sites"].items()}
            prefix = tuple(int(token) for token in data["prefix"])
            return cls(prefix, sites, declared=True, held=_held(data["kv_cache"], len(prefix)) if data["version"] == NEWER else None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanishError(f"config.json: {KEY} is damaged ({error!r}). Compress the model again.") from error


def _held(data: Mapping[str, Any], first: int) -> HeldKeyValues:
    """What `Extension.to_dict` made of it."""
    cache = KvCache(bits=int(data["bits"]), symmetric=bool(data["symmetric"]), clip=float(data["clip"]))
    return HeldKeyValues(cache, bool(data["rotated"]), first)


def chain_prefix(block: str, site: str) -> str:
    """What the names of a site's chain tensors begin with."""
    return f"{block}.planish.{site.replace('.', '-')}."


def restored(site_input: SiteInput, block: str, site: str, tensors: Mapping[str, Tensor]) -> Chain:
    """The chain of a site, in float32. tensors: of the block, by full name."""
    start = chain_prefix(block, site)
    mine = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return restore(site_input.chain, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in mine.items()})
