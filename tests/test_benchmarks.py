"""The kernels' benchmarks as far as they go without a GPU: floors, tables, correctness against float64, and a polite refusal."""

import importlib.util
import math
import sys
from dataclasses import astuple
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from planish.calib.compressed.packed import kernels_used
from planish.quant.kernels import PackedLinear, native, tuning

FOLDER = Path(__file__).parent.parent / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sys.path.append(str(FOLDER))  # of a script, where it looks for its parts
right, kernels, end_to_end, cpu_speed = (script(name) for name in ("kernels_right", "kernels", "end_to_end", "cpu_speed"))


def test_operators_are_right_at_random_shapes() -> None:
    assert right.check("cpu", range(3)) == []
    assert right.check_quantizers("cpu", [0]) == []


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = right.operands
    monkeypatch.setattr(right, "operands", lambda *a: (operands(*a)[0], operands(*a)[1] * 1.1))
    assert len(right.check("cpu", [0])) == len(right.LINEARS)


def test_a_wrong_quantizer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        """Counts its calls: every second one, on the device, is another quantizer's."""

        calls = 0

        def __getattr__(self, name: str) -> object:
            def call(*values: object) -> tuple[torch.Tensor, ...]:
                Wrong.calls += 1
                made = getattr(torch.ops.planish, name)(*values)
                return made if Wrong.calls % 2 else (made[0].view(torch.int8).flip(0), *made[1:])

            return call

    found = SimpleNamespace(**{**vars(torch), "ops": SimpleNamespace(planish=Wrong())})
    monkeypatch.setattr(right, "torch", found)
    assert len(right.check_quantizers("cpu", [1])) == len(right.quantizers(1, "cpu", 0))


def test_odd_shapes_are_fresh() -> None:
    shapes = {right.odd_shapes(op, seed) for op in right.LINEARS for seed in range(20)}
    assert len(shapes) > 30
    assert all(tokens > 0 and out > 0 and inputs > 0 and inputs % 2 == 0 for tokens, out, inputs in shapes)


def test_floors() -> None:
    h200 = kernels.Ceilings(4.8e12, 989e12)
    assert kernels.floor_us("bf16", 1, 4096, 4096, h200) == pytest.approx(7.0, abs=0.1)
    assert kernels.floor_us("linear_w8a8", 1, 14336, 4096, h200) == pytest.approx(12.3, abs=0.1)
    assert kernels.floor_us("linear_w8a8", 4096, 4096, 4096, h200) == pytest.approx(69.5, abs=0.5)
    assert kernels.floor_us("linear_w4a16", 4096, 4096, 4096, h200) == pytest.approx(139, abs=1)


def test_tables_and_ratios() -> None:
    row = kernels.Row("linear_w8a8", "o", 16, us=20.0, floor_us=5.0, bf16_us=40.0)
    assert "| linear_w8a8 | o | 16 | 20.0 | 5.0 | 25 % | 2.00 |" in kernels.table([row])
    speeds = {"bf16": {"prefill": 100.0, "decode": 10.0}, "w8a8": {"prefill": 150.0, "decode": 30.0}}
    assert "| w8a8 | 150 | 1.50 | 30 | 3.00 |" in end_to_end.table(speeds)
    best = {"bf16/eager": 4.0, "bf16/compiled": 3.0, "w8a8/eager": 2.0, "w8a8/compiled": 2.0}
    times = {"bf16/eager": 1.0, "bf16/compiled": 1.0, "w8a8/eager": 2.0, "w8a8/compiled": 1.5}
    assert cpu_speed.ratios(best) == times
    found = {"job": "prefill", "ceiling": "none", "ms": best, "times_bf16": times}
    assert "| prefill | none | w8a8 | compiled | 2.0 | 1.50 |" in cpu_speed.table([found])


def test_columns_are_timed_where_their_kernel_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(kernels.columns_us("cpu")) == ["columns, one by one"]
    monkeypatch.setattr(kernels.columns, "launched", lambda _weights: True)
    monkeypatch.setattr(kernels, "graph_us", lambda calls: len(calls))
    assert kernels.columns_us("cpu")["columns, in one launch"] == 1


def test_copies_fill_more_than_a_cache() -> None:
    weight = torch.zeros(4096, 4096, dtype=torch.int8)
    assert len(kernels.copies(weight)) * weight.numel() >= kernels.ROTATED_BYTES


@pytest.mark.parametrize("scheme", list(end_to_end.SCHEMES))
def test_a_small_llama_of_every_scheme_runs(scheme: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(end_to_end.config(1, hidden=128, inner=256, vocabulary=64), dtype=torch.bfloat16).eval()
    packed = end_to_end.packed(model, scheme)
    linears = 0 if scheme == "w8a8-fp8" else 4  # q, k and v are one, gate and up too; floats have no kernel on a CPU
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == linears
    assert ("SiLU, product and quantization in one pass" in kernels_used(packed).values()) == (
        scheme in ("w8a8", "w4a8", "w4a4") and native.found().library is not None
    )
    with torch.no_grad():
        assert packed(torch.arange(5)[None]).logits.isfinite().all()


def test_tuned_configurations_are_found(tmp_path: Path) -> None:
    config = tuning.Config(16, 64, 128, 4, 3)
    name = tuning.key("Some GPU", "linear_w4a8", 7, 4096, 2048)
    assert name == "Some GPU|linear_w4a8|4096|2048|16"
    (tmp_path / "tuned.json").write_text(tuning.stored({name: config}))
    assert tuning.tuned(tmp_path / "tuned.json") == {name: config}
    assert tuning.choose("no such device", "linear_w8a8", 4096, 64, 64) == tuning.rule("linear_w8a8", 4096, 64)


def test_rules_and_their_neighbours() -> None:
    """Few tokens: two programs for every multiprocessor where columns allow; neighbours differ in one value and none is too large."""
    for op, tokens, (out, _) in product(kernels.LINEARS[:4], kernels.TOKENS, kernels.SHAPES.values()):
        config = tuning.rule(op, tokens, out)
        assert tokens > 16 or out // config.block_n >= (128 if op == "linear_w4a16" else 256)
        found = tuning.neighbours(config, tokens)
        assert len(set(found)) == len(found) > 5
        assert all(sum(a != b for a, b in zip(astuple(config), astuple(other), strict=True)) == 1 for other in found)
        assert all(other.block_m < 2 * max(16, tokens) for other in found)


def test_a_tuning_run_goes_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches pretended, one that fails among them."""
    goal = tuning.Config(16, 32, 256, 8, 4)

    def launch(_op: str, _values: object, config: tuning.Config) -> float:
        if config.stages == 6:
            raise RuntimeError("out of resource")
        return sum(abs(math.log2(a / b)) for a, b in zip(astuple(config), astuple(goal), strict=True))

    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(kernels, "compared", lambda op, values, config, _expected: launch(op, values, config))
    monkeypatch.setattr(kernels, "random_on_gpu", lambda *_: ([None] * 3 + [torch.zeros(2)], None))
    monkeypatch.setattr(kernels, "copies", lambda weight: [weight, weight])
    monkeypatch.setattr(kernels, "graph_us", lambda calls, _rounds: sum(call() for call in calls) / len(calls))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernels.best_config("linear_w4a8", 1, 4096, 4096, rounds=6) == goal


def test_another_result_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    config, expected = tuning.Config(16, 32, 256, 8, 4), torch.ones(3)
    monkeypatch.setattr(kernels, "launch", lambda *_: found)
    found = torch.ones(3).bfloat16()
    kernels.compared("linear_w4a8", [], config, expected)
    for wrong in (1.1, torch.nan):
        found = torch.tensor([1.0, wrong, 1.0])
        with pytest.raises(ValueError, match="another result"):
            kernels.compared("linear_w4a8", [], config, expected)


def test_tuning_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One point fails, one is known; the file is written as points are found."""
    seen: list[tuple[object, ...]] = []

    def best_config(*point: object) -> tuning.Config:
        seen.append(point)
        if len(seen) == 2:
            raise RuntimeError("out of resource")
        return tuning.Config(16, 32, 256, 8, 4)

    monkeypatch.setattr(kernels, "best_config", best_config)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    file, points = tmp_path / "tuned.json", len(kernels.TUNED) * 4 * len(kernels.SHAPES)
    kernels.tune(math.inf, file)
    assert len(seen) == points
    tuning.tuned.cache_clear()
    assert len(tuning.tuned(file)) == points - 1
    kernels.tune(math.inf, file)
    assert seen[points:] == seen[1:2]
    tuning.tuned.cache_clear()
    assert {tuning.bucket(tokens) for tokens in kernels.TUNED} == {tuning.bucket(tokens) for tokens in kernels.TOKENS}


def test_what_fails_is_said() -> None:
    failed = kernels.at_once({"good": lambda: 1, "bad": lambda: 1 / 0})
    assert list(failed) == ["bad"]
    assert isinstance(failed["bad"], ZeroDivisionError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and they would run")
@pytest.mark.parametrize("name", ["kernels", "end_to_end"])
def test_they_refuse_politely_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    assert globals()[name].main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err
