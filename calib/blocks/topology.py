"""What feeds what in a transformer block: its sites, the linear layers that read each, and what can take a per-channel scale for free.

`topology` reads the family's table (families.py) with the facts of one config; `prove` (proof.py) holds the result against a real block.
"""

from dataclasses import replace

from transformers import PreTrainedConfig

from ...quant.errors import PlanishError
from .families import FAMILIES
from .family import EXPERTS as EXPERTS_AT
from .family import Family, Sizes, separate_up
from .proof import check_structure as check_structure
from .proof import prove as prove
from .sites import Attention as Attention
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
    family = _family(config)
    return Topology(
        family=config.model_type,
        blocks=family.blocks,
        block_count=config.num_hidden_layers,
        sites=_sites(family, config),
        embeddings=family.embeddings,
        norm=family.norm,
        head=family.head,
        writers=(*family.writers, *(f"{path}.{family.down}" for _, path, _ in _experts(family, config))),
        stream_readers=family.stream_readers,
        norm_kind=family.norm_kind,
        norm_offset=family.norm_offset,
        heads=config.num_attention_heads,
        last_reader=family.last_reader or family.head,
        input=family.input,
        call=family.call,
        lead=family.lead(config),
        attention=_attention(family, _sizes(family, config)),
    )


def _family(config: PreTrainedConfig) -> Family:
    kind, classes = config.model_type, config.architectures
    where = f"config.architectures {classes}, model_type {kind!r}"
    if kind not in FAMILIES:
        raise PlanishError(f"{where}: {_why_unknown(config)} Supported: {', '.join(FAMILIES)}.")
    family = FAMILIES[kind]
    if classes and not {family.architecture, *family.wrappers} & set(classes):
        known = " or ".join((family.architecture, *family.wrappers))
        raise PlanishError(f"{where}: planish takes {kind} models of class {known}. Give it one.")
    for refused, reason in family.refuse:
        if refused(config):
            raise PlanishError(f"{where}: {reason}. planish takes decoder-only language models whose blocks are alike; give it one without.")
    for variant in family.variants:
        if variant.when(config):
            family = replace(family, **variant.changes)
    return family


def _why_unknown(config: PreTrainedConfig) -> str:
    if config.is_encoder_decoder:
        return "this is an encoder-decoder model, and planish takes decoder-only language models."
    if config.sub_configs and hasattr(config, "text_config"):
        text = config.text_config.model_type
        return f"this is a multimodal model around a {text} language model. Save that one as a checkpoint of its own and give planish that."
    if "moe" in config.model_type or any(getattr(config, name, None) for name in EXPERTS):
        return "this is a mixture of experts; planish has no sites for routed experts yet. Give it a dense model."
    return (
        "no table for this family, and planish does not guess what feeds what. Add a Family to calib/blocks/families.py: "
        f"FAMILIES[{config.model_type!r}] says which linear layers of a block read which activation, and which norm or rows make it."
    )


def _sizes(family: Family, config: PreTrainedConfig) -> Sizes:
    heads = config.num_attention_heads
    return Sizes(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        width=family.width(config),
    )


def _sites(family: Family, config: PreTrainedConfig) -> tuple[Site, ...]:
    sizes = _sizes(family, config)
    value = Rows(module=family.v, index=family.v_rows(sizes))
    experts = _experts(family, config)
    up = tuple(f"{path}.{reader}" for _, path, _ in experts for reader in family.up) or family.up
    return (
        Site(name="qkv", readers=family.qkv, host=_norm_host(family.qkv_norm, family), stream=True),
        Site(name="o", readers=(family.o,), host=_row_host(value), makers=(value,)),
        Site(
            name="gate_up" if family.gated else "up",
            readers=up,
            host=_norm_host(family.up_norm, family),
            stream=True,
            routers=family.routers,
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
    return (*shared, *((str(number), f"{EXPERTS_AT}.{number}", family.width(config)) for number in range(family.experts(config))))


def _attention(family: Family, sizes: Sizes) -> Attention:
    return Attention(
        q=Rows(module=family.q, index=family.q_rows(sizes)),
        k=Rows(module=family.k, index=family.k_rows(sizes)),
        size=sizes.head_dim,
        module=family.q.rpartition(".")[0],
        rotary=family.rotary,
        obstacle=family.obstacle,
    )


def _row_host(rows: Rows) -> Host:
    return Host(kind="rows", module=rows.module, index=rows.index)


def _norm_host(module: str | None, family: Family) -> Host | None:
    return None if module is None else Host(kind="norm", module=module, offset=family.norm_offset)
