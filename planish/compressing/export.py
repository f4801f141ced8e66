"""From finished blocks to a checkpoint folder: shards, config, side files, model card and manifest; compared with memory before it gets its name.

Everything written is a function of recipe, model, versions and machine: the same run gives the same bytes. Times are not written here.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calib.blocks.families import name_in_files
from ..calib.blocks.topology import Topology
from ..calib.compressed.extension import KEY, Extension
from ..calib.compressed.layout import MARK
from ..calib.compressed.packing import Packed, guards, is_own, quantization_config, stored_names
from ..calib.files.rewritten import Rewritten, changed
from ..calib.files.shards import TensorInfo, read_header, read_json
from ..common.files import sync, write_text
from ..eval.verifying.origin import file_digests
from ..eval.verifying.probe import PROBE_FILE
from ..planning.preflight import Plan
from ..planning.servers import misread_experts, schemes_of
from ..recipe.schema import digest, to_yaml
from ..walk.journal import Journal
from ..walk.records import BlockRecord
from .modelcard import model_card
from .shardwriter import write_shards

FOLDER = "planish"  # inside the checkpoint: manifest, recipe, probe
MANIFEST = "manifest.json"
VERSIONS = ("planish", "torch", "transformers", "compressed-tensors", "safetensors")


def write_checkpoint(plan: Plan, journal: Journal, packed: Mapping[str, Packed], probe: dict[str, Tensor] | None, folder: Path) -> float:
    """Write the whole checkpoint into the new folder: weights, config, side files, and planish's own records of it. Returns bits per weight."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / FOLDER).mkdir(parents=True)
    tensors, config = _tensors(plan, journal), _config(plan, packed, journal.blocks)
    if is_own(config["quantization_config"]):
        tensors |= _guards(packed, journal.folder / "guards.safetensors")
    bits = bits_per_weight(packed, tensors, plan.quantized)
    names = _file_names(plan, tensors)
    write_shards(folder, {names[name]: info for name, info in tensors.items()}, plan.recipe.export.shard_bytes)
    for file in plan.checkpoint.carry_over():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.path / file, folder / file)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / FOLDER / "recipe.yaml", to_yaml(plan.recipe))
    made = manifest(plan, journal.blocks, tensors, bits, file_digests(folder))
    write_text(folder / FOLDER / MANIFEST, json.dumps(made, indent=2) + "\n")
    write_text(folder / "README.md", model_card(plan, journal.blocks, stored_bytes(tensors), bits))
    if probe is not None:
        save_file(probe, folder / PROBE_FILE)
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    return bits


def bits_per_weight(packed: Mapping[str, Packed], tensors: Mapping[str, TensorInfo], weights: int) -> float:
    """Of so many quantized weights, with their scales and zero points and what else planish needs to run them."""
    codes = sum(tensors[f"{name}.{local}"].nbytes for name, how in packed.items() for local in stored_names(how))
    return 8 * (codes + sum(info.nbytes for name, info in tensors.items() if MARK in name)) / max(1, weights)


def publish(folder: Path, out: Path) -> None:
    """Give the finished folder its name, in one step."""
    folder.rename(out)
    sync(out.absolute().parent)


def stored_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Size of all tensors in bytes."""
    return sum(info.nbytes for info in tensors.values())


def _tensors(plan: Plan, journal: Journal) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint, and where its bytes are: blocks and what was rewritten in the working folder, all else in the original."""
    blocks = plan.topology.blocks + "."
    tensors = {name: info for name, info in plan.source.tensors.items() if not name.startswith(blocks)}
    if plan.fused is not None:
        tensors |= _rewritten(plan.fused.source, plan.topology, journal.folder)
    for record in journal.blocks:
        tensors.update(sorted(read_header(journal.block_file(record.index)).items()))
    return tensors


def _file_names(plan: Plan, tensors: Iterable[str]) -> dict[str, str]:
    """What each tensor is called in the files. Outside a language model that takes images it keeps its name, for servers know original files."""
    names = {name: name_in_files(plan.topology.family, name) for name in tensors}
    inside, original = f"{plan.topology.body}.", plan.checkpoint.tensors
    kept = {name: original[name].name for name in names if plan.topology.body and name in original and not name.startswith(inside)}
    return names | kept if len({*(names | kept).values()}) == len(names) else names


def _beside(model: nn.Module, body: str) -> list[str]:
    """Patterns for all that is beside the language model in a model that takes images: its layers have other names inside servers."""
    parent, _, inside = body.rpartition(".")
    return [rf"re:(.*\.)?{name}\..*" for name, _ in model.get_submodule(parent).named_children() if name != inside]


def _guards(packed: Mapping[str, Packed], file: Path) -> dict[str, TensorInfo]:
    """Write what keeps others from loading the checkpoint, and say where it lies."""
    save_file(guards(sorted(packed)), file)
    return read_header(file)


def _rewritten(source: Rewritten, topology: Topology, folder: Path) -> dict[str, TensorInfo]:
    """Write what has changed outside the blocks, one file for each module, and say where the tensors lie. One module is in memory at a time."""
    model = source.skeleton()
    tensors: dict[str, TensorInfo] = {}
    for name in changed(topology, source.rewriting):
        module, file = model.get_submodule(name), folder / f"{name}.safetensors"
        source.load_module(module, name)
        save_file({f"{name}.{local}": value.detach().contiguous() for local, value in module.named_parameters()}, file)
        source.release(module)
        tensors |= read_header(file)
    return tensors


def _config(plan: Plan, packed: Mapping[str, Packed], blocks: list[BlockRecord]) -> dict[str, Any]:
    """The original config.json with a quantization_config; the tie of the embeddings as the weights have it."""
    config: dict[str, Any] = dict(read_json(plan.checkpoint.path / "config.json"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(plan.checkpoint.dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = plan.source.tied
    if plan.topology.body:
        config["text_config"] = {**config.get("text_config", {}), "tie_word_embeddings": plan.source.tied}
    model = plan.source.skeleton()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    transposed = any(isinstance(linears[name], Conv1D) for name in packed)
    extension = _extension(plan, blocks)
    if extension:
        config[KEY] = extension.to_dict()
    known = plan.topology
    routers = {f"{known.block_name(block.index)}.{path}" for block in blocks for path in known.block(block.index).routers}
    ignored = (linears.keys() - packed.keys()) | routers
    if known.body:
        ignored = {name for name in ignored if name == known.head or name.startswith(f"{known.body}.")} | {*_beside(model, known.body)}
    extended = bool(extension) or misread_experts(schemes_of(plan.packed))
    in_files = partial(name_in_files, plan.topology.family)
    declared = {in_files(name): how for name, how in packed.items()}
    experts = bool(routers) and "transformers" not in plan.servers
    config["quantization_config"] = quantization_config(declared, map(in_files, ignored), transposed=transposed, extended=extended, experts=experts)
    return config


def _extension(plan: Plan, blocks: list[BlockRecord]) -> Extension:
    sites = {f"{block.index}.{name}": site.site_input for block in blocks for name, site in block.sites.items()}
    return Extension(plan.prefix, sites, declared=plan.recipe.extended, held=plan.recipe.held_key_values(len(plan.prefix)))


def manifest(plan: Plan, blocks: list[BlockRecord], tensors: Mapping[str, TensorInfo], bits: float, files: Mapping[str, str]) -> dict[str, Any]:
    """What made this checkpoint and what it did: versions, digests, seed, arithmetic, sizes, every block's errors. files: as of file_digests."""
    calibration = plan.recipe.calibration
    return {
        "recipe": {"name": plan.recipe.name, "sha256": digest(plan.recipe)},
        "model": {"sha256": plan.checkpoint.fingerprint(), "family": plan.topology.family, "bytes": plan.checkpoint.nbytes},
        "versions": {name: version(name) for name in VERSIONS},
        "arithmetic": {"dtype": str(plan.dtype).removeprefix("torch."), "device": plan.device.type},
        "calibration": None if calibration is None else asdict(calibration),
        "fused": None if plan.fused is None else plan.fused.to_dict(),
        "files": dict(files),
        "bytes": stored_bytes(tensors),
        "bits_per_weight": bits,
        "notes": list(plan.notes),
        "servers": list(plan.servers),
        "blocks": [asdict(block) for block in blocks],
    }
