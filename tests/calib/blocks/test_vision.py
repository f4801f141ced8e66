"""Vision encoders: their tables proven, their checkpoints opened by any name they have, block by block the whole model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import edit_json, refused
from helpers_stored import saved
from safetensors.torch import load_file
from tiny_models import VISION, block_calls, pixels, tiny_vision
from torch import Tensor
from transformers import AutoConfig, AutoModel

from planish.calib.blocks.topology import Host, absorb, check_structure, prove, reader_weight, topology
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk.runner import BlockRunner
from planish.eval.scores.score import arithmetic, final_hidden
from planish.quant.errors import PlanishError

CPU = torch.device("cpu")


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-5 * other.norm())


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prove_holds_on_every_block(name: str, dtype: torch.dtype) -> None:
    model = tiny_vision(name).to(dtype)
    plan = topology(model.config)
    calls = block_calls(model, plan.blocks, pixels().to(dtype))
    assert len(calls) == plan.block_count == 2
    for call in calls:
        assert prove(call.block, plan.block(0), call.run) < 2e-6


@pytest.mark.parametrize("name", VISION)
def test_structure_is_checked_without_weights(name: str) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**VISION[name]))
    plan = topology(model.config)
    check_structure(model.get_submodule(plan.blocks).get_submodule("0"), plan.block(0))


@pytest.mark.parametrize(
    ("name", "site", "host"),
    [
        ("vit", "qkv", Host(kind="norm", module="layernorm_after")),
        ("dinov2", "up", Host(kind="norm", module="norm1")),
        ("dinov2", "o", Host(kind="rows", module="attention.k_proj", index=tuple(range(64)))),
        ("dinov2-swiglu", "down", Host(kind="rows", module="mlp.gate_proj", index=tuple(range(88)))),
    ],
)
def test_prove_catches_a_wrong_host(name: str, site: str, host: Host) -> None:
    model = tiny_vision(name)
    plan = topology(model.config)
    right = plan.block(0)
    wrong = replace(right, sites=tuple(replace(one, host=host) if one.name == site else one for one in right.sites))
    call = block_calls(model, plan.blocks, pixels())[0]
    with pytest.raises(PlanishError, match=f"site {site}: a scale moved"):
        prove(call.block, wrong, call.run)


def test_what_the_table_says() -> None:
    plans = {name: topology(AutoConfig.for_model(**VISION[name])) for name in VISION}
    assert all(plan.vision and plan.head is None and plan.norm == "layernorm" for plan in plans.values())
    assert {name: plan.lead for name, plan in plans.items()} == dict.fromkeys(VISION, 1) | {"dinov2_with_registers": 4}
    down = {name: plan.block(0).sites[3].host and plan.block(0).sites[3].host.module for name, plan in plans.items()}
    assert down == dict.fromkeys(VISION) | {"vit-relu": "mlp.fc1", "dinov2-swiglu": "mlp.up_proj"}
    assert [site.name for site in plans["dinov2-swiglu"].block(0).sites] == ["qkv", "o", "gate_up", "down"]


@torch.no_grad()
@pytest.mark.parametrize("name", VISION)
def test_all_sites_absorbed_at_once_keep_the_features(name: str) -> None:
    model = tiny_vision(name)
    plan = topology(model.config)
    before = model(pixels()).last_hidden_state
    for block in model.get_submodule(plan.blocks).children():
        for site in plan.block(0).sites:
            if site.host is not None:
                channels = reader_weight(block.get_submodule(site.readers[0])).shape[1]
                absorb(block, site, torch.exp2(torch.linspace(-2, 2, channels)))
    assert close(model(pixels()).last_hidden_state, before)


@torch.no_grad()
@pytest.mark.parametrize("name", VISION)
def test_the_stream_runs_from_the_embeddings_through_the_writers_to_the_norm(name: str) -> None:
    model = tiny_vision(name)
    plan = topology(model.config)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(root: torch.nn.Module, *paths: str) -> None:
        for path in paths:
            root.get_submodule(path).register_forward_hook(lambda module, args, out, path=path: seen.update({path: (args[0], out)}))

    assert plan.norm is not None
    watch(model, *plan.embeddings, plan.norm)
    calls = block_calls(model, plan.blocks, pixels())
    assert torch.equal(seen["embeddings"][1], calls[0].args[0])
    for call in calls:
        watch(call.block, *plan.block(0).writers, *plan.block(0).stream_readers)
        before, after = call.args[0], call.run(call.block)
        first, second = (seen[path][1] for path in plan.block(0).writers)
        assert close(before + first + second, after)
        attention, mlp = (seen[path][0] for path in plan.block(0).stream_readers)
        assert torch.equal(attention, before)
        assert close(mlp, before + first)
    assert torch.equal(seen[plan.norm][0], after)


@torch.no_grad()
@pytest.mark.parametrize("classifier", [False, True], ids=["encoder", "classifier"])
@pytest.mark.parametrize("name", VISION)
def test_block_by_block_is_the_model(name: str, classifier: bool, tmp_path: Path) -> None:
    model = tiny_vision(name, classifier=classifier)
    encoder = model.base_model
    checkpoint = open_checkpoint(saved(model, tmp_path / "model"))
    runner = BlockRunner(checkpoint, torch.float32, CPU)
    batches = [pixels(2), pixels(1, 24, 20, seed=2), pixels(2, seed=3)]
    with arithmetic(torch.float32):
        hidden = final_hidden(runner, batches)
    with runner.features() as features:
        found = [features(h_BLD) for h_BLD in hidden]
    for images, features_BLD in zip(batches, found, strict=True):
        patches = images.shape[-2] // 4 * (images.shape[-1] // 4)
        assert features_BLD.shape == (len(images), runner.topology.lead + patches, 64)
        assert close(features_BLD, encoder(images, **dict(runner.topology.call)).last_hidden_state)
    assert all(parameter.is_meta for parameter in runner.model.parameters())
    assert {name.partition(".")[0] for name in checkpoint.unused} == ({"classifier"} if classifier else {"pooler"} if "vit" in name[:3] else set())


@torch.no_grad()
def test_batches_of_one_shape_share_their_call_and_come_in_the_runners_dtype(tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(saved(tiny_vision("dinov2"), tmp_path / "model")), torch.bfloat16, CPU)
    started = list(runner.start([pixels(2), pixels(2, seed=5), pixels(1)]))
    assert started[0][1] is started[1][1] is not started[2][1]
    assert {hidden.dtype for hidden, _ in started} == {torch.bfloat16}


@torch.no_grad()
def test_an_encoder_has_features_and_no_logits(tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(saved(tiny_vision("vit"), tmp_path / "model")), torch.float32, CPU)
    with pytest.raises(PlanishError, match="a vit encoder has no head"), runner.head():
        pass


def test_fused_rows_are_read_as_their_parts(tmp_path: Path) -> None:
    model = tiny_vision("dinov2-swiglu")
    folder = saved(model, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    assert "encoder.layer.1.mlp.weights_in.weight" in stored
    checkpoint = open_checkpoint(folder)
    values = checkpoint.read(checkpoint.tensors)
    assert values.keys() == model.state_dict().keys()
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert checkpoint.nbytes == sum(value.nbytes for value in stored.values())


def test_names_do_not_matter_to_the_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tiny_vision("dinov2", classifier=True), tmp_path / "model"))
    assert checkpoint.info("encoder.layer.0.attention.q_proj.weight").name == "dinov2.encoder.layer.0.attention.attention.query.weight"
    checkpoint.check_finite()
    assert open_checkpoint(checkpoint.path).fingerprint() == checkpoint.fingerprint()


def test_broken_vision_models(tmp_path: Path) -> None:
    folder = saved(tiny_vision("vit"), tmp_path / "model")
    good = (folder / "config.json").read_text()
    for change, words in (
        ({"num_hidden_layers": 3}, "the weights lack layers.2."),
        ({"intermediate_size": 80}, "but config.json makes it"),
        ({"hidden_act": "unheard"}, "transformers builds no vision encoder"),
    ):
        (folder / "config.json").write_text(good)
        edit_json(folder / "config.json", **change)
        refused(folder, words)
    with pytest.raises(PlanishError, match="takes vit models of class ViTModel or ViTForImageClassification"):
        topology(AutoConfig.for_model("vit", architectures=["ViTForDreams"]))


def test_there_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match=r"a vision model \(dinov2\), so planish cannot read text with it"):
        open_checkpoint(saved(tiny_vision("dinov2"), tmp_path / "model")).tokenizer()
