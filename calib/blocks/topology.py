"""What feeds what in a transformer block: its sites, the linear layers that read each, and what can take a per-channel scale for free.

`topology` reads the family's table (families.py) with the facts of one config; `prove` (proof.py) holds the result against a real block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from ...quant.errors import PlanishError
from .families import FAMILIES, around_unknown, family_of
from .family import EXPERTS as EXPERTS_AT
from .family import Family, Sizes, separate_up
from .multimodal import MULTIMODAL
from .proof import check_structure as check_structure
from .proof import prove as prove
from .sites import Attention as Attention
from .sites import BlockTopology as BlockTopology
from .sites import Host as Host
from .sites import Rows as Rows
from .sites import Site as Site
from .sites import Topology as Topology
from .sites import absorb as absorb
from .sites import exact_scale as exact_scale
from .sites import reader_weight as reader_weight
from .sites import tie as tie

HOMOGENEOUS = frozenset({"relu"})  # f(a x) = a f(x) for a > 0: the rows before f can host the channels after it
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # config names of a mixture of experts


def topology(config: PreTrainedConfig) -> Topology:
    """The topology of a model with this config. PlanishError for an architecture that no family table describes."""
    family, text = _family(config), config.get_text_config()
    blocks = [tuple(n for n, other in enumerate(family.others) if other.when(text, index)) for index in range(text.num_hidden_layers)]
    chosen = tuple(dict.fromkeys(blocks))
    return Topology(
        family=config.model_type,
        blocks=family.blocks,
        kinds=tuple(_block(config.model_type, _changed(family, [family.others[n].changes for n in some]), text) for some in chosen),
        kind_at=tuple(map(chosen.index, blocks)),
        embeddings=family.embeddings,
        norm=family.norm,
        head=family.head,
        norm_kind=family.norm_kind,
        norm_offset=family.norm_offset,
        heads=text.num_attention_heads,
        last_reader=family.last_reader or family.head,
        input=family.input,
        call=family.call,
        lead=family.lead(text),
        body=family.body,
        images=family.images,
    )


def _block(name: str, family: Family, config: PreTrainedConfig) -> BlockTopology:
    """Of the blocks of which the table says this. name: the family's. config: of the language model."""
    return BlockTopology(
        family=name,
        sites=_sites(family, config),
        writers=(*family.writers, *(f"{path}.{family.down}" for _, path, _ in _experts(family, config))),
        stream_readers=family.stream_readers,
        norm_offset=family.norm_offset,
        heads=config.num_attention_heads,
        attention=_attention(family, _sizes(family, config)),
    )


def _changed(family: Family, changes: Sequence[Mapping[str, Any]]) -> Family:
    for some in changes:
        family = replace(family, **some)
    return family


def _family(config: PreTrainedConfig) -> Family:
    kind, classes = config.model_type, config.architectures
    where = f"config.architectures {classes}, model_type {kind!r}"
    family, text = family_of(config), config.get_text_config()
    if family is None:
        raise PlanishError(f"{where}: {_why_unknown(config)} Supported: {', '.join(FAMILIES)}; and around some of them {', '.join(MULTIMODAL)}.")
    if classes and not {family.architecture, *family.wrappers} & set(classes):
        known = " or ".join((family.architecture, *family.wrappers))
        raise PlanishError(f"{where}: planish takes {kind} models of class {known}. Give it one.")
    for refused, reason in family.refuse:
        if refused(text):
            raise PlanishError(f"{where}: {reason}. planish takes decoder-only language models without that; give it one.")
    return _changed(family, [variant.changes for variant in family.variants if variant.when(text)])


def _why_unknown(config: PreTrainedConfig) -> str:
    if config.is_encoder_decoder:
        return "this is an encoder-decoder model, and planish takes decoder-only language models."
    if around := around_unknown(config):
        return around
    if "moe" in config.model_type or any(getattr(config, name, None) for name in EXPERTS):
        return "this is a mixture of experts for which there is no table. Add a Family to calib/blocks/mixtures.py, or give it another model."
    return (
        "no table for this family, and planish does not guess what feeds what. Add a Family to calib/blocks/families.py: "
        f"FAMILIES[{config.model_type!r}] says which linear layers of a block read which activation, and which norm or rows make it."
    )


def _sizes(family: Family, config: PreTrainedConfig) -> Sizes:
    heads = config.num_attention_heads
    if family.latent:
        return Sizes(heads=heads, kv_heads=heads, head_dim=config.v_head_dim, width=family.width(config), nope=config.qk_nope_head_dim)
    return Sizes(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        width=family.width(config),
    )


def _sites(family: Family, config: PreTrainedConfig) -> tuple[Site, ...]:
    sizes = _sizes(family, config)
    value = None if family.v is None else Rows(module=family.v, index=family.v_rows(sizes))
    gates = () if family.q is None or family.o_gate is None else (Rows(module=family.q, index=family.o_gate(sizes)),)
    into, out = family.mixing
    experts = _experts(family, config)
    up = tuple(f"{path}.{reader}" for _, path, _ in experts for reader in family.up) or family.up
    return (
        Site(
            name=into,
            readers=family.qkv,
            host=_norm_host(family.qkv_norm, family),
            stream=True,
            beside=family.beside,
            apart=bool(family.inner),
        ),
        *(Site(name=name, readers=readers, host=_norm_host(norm, family)) for name, readers, norm in family.inner),
        Site(name=out, readers=(family.o,), host=None if value is None else _row_host(value), makers=() if value is None else (value, *gates)),
        Site(
            name="gate_up" if family.gated else "up",
            readers=up,
            host=_norm_host(family.up_norm, family),
            stream=True,
            routers=family.routers,
            apart=bool(experts),
        ),
        *(_down(f"down.{name}", family, config, replace(sizes, width=width), f"{path}.") for name, path, width in experts),
        *(() if experts else (_down("down", family, config, sizes),)),
    )


def _down(name: str, family: Family, config: PreTrainedConfig, sizes: Sizes, at: str = "") -> Site:
    """The site inside an MLP. at: what the family's paths of its layers are from."""
    linear_up = family.gated or getattr(config, family.activation) in HOMOGENEOUS
    up = Rows(module=at + family.up_host, index=family.up_rows(sizes))
    gate = Rows(module=at + family.up[0], index=separate_up(sizes))  # the first rows also where gate and up are one layer
    return Site(name=name, readers=(at + family.down,), host=_row_host(up) if linear_up else None, makers=(gate, up) if family.gated else (up,))


def _experts(family: Family, config: PreTrainedConfig) -> tuple[tuple[str, str, int], ...]:
    """Name, path and inner size of each, the one for every token first. None where there is one MLP."""
    if family.experts is None:
        return ()
    shared = () if family.shared is None else (("shared", family.shared[0], family.shared[1](config)),)
    routed = tuple((str(number), f"{EXPERTS_AT}.{number}", family.width(config)) for number in range(family.experts(config)))
    return (*routed, *shared) if family.shared_last else (*shared, *routed)


def _attention(family: Family, sizes: Sizes) -> Attention | None:
    if family.q is None or family.k is None:
        return None
    return Attention(
        q=Rows(module=family.q, index=family.q_rows(sizes)),
        k=Rows(module=family.k, index=family.k_rows(sizes)),
        size=sizes.head_dim,
        module=family.q.rpartition(".")[0],
        rotary=family.rotary,
        obstacle=family.obstacle,
        cached=not family.latent,
    )


def _row_host(rows: Rows) -> Host:
    return Host(kind="rows", module=rows.module, index=rows.index)


def _norm_host(module: str | None, family: Family) -> Host | None:
    return None if module is None else Host(kind="norm", module=module, offset=family.norm_offset)
