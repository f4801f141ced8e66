"""polish: nearer to the closed form where there is one, never worse than the start, the same after a resume, and stored as it was measured."""

from pathlib import Path

import pytest
import torch
from helpers_compress import outlying, quick, source
from helpers_front import tree
from safetensors.torch import load_file
from torch import Tensor, nn

import planish
from planish.calib.blocks.sites import Site
from planish.calib.compressed.packing import Packed
from planish.calib.walk.runner import Call
from planish.calib.walk.stream import Stream
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.linear import QuantizedLinear
from planish.quant.solvers import Rtn
from planish.quant.transforms import Polish
from planish.recipe.schema import Recipe, load_recipe, to_yaml, with_settings
from planish.walk.callbacks import Silent
from planish.walk.polishing import Flow, polish
from planish.walk.solving import Readers

I, O, T, BATCHES = 24, 16, 64, 4  # noqa: E741


class Lone(nn.Module):
    """A block of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(I, O, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down(hidden)
        return out


def polished(*settings: str) -> Recipe:
    return quick(
        "w4a4-fast", "calibration.samples=6", 'steps=[{"shift":{}},{"hadamard":{}},{"clip":{}},{"polish":{"steps":24,"lr":0.01}}]', *settings
    )


def lone(step: Polish, act: ActivationFormat | None) -> tuple[Readers, Flow, Tensor, Tensor]:
    """One layer polished by itself: what became of it, and inputs and targets, (T, I) and (T, O), of all batches."""
    torch.manual_seed(0)
    block, scheme = Lone(), Scheme(weights=WeightFormat(bits=3, granularity="channel"), activations=act)
    x, mix = torch.randn(BATCHES, 1, T, I), torch.randn(I, I)
    inputs, targets = Stream(None), Stream(None)
    for i in range(BATCHES):
        inputs[i] = x[i] @ mix
        targets[i] = block(inputs[i]).detach()
    readers = Readers(
        Site(name="down", readers=("down",)), Packed(scheme, "pack-quantized"), None, {"down": block.down.weight.detach()}, {"down": None}, {}
    )
    assert scheme.weights is not None
    readers.solved["down"] = Rtn().solve(block.down.weight.detach(), scheme.weights, None, torch.float32).weight
    flow = Flow(0, [Call([((), {})]) for _ in range(BATCHES)], inputs, targets, [torch.ones(T, dtype=torch.bool)] * BATCHES)
    with torch.no_grad():
        done = polish(step, block, {"down": readers}, flow, torch.float32)
    assert done is not None
    assert done.after < done.before
    return readers, flow, torch.cat([inputs[i][0] for i in range(BATCHES)]), torch.cat([targets[i][0] for i in range(BATCHES)])


def test_scales_come_to_the_least_squares_of_their_channels() -> None:
    """Without codes of activations each channel's best scale is a quotient: <y, y0> / <y, y>."""
    readers, _, x_TI, target_TO = lone(Polish(steps=400, lr=0.02, clip=False), None)
    scheme = readers.packed
    assert scheme is not None
    assert scheme.scheme.weights is not None
    torch.manual_seed(0)
    start = Rtn().solve(Lone().down.weight.detach(), scheme.scheme.weights, None, torch.float32).weight
    learned = slice(0, 3 * T)
    y_TO = x_TI[learned] @ start.dequantize().T
    best_O = (y_TO * target_TO[learned]).sum(0) / y_TO.square().sum(0)
    found_O = (readers.solved["down"].scale / start.scale)[:, 0]
    assert (best_O - 1).abs().max() > 0.02
    torch.testing.assert_close(found_O, best_O, atol=4e-3, rtol=0)


def test_what_it_says_is_what_the_layer_then_does() -> None:
    """The error on the batch held out, computed by the layer as it runs; and the clip has moved."""
    act = ActivationFormat(bits=4, symmetric=False)
    readers, flow, x_TI, target_TO = lone(Polish(steps=60, lr=0.01), act)
    layer = QuantizedLinear(readers.solved["down"], None, readers.activations)
    held = slice(3 * T, None)
    error = float((layer(x_TI[held]) - target_TO[held]).norm() / target_TO[held].norm())
    assert readers.activations is not None
    assert readers.activations.clip < 1
    torch.manual_seed(0)
    with torch.no_grad():
        again = polish(Polish(steps=1, lr=1e-6), Lone(), {"down": readers}, flow, torch.float32)
    assert again is not None
    assert error == pytest.approx(again.before, rel=1e-4)


def test_one_batch_is_nothing_to_learn_from() -> None:
    readers, flow, _, _ = lone(Polish(steps=2), None)
    one = Flow(0, flow.calls[:1], flow.inputs, flow.targets, flow.keep_T[:1])
    assert polish(Polish(), Lone(), {"down": readers}, one, torch.float32) is None


@pytest.mark.usefixtures("pythons_text")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_a_model_comes_nearer_to_its_original(family: str, tmp_path: Path) -> None:
    """No block's error on held-out text rises, some falls; and what is saved is what was measured (the compression's own check)."""
    model = outlying(tmp_path / "model") if family == "llama" else source(family, tmp_path / "model")
    done = planish.compress(polished("calibration.samples=16"), model, tmp_path / "out")  # too few to learn from are no test
    pairs = [block.polished for block in done.blocks]
    assert all(pair is not None and pair[1] <= pair[0] for pair in pairs)
    assert any(pair is not None and pair[1] < pair[0] for pair in pairs)


@pytest.mark.parametrize("steps", ['{"prefix":{"tokens":[5]}},{"quad":{"rank":8}}', '{"resq":{"share":0.125}}', '{"low_rank":{"rank":4}}'])
def test_it_goes_with_what_runs_beside_the_codes(steps: str, tmp_path: Path) -> None:
    recipe = polished(f'steps=[{steps},{{"polish":{{"steps":8}}}}]')
    done = planish.compress(recipe, outlying(tmp_path / "model"), tmp_path / "out")
    assert all(block.polished is not None and block.polished[1] <= block.polished[0] for block in done.blocks)


@pytest.mark.usefixtures("pythons_text")
@pytest.mark.parametrize(("clip", "servers"), [("true", ("planish",)), ("false", ("planish", "transformers"))])
def test_clips_that_are_learned_are_planishs_own(clip: str, servers: tuple[str, ...], tmp_path: Path) -> None:
    """Nothing else of the recipe is, and no other consumer could be told of them."""
    settings = (f"steps=[polish: {{lr: 0.01, steps: 24, clip: {clip}}}]", "scheme.activations={bits: 4, symmetric: false}", "calibration.samples=16")
    done = planish.compress(quick("w4a8", *settings), outlying(tmp_path / "model"), tmp_path / "out", dtype=torch.float32)
    assert done.plan.servers == servers
    assert any(block.polished is not None and block.polished[1] < block.polished[0] for block in done.blocks)
    assert any(site.clip < 1 for block in done.blocks for site in block.sites.values()) == (clip == "true")
    assert planish.verify(tmp_path / "out", stock=False).ok


@pytest.mark.usefixtures("pythons_text")
def test_some_sites_alone(tmp_path: Path) -> None:
    """The other sites run as codes and keep their scales; a block without a site of the step's is left as it is."""
    model = outlying(tmp_path / "model")
    recipe = polished("calibration.samples=16", "steps.polish.sites=['*.down', '0.qkv']", "overrides=[{sites: ['2.down'], keep: true}]")
    without = with_settings(recipe, [f"steps={[{'shift': {}}, {'hadamard': {}}, {'clip': {}}]}"])
    done = planish.compress(recipe, model, tmp_path / "out")
    planish.compress(without, model, tmp_path / "without")
    assert [block.polished is None for block in done.blocks] == [False, False, True]
    found, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "without"))
    changed = [name.split(".") for name in found if not found[name].equal(plain[name])]
    first = min(name[2] for name in changed)  # what follows sees another stream
    assert {name[4] for name in changed if name[2] == first} <= {"0": {"q_proj", "k_proj", "v_proj", "down_proj"}, "1": {"down_proj"}}[first]


class Stop(Exception):
    """Ends a run."""


class Stopping(Silent):
    """Stops after the first block."""

    def stage(self, name: str, steps: int) -> None:
        self.blocks = name == "blocks"

    def step(self, done: int, note: str = "") -> None:
        if self.blocks:
            raise Stop


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = outlying(tmp_path / "model")
    whole = planish.compress(polished(), model, tmp_path / "whole")
    with pytest.raises(Stop):
        planish.compress(polished(), model, tmp_path / "cut", progress=Stopping())
    cut = planish.compress(polished(), model, tmp_path / "cut")
    assert cut.blocks == whole.blocks
    assert tree(cut.out)["model.safetensors"] == tree(whole.out)["model.safetensors"]


def test_yaml_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(polished()), encoding="utf-8")
    assert load_recipe(path) == polished()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("steps.polish.steps=0",), "polish.steps is 0"),
        (("steps.polish.lr=1",), "polish.lr is 1"),
        (("steps.polish.held_out=1",), "polish.held_out is 1"),
        (("calibration.batch_size=6",), "steps: polish is to be judged by text that is held out, but calibration has one batch, of 6 samples"),
        (("calibration=null", "solver=rtn", 'steps=[{"polish":{}}]'), "the step polish cannot do without"),
    ],
)
def test_what_is_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanishError, match=message.replace(".", r"\.")):
        with_settings(polished(), settings)
