"""planish.layers against the whole model in memory, with linears replaced by hand; and for every kind of transform, what must hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import outlying, quick, source
from helpers_front import Ran
from helpers_stored import rounded
from torch import Tensor, nn

import planish
from planish.calib.blocks.topology import topology
from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.eval.pages.layers_page import layers_page
from planish.eval.scores.layers import LayerView, SiteView, chosen_sites
from planish.eval.scores.score import compare
from planish.eval.verifying.verify import evaluation_windows
from planish.layerwise.view import Inputs
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.linear import QuantizedLinear, quantize_input
from planish.recipe.schema import with_settings
from planish.walk.learning import Learned, learned

W4A4 = Scheme(weights=WeightFormat(bits=4), activations=ActivationFormat(bits=4))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 model, and it rounded to nearest without planish's records."""
    folder = tmp_path_factory.mktemp("layers")
    base = source("llama", folder / "base", torch.float32)
    return base, rounded(base, folder / "small", W4A4)


def outputs(model: nn.Module, ids_NL: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids_NL, use_cache=False).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
    return found


def divergence(base: Tensor, other: Tensor) -> float:
    return float((base.exp() * (base - other)).sum(1).mean())


def given(model: nn.Module, path: str, ids_NL: Tensor) -> Tensor:
    """What the linear at this path is given."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    outputs(model, ids_NL)
    handle.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("steps", ["smooth", "scale_rms: {sites: ['*.o', '*.down']}, hadamard"])
def test_searched_settings_are_those_of_the_checkpoint(steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not searched again, where another device might end elsewhere."""
    model = outlying(tmp_path / "model")
    planish.compress(quick("w8a8", f"steps=[{steps}]"), model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "planish" / "manifest.json").read_text())
    assert any(site["strength"] or site["exponent"] for block in manifest["blocks"] for site in block["sites"].values())
    before = planish.layers(tmp_path / "out", model, windows=2, length=24, sites=0)
    for name in ("STRENGTHS", "EXPONENTS"):
        monkeypatch.setattr(f"planish.walk.smoothing.{name}", (0.111,))
    after = planish.layers(tmp_path / "out", model, windows=2, length=24, sites=0)
    assert [site.error for site in after.sites] == pytest.approx([site.error for site in before.sites], rel=1e-3)


def test_learned_rotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are learned again, once; where that ends elsewhere, there is no twin."""
    model, calls = source("llama", tmp_path / "model"), []
    planish.compress(quick("w8a8", "steps=[fold_norms, rotate: {at: residual, kind: learned, steps: 2}]"), model, tmp_path / "out")

    def counted(*arguments: Any) -> Learned:
        calls.append(arguments)
        return learned(*arguments)

    monkeypatch.setattr("planish.walk.fused.learned", counted)
    assert planish.layers(tmp_path / "out", model, windows=1, length=24, sites=1).whole.kl < 0.01
    assert len(calls) == 1
    monkeypatch.setattr("planish.walk.fused.learned", lambda plan, *_: Learned(plan))
    with pytest.raises(PlanishError, match="the embeddings: the checkpoint has other values than its recipe makes of this model"):
        planish.layers(tmp_path / "out", model, windows=1, length=24, sites=1)


@pytest.mark.parametrize("inputs", ["base", "quantized"])
def test_errors_and_restored_sites_are_those_of_the_whole_model(pair: tuple[Path, Path], inputs: Inputs) -> None:
    base, small = (planish.load(path, dtype=torch.float32) for path in pair)
    view = planish.layers(pair[1], pair[0], windows=2, length=24, inputs=inputs, sites=None)
    ids_NL = evaluation_windows(open_checkpoint(pair[0]), "builtin", 2, 24)
    reference = outputs(base, ids_NL)
    known = topology(open_checkpoint(pair[0]).config)
    assert view.whole.kl == pytest.approx(divergence(reference, outputs(small, ids_NL)), rel=1e-3)
    assert [site.name for site in view.sites] == [f"{block}.{site.name}" for block in range(3) for site in known.block(block).sites]
    for view_site in (view.sites[0], view.sites[7]):
        readers = next(site.readers for site in known.block(0).sites if site.name == view_site.site)
        paths = [f"{known.block_name(view_site.block)}.{path}" for path in readers]
        x_TC = given(base if inputs == "base" else small, paths[0], ids_NL)
        sums = torch.zeros(4, dtype=torch.float64)
        for path in paths:
            linear, layer = base.get_submodule(path), small.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            assert isinstance(layer, QuantizedLinear)
            assert layer.factor is not None
            codes_TC = quantize_input(x_TC, ActivationFormat(bits=4)).dequantize()
            weight_OC = layer.matrix * layer.factor.T
            y_TO = linear(x_TC)
            found = (codes_TC @ weight_OC.T, x_TC @ weight_OC.T, codes_TC @ linear.weight.T)
            sums += torch.stack([y_TO, *(other - y_TO for other in found)]).double().square().sum((1, 2)).detach()
        expected = (sums[1:] / sums[0]).sqrt()
        assert [view_site.error, view_site.weights, view_site.activations] == pytest.approx(expected.tolist(), rel=1e-3)
        before = [(path, small.get_submodule(path)) for path in paths]
        for path in paths:
            small.set_submodule(path, base.get_submodule(path))
        assert view_site.restored is not None
        assert view_site.restored.kl == pytest.approx(divergence(reference, outputs(small, ids_NL)), rel=1e-3)
        for path, layer in before:
            small.set_submodule(path, layer)


SLOW = pytest.param("paper-spinquant", marks=pytest.mark.slow)  # learns rotations, and does so again
RECIPES = ("w8a8", "w4a16-channel", "w4a4-best", "paper-quarot", "paper-resq", "paper-lorc", "paper-outliertune", SLOW)


@pytest.mark.parametrize("name", RECIPES)
def test_with_its_only_site_restored_a_model_is_the_original(name: str, tmp_path: Path) -> None:
    base = outlying(tmp_path / "base", dtype=torch.float32)  # so that nothing that stays in full precision is rounded
    only = with_settings(quick(name), ["overrides=[{sites: ['0.*', '2.*', '1.qkv', '1.o', '1.gate_up'], keep: true}]"])
    planish.compress(only, base, tmp_path / "out")
    view = planish.layers(tmp_path / "out", base, windows=1, length=24)
    (site,) = view.sites
    assert (site.name, site.restored is not None) == ("1.down", True)
    assert site.restored is not None
    assert view.whole.kl > 0
    assert site.restored.kl < max(1e-6, 1e-3 * view.whole.kl)
    exact = compare(open_checkpoint(base), open_stored(tmp_path / "out"), evaluation_windows(open_checkpoint(base), "builtin", 1, 24))
    assert view.whole.quantized.nll == pytest.approx(exact.quantized.nll, rel=1e-5)
    if not open_stored(tmp_path / "out").extension.prefix:  # which stands before the twin's text too
        assert view.whole.base.nll == pytest.approx(exact.base.nll, rel=1e-5)


def test_another_model_than_the_one_compressed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = source("llama", tmp_path / "other", torch.float32, {"num_hidden_layers": 2})
    for measure in (planish.layers, planish.verify, lambda out, base: planish.evaluate(out, against=base)):
        with pytest.raises(PlanishError, match=r"a llama model of 2 blocks and width 64, .* one was not made from the other"):
            measure(pair[1], other)
    base = outlying(tmp_path / "base")
    planish.compress(quick("w8a8"), base, tmp_path / "out")
    with pytest.raises(PlanishError, match="the checkpoint has other values than its recipe makes of this model"):
        planish.layers(tmp_path / "out", source("llama", tmp_path / "wrong"))


def test_which_sites_are_restored() -> None:
    views = [SiteView(block=i, site="o", format="", error=error, weights=0, activations=None) for i, error in enumerate((0.1, 0.4, 0.2, 0.3))]
    assert [view.block for view in chosen_sites(views, 2, evenly=False)] == [1, 3]
    assert [view.block for view in chosen_sites(views, 2, evenly=True)] == [1, 3]
    assert [view.block for view in chosen_sites(views, 1, evenly=True)] == [2]
    assert chosen_sites(views, None, evenly=True) == chosen_sites(views, 9, evenly=False) == views
    assert chosen_sites(views, 0, evenly=True) == []


def test_the_command_prints_a_table_json_and_a_page(pair: tuple[Path, Path], planish: Callable[..., Ran], tmp_path: Path) -> None:
    ran = planish("layers", pair[1], "--against", pair[0], "--length", "16", "--windows", "1", "--sites", "2", "--json", "-q", "--html", "page.html")
    data = json.loads(ran.out)
    assert ran.code == 0
    assert sum(site["restored"] is not None for site in data["sites"]) == 2
    assert (tmp_path / "page.html").read_text().count("not measured") == 1
    ran = planish("layers", pair[1], "--against", pair[0], "--length", "16", "--windows", "1", "--sites", "1", "-q")
    assert len([line for line in ran.out.splitlines() if line.endswith("–")]) == 11
    assert "–: not measured: --sites takes more" in ran.out
    assert "1 of 12 sites restored" in ran.out
    ran = planish("layers", pair[1], "--against", pair[0], "--html", "page.html")
    assert (ran.code, "exists" in ran.err) == (2, True)


def test_the_page_has_every_site_and_says_what_was_not_measured(pair: tuple[Path, Path]) -> None:
    view: LayerView = planish.layers(pair[1], pair[0], windows=1, length=16, sites=0)
    page = layers_page(view)
    assert page.count(">int4 per channel, activations int4 per token<") == 12
    assert "layer-gains" not in page


def test_all_sites_are_not_evenly_chosen_ones(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PlanishError, match="Leave out one of --evenly and --all-sites"):
        planish.layers(pair[1], pair[0], sites=None, evenly=True)
