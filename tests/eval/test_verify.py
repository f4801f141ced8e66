"""Verification of good checkpoints, and of ones that were tampered with: it must say what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from helpers_stored import rounded, saved
from safetensors.torch import load_file, save_file
from torch import Tensor

from planish.calib.compressed.stored import open_stored
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk.runner import BlockRunner
from planish.eval.scores.check import Verification
from planish.eval.scores.score import arithmetic, compare, final_hidden
from planish.eval.verifying.origin import MANIFEST_FILE
from planish.eval.verifying.probe import PROBE_FILE, check_probe, read_probe, record_probe
from planish.eval.verifying.server import server_python
from planish.eval.verifying.verify import evaluation_windows, verify
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.linear import StaticGrid

W8A8 = Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=8))
W4A8 = Scheme(weights=WeightFormat(bits=4), activations=ActivationFormat(bits=8))
W4A16 = Scheme(weights=WeightFormat(bits=4))
GROUPED = Scheme(weights=WeightFormat(bits=4, granularity="group", group_size=16))
ASYMMETRIC = Scheme(weights=WeightFormat(bits=4, symmetric=False, granularity="group", group_size=16))
STATIC = Scheme(
    weights=WeightFormat(bits=8, granularity="tensor"),
    activations=ActivationFormat(bits=8, symmetric=False, granularity="tensor", dynamic=False),
)
GRID = StaticGrid(torch.tensor([[0.05]]), torch.tensor([[3.0]]))
DOWN = "model.layers.1.mlp.down_proj"


def add_probe(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """What compression writes."""
    ids = tiny_models.tokens(samples=3, length=40)
    runner = BlockRunner(open_stored(folder), dtype, torch.device("cpu"))
    with arithmetic(dtype, as_walked=True):
        (hidden,) = final_hidden(runner, [ids])
        probe = record_probe(runner, hidden, ids, torch.get_num_threads())
    (folder / PROBE_FILE).parent.mkdir(exist_ok=True)
    save_file(probe, folder / PROBE_FILE)


def build(folder: Path, scheme: Scheme, family: str = "llama", static: StaticGrid | None = None) -> Path:
    saved(tiny_models.tiny(family), folder / "model", tokenizer=True)
    out = rounded(folder / "model", folder / "out", scheme, static)
    add_probe(out)
    return out


def text(folder: Path) -> str:
    file = folder / "text.txt"
    file.write_text("Planish, v.: to make smooth by hammering lightly. " * 10)
    return str(file)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def declare(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the weights' arguments in config.json."""
    values = json.loads((folder / "config.json").read_text())
    edit(values["quantization_config"]["config_groups"]["group_0"]["weights"])
    (folder / "config.json").write_text(json.dumps(values))


def states(found: Verification) -> dict[str, bool | None]:
    return {check.name: check.ok for check in found.checks}


@pytest.mark.parametrize(
    ("scheme", "static", "least"), [(W8A8, None, 8), (W4A8, None, 8), (W4A16, None, 4), (GROUPED, None, 5), (STATIC, GRID, 8)],
    ids=["w8a8", "w4a8", "w4a16", "grouped", "static"],
)  # fmt: skip
def test_a_good_checkpoint(scheme: Scheme, static: StaticGrid | None, least: float, tmp_path: Path) -> None:
    out = build(tmp_path, scheme, static=static)
    found = verify(out, tmp_path / "model", text=text(tmp_path), length=100)
    assert found.ok, found.to_dict()
    assert states(found) == {"files": None, "structure": True, "values": True, "probe": True, "transformers": True, "against": True, "server": None}
    structure = found["structure"].figures
    assert structure["quantized_linears"] == 21
    assert least <= float(structure["quantized_bits"] or 0) < least + 2  # type: ignore[arg-type]
    assert found["probe"].figures["identical"] is True
    against = found["against"].figures
    assert against["windows"] == 4
    assert 0 < float(against["kl"] or 0) < 1  # type: ignore[arg-type]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ok"] is True


@pytest.mark.parametrize("family", [family for family in tiny_models.FAMILIES if family != "llama"])
def test_every_family(family: str, tmp_path: Path) -> None:
    found = verify(build(tmp_path, W4A16, family), text=text(tmp_path))
    assert found.ok, found.to_dict()
    assert found["probe"].ok
    if family == "gpt2":
        assert found["transformers"].ok is None
        assert "Conv1D" in found["transformers"].message
    else:
        assert found["transformers"].ok


def test_against_is_the_comparison_with_the_original(tmp_path: Path) -> None:
    """And never the other way round; with a note where another model than the manifest's is given."""
    out = build(tmp_path, W4A8)
    base, words = open_checkpoint(tmp_path / "model"), text(tmp_path)
    (out / MANIFEST_FILE).write_text(json.dumps({"recipe": {}, "model": {"sha256": base.fingerprint()}}))
    expected = compare(base, open_stored(out), evaluation_windows(base, words, 2, 60))
    found = verify(out, tmp_path / "model", text=words, windows=2, length=60, stock=False)["against"]
    assert found.figures == {
        "perplexity_base": expected.base.perplexity,
        "perplexity": expected.quantized.perplexity,
        "kl": expected.kl,
        "agreement": expected.agreement,
        "windows": 2,
        "length": 60,
        "tokens": 118,
        "note": None,
    }
    assert f"perplexity {expected.base.perplexity:.2f} before, {expected.quantized.perplexity:.2f} after" in found.message
    saved(tiny_models.tiny("llama", seed=5), tmp_path / "other")
    noted = verify(out, tmp_path / "other", text=words, windows=2, length=60, stock=False)["against"]
    assert "Note: " in noted.message
    assert "is not the very model that" in str(noted.figures["note"])


def test_an_original_whose_comparison_is_no_number(tmp_path: Path) -> None:
    """Its logits are infinite: there is nothing to compare with, and that is no success."""
    out = build(tmp_path, W8A8)
    change(tmp_path / "model", put("model.norm.weight", lambda w: w * 3e38))
    found = verify(out, tmp_path / "model", text=text(tmp_path), windows=1, length=60, stock=False)
    assert [name for name, ok in states(found).items() if ok is False] == ["against"]


def test_a_grid_that_transformers_does_not_have(tmp_path: Path) -> None:
    few = Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=4))
    found = verify(build(tmp_path, few), text=text(tmp_path))
    assert found.ok, found.to_dict()
    assert found["transformers"].ok is None
    assert "another grid" in found["transformers"].message


def test_the_probe_in_bfloat16(tmp_path: Path) -> None:
    out = build(tmp_path, W8A8)
    add_probe(out, torch.bfloat16)
    found = verify(out, stock=False)
    assert found["probe"].ok
    assert found["probe"].figures["dtype"] == "bfloat16"


def test_what_planish_did_not_write(tmp_path: Path) -> None:
    out = build(tmp_path, W8A8)
    (out / PROBE_FILE).unlink()
    found = verify(out, stock=False)
    assert found.ok
    assert states(found) == {"structure": True, "values": True} | dict.fromkeys(("files", "probe", "transformers", "against", "server"))
    assert "not checked: no planish/manifest.json" in found["files"].message
    assert "not checked: no planish/probe.safetensors" in found["probe"].message
    assert "no original model" in found["against"].message


def test_asymmetric_groups(tmp_path: Path) -> None:
    out = build(tmp_path, ASYMMETRIC)
    found = verify(out, stock=False)  # transformers with compressed-tensors 0.20 refuses packed zero points: it expects them unpacked
    assert found.ok, found.to_dict()
    assert found["structure"].figures["quantized_bits"] == pytest.approx(4 + (16 + 4) / 16, abs=0.1)  # weight_shape takes the rest


def set_nan(name: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = torch.nan

    return edit


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return edit


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return edit


def add(name: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(2)

    return edit


@pytest.mark.parametrize(
    ("scheme", "edit", "check", "message"),
    [
        (W8A8, set_nan(f"{DOWN}.weight_scale"), "values", f"{DOWN}.weight_scale has NaN"),
        (W8A8, set_nan("model.norm.weight"), "values", "model.norm.weight has NaN"),
        (W8A8, put(f"{DOWN}.weight_scale", torch.neg), "values", f"{DOWN}.weight_scale has scales that are not positive"),
        (W4A8, put(f"{DOWN}.weight", lambda w: w * 2), "values", f"{DOWN}.weight has values from -14 to 14, but 4 bits hold -8 to 7"),
        (W8A8, drop(f"{DOWN}.weight_scale"), "structure", f"{DOWN}.weight_scale is missing"),
        (W8A8, drop("model.norm.weight"), "structure", "model.norm.weight is missing"),
        (W4A16, drop(f"{DOWN}.weight_packed"), "structure", f"{DOWN}.weight_packed is missing"),
        (W8A8, add(f"{DOWN}.weight_g_idx"), "structure", f"{DOWN}.weight_g_idx is unexpected"),
        (W8A8, put(f"{DOWN}.weight", lambda w: w.T), "structure", f"{DOWN}.weight has shape (96, 64), but int-quantized with 8-bit weights"),
        (W8A8, put(f"{DOWN}.weight", lambda w: w.float()), "structure", f"{DOWN}.weight is float32"),
        (W8A8, put("model.norm.weight", lambda w: w.to(torch.int8)), "structure", "model.norm.weight is int8, but config.json leaves it"),
        (W8A8, put("model.norm.weight", lambda w: w[:-1]), "structure", "model.norm.weight has shape (63,)"),
        (W4A16, put(f"{DOWN}.weight_shape", lambda s: s.flip(0)), "structure", f"{DOWN}.weight_shape says (96, 64), but the layer is (64, 96)"),
        (W8A8, put(f"{DOWN}.weight", lambda w: -w), "probe", "differ from the model in memory"),
        (W4A16, put(f"{DOWN}.weight_packed", lambda w: w ^ 0x44444444), "probe", "differ from the model in memory"),
        (W4A16, put(f"{DOWN}.weight_scale", lambda s: s.roll(1, 0)), "probe", "differ from the model in memory"),
    ],
)  # fmt: skip
def test_tampered_tensors(scheme: Scheme, edit: Callable[[dict[str, Tensor]], None], check: str, message: str, tmp_path: Path) -> None:
    out = build(tmp_path, scheme)
    change(out, edit)
    found = verify(out, stock=False)
    assert [name for name, ok in states(found).items() if ok is False] == [check]
    assert message in found[check].message


@pytest.mark.parametrize(
    ("scheme", "changes", "check", "message"),
    [
        (W8A8, {"num_bits": 4}, "values", "but 4 bits hold -8 to 7"),
        (W4A8, {"num_bits": 8}, "values", "declares 8-bit weights, but no code needs more than 4 bits"),
        (W4A16, {"num_bits": 8}, "structure", "has shape (64, 8), but pack-quantized with 8-bit weights per channel makes it (64, 16)"),
        (W4A16, {"symmetric": False}, "structure", "weight_zero_point is missing"),
        (W4A16, {"strategy": "group", "group_size": 32}, "structure", "weight_scale has shape (64, 1)"),
        (W4A16, {"strategy": "group", "group_size": 48}, "structure", "groups of 48, which do not divide its 64 inputs"),
    ],
)  # fmt: skip
def test_other_declarations(scheme: Scheme, changes: dict[str, Any], check: str, message: str, tmp_path: Path) -> None:
    out = build(tmp_path, scheme)
    declare(out, lambda weights: weights.update(changes))
    found = verify(out, stock=False)
    assert [name for name, ok in states(found).items() if ok is False] == [check]
    assert message in found[check].message
    assert found["probe"].message == f"not checked: {check} must be right first"


def test_a_model_of_no_width_and_one_without_quantized_layers(tmp_path: Path) -> None:
    """Both are faults of the checkpoint, and found as such."""
    out = build(tmp_path, W8A8)
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, "hidden_size": 0}))
    with pytest.warns(UserWarning, match="zero-element"):
        assert verify(out, stock=False)["structure"].ok is False
    values["quantization_config"]["config_groups"] = {}
    (out / "config.json").write_text(json.dumps(values))
    assert verify(out, stock=False)["structure"].message.startswith("config.json declares no linear layer quantized; ")


def test_truncated_weights(tmp_path: Path) -> None:
    out = build(tmp_path, W8A8)
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = verify(out)
    assert found["structure"].ok is False
    assert "truncated" in found["structure"].message
    assert not found.ok


def test_transformers_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build(tmp_path, W8A8)
    other = rounded(saved(tiny_models.tiny("llama", seed=5), tmp_path / "other"), tmp_path / "other-out", W8A8)
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _folder, **settings: load(str(other), **settings))
    found = verify(out, text=text(tmp_path))
    assert found["transformers"].ok is False
    assert "KL from planish's own evaluation" in found["transformers"].message


def test_the_probe_measures_what_rounding_does(tmp_path: Path) -> None:
    out = build(tmp_path, W8A8)
    probe = read_probe(out)
    assert probe is not None
    probe["next_logprobs"] += 1e-6
    found = check_probe(open_stored(out), probe)
    assert found.ok
    assert not found.identical
    assert found.rounding is not None
    save_file(probe, out / PROBE_FILE)
    check = verify(out, stock=False)["probe"]
    assert (check.ok, "log-probabilities differ from the model in memory by" in check.message) == (True, True)
    probe["next_logprobs"] += 10 * found.tolerance.mean
    assert not check_probe(open_stored(out), probe).ok
    probe["next_logprobs"] *= torch.nan
    assert not check_probe(open_stored(out), probe).ok


def test_a_broken_probe(tmp_path: Path) -> None:
    out = build(tmp_path, W8A8)
    save_file({"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, out / PROBE_FILE)
    with pytest.raises(PlanishError, match="not a probe"):
        verify(out, stock=False)


def test_arguments_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLANISH_VLLM_ENV", raising=False)
    out = build(tmp_path, W8A8)
    with pytest.raises(PlanishError, match="no such file"):
        verify(tmp_path / "nothing")
    with pytest.raises(PlanishError, match="Give a compressed-tensors checkpoint"):
        verify(tmp_path / "model")
    with pytest.raises(PlanishError, match="no such folder"):
        verify(out, tmp_path / "nothing")
    with pytest.raises(PlanishError, match="already quantized"):
        verify(out, out)
    with pytest.raises(PlanishError, match="Did you mean vllm"):
        verify(out, server="vlm")
    with pytest.raises(PlanishError, match="make server-env"):
        verify(out, server="vllm")
    with pytest.raises(PlanishError, match="is no virtual environment"):
        verify(out, server="vllm", server_env=tmp_path)
    with pytest.raises(PlanishError, match="windows is 0"):
        verify(out, windows=0)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(PlanishError, match=r"^--text .*short\.txt holds .*, not one window of 100\. Lower --length"):
        verify(out, text=str(short), length=100)


def test_the_setting_names_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    monkeypatch.setenv("PLANISH_VLLM_ENV", str(tmp_path))
    assert server_python("vllm") == python


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_the_servers_answer_is_compared(shift: float, tmp_path: Path) -> None:
    """With a stand-in for vLLM that answers from a file."""
    from planish.eval.scores.score import score

    out = build(tmp_path, W8A8)
    checkpoint = open_stored(out)
    own = score(checkpoint, evaluation_windows(checkpoint, text(tmp_path), 3, 60), dtype=torch.bfloat16)
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    answer = json.dumps({"version": "0", "means": [-nll + shift for nll in own.windows]})
    python.write_text(f"#!/bin/sh\nprintf '%s' '{answer}' > \"$5\"\n")
    python.chmod(0o755)
    found = verify(out, text=text(tmp_path), windows=3, length=60, server="vllm", server_env=tmp_path / "env", stock=False)
    assert found["server"].ok is (shift == 0)
    assert found["server"].figures["difference"] == pytest.approx(shift, abs=1e-6)


@pytest.mark.parametrize("right", [True, False])
def test_a_server_that_fails(right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build(tmp_path, W8A8)
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho loading\necho 'ValueError: no such kernel' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("planish.eval.verifying.server.exact", lambda: right)
    found = verify(out, text=text(tmp_path), server="vllm", server_env=tmp_path / "env", stock=False)
    assert found["server"].ok is False
    start, _, advice = found["server"].message.partition(" no such kernel")
    assert start == "vLLM did not run the checkpoint: exit status 1: ValueError:"
    assert ("neither VNNI nor AMX" in advice) != right
    assert bool(advice) != right
