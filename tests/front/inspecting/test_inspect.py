"""planish inspect: models of every family end to end, the files it writes, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers_compress import source
from helpers_front import SHORT, Ran, invoke, tree
from helpers_stored import saved
from tiny_models import FAMILIES, VISION_FAMILIES, tiny_vision

import planish as api
from planish.calib.files.onnx_weights import PREPROCESSOR
from planish.inspecting.report_json import from_dict, schema

Planish = Callable[..., Ran]
QUICK = ("--samples", "3", "--length", "32")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_through_the_api(family: str, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    found = api.inspect(source(family, tmp_path / "model"), samples=3, length=32, progress=lambda *step: said.append(step))
    assert (found.family, found.samples, found.length, found.quality) == (family, 3, 32, "perplexity")
    assert found.text == "builtin, calibration half"
    assert found.seconds > 0
    assert found.peak_bytes > 1e7
    assert said == [*(("blocks", done, found.blocks) for done in range(1, found.blocks + 1)), ("quality", 0, 1), ("quality", 1, 1)]
    assert found.findings[0].startswith("No massive activations")
    assert any(sentence.startswith("Rounded plainly to W4A4") for sentence in found.findings)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_vision_models(family: str, tmp_path: Path, planish: Planish) -> None:
    pytest.importorskip("PIL.Image")
    model = saved(tiny_vision(family), tmp_path / "model")
    (model / "preprocessor_config.json").write_text(
        json.dumps({**PREPROCESSOR, "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}})
    )
    ran = planish("inspect", model, "--samples", "3", "--json", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    found = from_dict(json.loads(ran.out))
    assert (found.family, found.quality, found.text, found.prefix) == (family, "feature change", "generated images", None)
    assert found.interventions[0].quality == 0
    assert found.landscapes[0].tokens[0] == "class"
    ran = planish("inspect", model, "--text", "builtin")
    assert ran.code == 2
    assert "a vision model, so source (--text) is of no use" in ran.err
    ran = planish("inspect", model, "--length", "512")
    assert ran.code == 2
    assert "so length is of no use. Leave it out." in ran.err


def test_the_terminal_shows_findings_and_progress(planish: Planish, original: Path, tmp_path: Path) -> None:
    ran = planish("inspect", original, *QUICK)
    assert ran.code == 0, ran
    assert "No massive activations" in ran.out
    assert "blocks 3/3" in ran.err
    assert not tree(tmp_path)
    assert planish("inspect", original, *QUICK, "--quiet").err == ""


def test_json_follows_the_schema(planish: Planish, original: Path) -> None:
    ran = planish("inspect", original, *QUICK, "--json", "--quiet", "--threshold", "massive_ratio=500")
    assert ran.code == 0, ran
    data = json.loads(ran.out)
    jsonschema.validate(data, schema())
    assert from_dict(data).thresholds == api.Thresholds(massive_ratio=500)
    assert json.loads(planish("inspect", "--schema").out) == schema()


def test_the_same_again_is_the_same(original: Path) -> None:
    one, two = (api.inspect(original, samples=3, length=32, seed=4).sites for _ in range(2))
    assert one == two
    assert one != api.inspect(original, samples=3, length=32, seed=5).sites


def test_streams_on_disk_are_removed(original: Path, tmp_path: Path) -> None:
    in_memory, on_disk = (api.inspect(original, samples=3, length=32, offload_dir=folder) for folder in (None, tmp_path / "streams"))
    assert on_disk.sites == in_memory.sites
    assert on_disk.interventions == in_memory.interventions
    assert (tmp_path / "streams").is_dir()
    assert not tree(tmp_path / "streams")


def test_side_by_side_with_the_original(planish: Planish, original: Path, tmp_path: Path) -> None:
    assert planish("compress", "w8a8", "--model", original, "--out", "new", *SHORT, "--no-evaluate", "--quiet").code == 0
    by_model = planish("inspect", "new", *QUICK, "--against", original)
    assert by_model.code == 0, by_model
    assert "blocks of the other 3/3" in by_model.err
    refused = planish("inspect", "new", *QUICK, "--recipe", "recipe.yaml", "--quiet")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "new: nothing is recommended for a compressed model. Leave out --recipe." in refused.err
    assert not (tmp_path / "recipe.yaml").exists()
    (tmp_path / "before.json").write_text(planish("inspect", original, *QUICK, "--json", "--quiet").out)
    by_file = planish("inspect", "new", *QUICK, "--against", "before.json", "--html", "page.html")
    assert by_file.code == 0, by_file
    assert "of the other" not in by_file.err
    assert (tmp_path / "page.html").read_text().startswith("<!")
    assert "page.html" in by_file.out


def test_a_file_of_text(planish: Planish, original: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("All work and no play makes Jack a dull boy. " * 40)
    ran = planish("inspect", original, *QUICK, "--text", "notes.txt", "--json", "--quiet")
    assert from_dict(json.loads(ran.out)).text == "notes.txt"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere"),
        (("MODEL", "--text", "short.txt"), "--text short.txt holds 10 tokens, not one window of 32, samples asks for 3. Lower --samples or --length"),
        (("MODEL", "--images", "generated"), "a language model, so images is of no use"),
        (("MODEL", "--html", "taken.html"), "taken.html: exists, and planish overwrites nothing unasked"),
        (("MODEL", "--recipe", "taken.html"), "--force"),
        (("MODEL", "--html", "."), "is a folder"),
        (("MODEL", "--html", "x", "--markdown", "./x"), "--html and --markdown are both x, and one would replace the other"),
        (("MODEL", "--seed", str(2**63)), f"Error: seed is {2**63}, but must be at most"),
        (("MODEL", "--html", "no/such/page.html"), "there is no folder no/such"),
        (("MODEL", "--threshold", "massive_ratio"), "is not a setting"),
        (("MODEL", "--threshold", "massive_ration=3"), "massive_ratio"),
        (("MODEL", "--threshold", "massive_ratio=-3"), "must be positive"),
        (("MODEL", "--bits", "w4a9"), "bits w4a9: nothing is recommended for them"),
        (("MODEL", "--against", "missing.json"), "missing.json: cannot be read"),
        (("MODEL", "--against", "short.json"), "short.json: not JSON"),
        (("MODEL", "--against", "nowhere"), "nowhere"),
        (("MODEL", "--device", "cuda:99"), "cuda:99"),
    ],
)
def test_what_is_refused(planish: Planish, original: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    for name, text in (("short.txt", "Too little."), ("short.json", "{"), ("taken.html", "mine")):
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    ran = planish("inspect", *(original if part == "MODEL" else part for part in arguments), *QUICK, "--quiet")
    assert (ran.code, ran.out) == (2, ""), ran
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1
    assert tree(tmp_path) == before


def test_the_settings_are_its_own(original: Path) -> None:
    for settings, words in (({"samples": 0}, "^samples is 0, but must be at least 1"), ({"seed": -1}, "^seed is -1")):
        with pytest.raises(api.PlanishError, match=words):
            api.inspect(original, **settings)


def test_force_replaces(planish: Planish, original: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    assert planish("inspect", original, *QUICK, "--html", "page.html", "--force", "--quiet").code == 0
    assert (tmp_path / "page.html").read_text() != "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]


def test_models_that_differ_do_not_stand_side_by_side(planish: Planish, original: Path, tmp_path: Path) -> None:
    other = source("gpt2", tmp_path / "other")
    ran = planish("inspect", original, *QUICK, "--against", other, "--quiet")
    assert ran.code == 2
    assert "one was not made from the other" in ran.err
    assert "blocks 3/3" not in planish("inspect", original, *QUICK, "--against", other).err


def test_broken_weights_are_named(original: Path, tmp_path: Path) -> None:
    from helpers_compress import store
    from tiny_models import tiny

    model = tiny("llama", changes={"vocab_size": 400})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    ran = invoke("inspect", store(model, tmp_path / "model"), *QUICK, "--quiet")
    assert ran.code == 2
    assert "not finite" in ran.err
