"""planish eval: tasks and text against the base model, from Python and from the command line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import quick, source
from helpers_front import Ran
from helpers_tasks import task_folder
from helpers_text import build_tokenizer
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

import planish
from planish.calib.compressed.stored import open_any
from planish.common.decode import decode
from planish.common.schemas import plain, schema_of
from planish.eval.scores.evaluation import Evaluation, metrics
from planish.eval.scores.paired import Measured
from planish.eval.tasks import harness, task_cache
from planish.eval.tasks.harness import LoadedLM, run_task
from planish.eval.tasks.tasks import open_tasks
from planish.evaluating.job import prefix_length
from planish.evaluating.tables import figure
from planish.quant.errors import PlanishError

Planish = Callable[..., Ran]
TASKS = ("tiny_choice", "tiny_word")
TEXT: dict[str, Any] = {"windows": 3, "length": 64}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_folder(tmp_path_factory.mktemp("tasks") / "folder")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and what a recipe with transforms and a prefix of two tokens made of it."""
    folder = tmp_path_factory.mktemp("pair")
    base = source("llama", folder / "base")
    planish.compress(quick("w4a4-fast", "steps=[prefix: {tokens: [5, 9]}, hadamard]"), base, folder / "out")
    return base, folder / "out"


@pytest.fixture(scope="module")
def evaluation(pair: tuple[Path, Path], tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANISH_CACHE", str(tmp_path_factory.mktemp("kept")))
        return planish.evaluate(pair[1], against=pair[0], tasks=TASKS, include_path=tasks, **TEXT)


def loglikelihoods(folder: Path, tasks: Path, batch_size: int) -> list[float]:
    """Of every answer to both tasks, in float32."""
    checkpoint = open_any(folder)
    model = planish.load(folder, dtype=torch.float32)
    lm = LoadedLM(model, checkpoint.tokenizer(), prefix=prefix_length(checkpoint), batch_size=batch_size)
    found = [run_task(lm, task)["samples"][task.name] for task in open_tasks(TASKS, include_path=tasks)]
    return [answer[0] for samples in found for sample in samples for answer in sample["filtered_resps"]]


def test_the_metrics_that_can_be_gated(evaluation: Evaluation) -> None:
    found = metrics(evaluation)
    assert {"perplexity", "perplexity_ratio", "kl", "agreement"} <= set(found)
    assert {f"accuracy.{name}" for name in TASKS} <= set(found)
    recoveries = [figure for name, figure in found.items() if name.startswith("recovery.")]
    assert ("recovery" in found) == bool(recoveries)
    if recoveries:
        assert found["recovery"].value == pytest.approx(sum(one.value for one in recoveries) / len(recoveries))
    alone = replace(evaluation, text=None, tasks=(), recovery=None)
    assert metrics(alone) == {}


def test_a_task_against_the_base_model(evaluation: Evaluation) -> None:
    choice, word = evaluation.tasks
    assert (choice.name, choice.samples, choice.main, choice.shots) == ("tiny_choice", 12, "acc", 0)
    assert list(choice.metrics) == ["acc", "acc_norm"]
    assert word.main == "acc"
    perplexity = word.metrics["perplexity"]
    assert not perplexity.higher_is_better
    assert perplexity.error is None
    for metric in choice.metrics.values():
        assert metric.right_or_wrong
        assert metric.base is not None
        assert metric.base.difference is not None
        assert metric.base.flips is not None
        assert metric.base.difference.value == pytest.approx(metric.value - metric.base.value)
        assert metric.base.flips.gained - metric.base.flips.lost == round(12 * metric.base.difference.value)


def test_json_and_its_schema(evaluation: Evaluation) -> None:
    data = json.loads(json.dumps(plain(evaluation), allow_nan=False))
    assert decode(Evaluation, data, "result", nonfinite=True) == evaluation
    Draft202012Validator(schema_of(Evaluation, "planish eval")).validate(data)


def alike(found: list[float], expected: list[float]) -> bool:
    """But for a few: an order of summation may tip a 4-bit code of an activation."""
    apart = [abs(one - other) for one, other in zip(found, expected, strict=True)]
    return sum(distance > 1e-3 for distance in apart) <= len(apart) // 12


def test_batches_do_not_change_answers(pair: tuple[Path, Path], tasks: Path) -> None:
    """Padded to the longest, and behind a prefix of keys and values."""
    for folder in pair:
        single = loglikelihoods(folder, tasks, 1)
        assert len(single) == 48
        assert alike(loglikelihoods(folder, tasks, 8), single)


def test_answers_are_those_of_plain_forward_passes(pair: tuple[Path, Path], tasks: Path) -> None:
    """With the prefix's tokens in full precision before each request."""
    tokenizer, model = build_tokenizer(), planish.load(pair[1], dtype=torch.float32)
    (task,) = open_tasks(["tiny_choice"], include_path=tasks)
    expected = []
    for instance in task.harness.instances:
        context, whole = (tokenizer(text).input_ids for text in (instance.args[0], "".join(instance.args)))
        with torch.no_grad():
            logprobs = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(1)
        expected.append(sum(logprobs[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
    assert alike(loglikelihoods(pair[1], tasks, 4)[: len(expected)], expected)


def test_the_base_model_is_asked_once(pair: tuple[Path, Path], tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = harness.answers
    monkeypatch.setattr(harness, "answers", lambda lm, task: asked.append(task.name) or answers(lm, task))
    first = planish.evaluate(pair[1], against=pair[0], tasks=TASKS, include_path=tasks, **TEXT)
    assert asked == [*TASKS, *TASKS]
    assert not any(task.base_cached for task in first.tasks)
    asked.clear()
    monkeypatch.setattr("planish.evaluating.job.hidden_states", lambda *_args, **_kwargs: pytest.fail("the base model was run again"))
    second = planish.evaluate(pair[1], against=pair[0], tasks=TASKS, include_path=tasks, **TEXT)
    assert asked == list(TASKS)
    assert metrics(second) == metrics(first)
    assert all(task.base_cached for task in second.tasks)


def test_other_documents_or_settings_are_asked_anew(pair: tuple[Path, Path], tasks: Path, tmp_path: Path) -> None:
    def kept(**settings: Any) -> bool:
        found = planish.evaluate(pair[1], against=pair[0], tasks=["tiny_choice"], text="none", **{"include_path": tasks, **settings})
        return found.tasks[0].base_cached

    assert [kept(), kept(), kept(limit=5), kept(limit=5), kept(batch_size=4), kept(dtype=torch.float32)] == [False, True, False, True, False, False]
    assert not kept(include_path=task_folder(tmp_path / "more", documents=13))
    assert kept()


def test_a_broken_file_in_the_cache_is_made_anew(pair: tuple[Path, Path], tasks: Path) -> None:
    settings: dict[str, Any] = {"against": pair[0], "tasks": ["tiny_choice"], "include_path": tasks, **TEXT}
    first = planish.evaluate(pair[1], **settings)
    folder = task_cache.cache_folder() / "evaluations"
    files = sorted(folder.iterdir())
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    for file in files:
        file.write_bytes(file.read_bytes()[:50])
    assert metrics(planish.evaluate(pair[1], **settings)) == metrics(first)
    assert sorted(folder.iterdir()) == files


def test_without_a_base_model(pair: tuple[Path, Path], tasks: Path) -> None:
    found = metrics(planish.evaluate(pair[1], tasks=["tiny_choice"], include_path=tasks, limit=3, **TEXT))
    assert set(found) == {"perplexity", "accuracy.tiny_choice"}


def test_another_model_of_the_same_build_is_noted(pair: tuple[Path, Path], planish: Planish, tmp_path: Path) -> None:
    other = shutil.copytree(pair[0], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 2}, other / "model.safetensors", {"format": "pt"})
    words = "other is not the very model that"
    settings = ("--windows", 1, "--length", 32)
    for command in ("eval", "verify"):
        ran = planish(command, pair[1], "--against", other, *settings, "--quiet")
        assert (ran.code, words in " ".join(ran.out.split())) == (0, True)
        assert words not in planish(command, pair[1], "--against", pair[0], *settings, "--quiet").out
    (note,) = json.loads(planish("eval", pair[1], "--against", other, *settings, "--json", "--markdown", "found.md").out)["notes"]
    assert words in note
    assert words in (tmp_path / "found.md").read_text()


@pytest.mark.parametrize("what", ["text", "tasks"])
def test_logits_that_are_no_numbers(what: str, pair: tuple[Path, Path], tasks: Path, tmp_path: Path) -> None:
    out = shutil.copytree(pair[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"][:] = torch.nan
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    message, settings = {
        "text": (f"{out}: logits are not finite", {**TEXT}),
        "tasks": ("down_proj.weight_scale has 64 NaN", {"tasks": ["tiny_choice"], "include_path": tasks, "text": "none"}),
    }[what]
    with pytest.raises(PlanishError, match=message):
        planish.evaluate(out, **settings)


def test_at_the_terminal(planish: Planish, pair: tuple[Path, Path], tasks: Path, tmp_path: Path) -> None:
    arguments = ("eval", pair[1], "--against", pair[0], "--tasks", ",".join(TASKS), "--include-path", tasks, "--windows", 2, "--length", 64)
    ran = planish(*arguments, "--limit", 7, "--out", "found.json", "--stride", 8)
    assert ran.code == 0
    for word in ("perplexity", "KL divergence", "tiny_choice acc", "acc_norm", "the first 7 documents", "stride 8", "McNemar"):
        assert word in ran.out, word
    assert "base: tiny_choice" in ran.err
    found = decode(Evaluation, json.loads((tmp_path / "found.json").read_text()), "found.json", nonfinite=True)
    assert found.tasks[0].samples == 7
    again = planish(*arguments, "--json", "--quiet")
    assert again.err == ""
    assert json.loads(again.out)["tasks"][0]["samples"] == 12


def test_the_schema_at_the_terminal(planish: Planish) -> None:
    assert json.loads(planish("eval", "--schema").out)["title"] == "planish eval"


WRONG = [
    (("--tasks", "tiny_choise"), "Task tiny_choise is unknown. Did you mean tiny_choice"),
    (("--tasks", "tiny_choice", "--limit", 0), "limit is 0, but must be at least 1"),
    (("--tasks", "tiny_choice", "--include-path", "nowhere"), "include path nowhere: no such folder"),
    (("--tasks", "tiny_choice", "--include-path", "empty"), "include path empty: holds no task file"),
    (("--tasks", ","), "no name is given"),
    (("--text", "none"), "no task is given"),
    (("--limit", 5), "or measure a text alone, without --include-path and --limit"),
    (("--served-name", "other"), "served name other: no server is given"),
    (("--tasks", "tiny_choice", "--batch-size", 0), "batch size is 0"),
    (("--batch-size", 8), "--batch-size: it is for tasks, and none is given. Name some with --tasks, or leave it out."),
    (("--text", "none", "--tasks", "tiny_choice", "--stride", 9), "--stride: there is no text, --text is none. Leave it out, or name a text."),
    (("--server-timeout", 9), "--server-timeout: no server is asked. Add --server URL, or leave it out."),
    (("--windows", 0), "windows is 0"),
    (("--stride", 0), "stride is 0"),
    (("--text", "nothing.txt"), "nothing.txt cannot be read"),
    (("--out", "nowhere/found.json"), "nowhere/found.json: there is no folder nowhere"),
    (("--out", "empty/there.json"), "empty/there.json: exists, and planish overwrites nothing unasked. Choose another name, or add --force."),
    (("--html", "empty/there.json"), "add --force"),
    (("--markdown", "/proc/found.md"), "/proc/found.md: /proc cannot be written (No such file or directory). Give a place where you may write."),
    (("--against", "nowhere"), "nowhere: no such folder"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_what_is_refused(options: tuple[str, ...], message: str, planish: Planish, pair: tuple[Path, Path], tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/there.json").touch()
    known = ("--include-path", tasks) if "--tasks" in options and "--include-path" not in options else ()
    ran = planish("eval", pair[1], *options, *known, "--quiet")
    assert ran.code == 2
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_cache_that_cannot_be_written(planish: Planish, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the base model runs."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "file"))
    ran = planish("eval", pair[1], "--against", pair[0])
    assert ran.code == 2
    assert "cannot be written (Not a directory). Set PLANISH_CACHE to a folder that can." in ran.err
    assert "base: text" not in ran.err


def test_no_such_folder(planish: Planish) -> None:
    assert planish("eval", "nowhere").code == 2


def test_data_that_is_not_there(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text((tasks / "choice.yaml").read_text().replace("rows.jsonl", "gone.jsonl"))
    with pytest.raises(PlanishError, match=r"Task tiny_choice cannot be loaded: .*gone.jsonl"):
        open_tasks(["tiny_choice"], include_path=tmp_path)


def test_the_extra_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(PlanishError, match=r"pip install 'planish\[eval\]'"):
        open_tasks(["tiny_choice"])


def test_help(planish: Planish) -> None:
    assert "--include-path" in planish("eval", "--help").out


def test_figures() -> None:
    assert figure(Measured(value=float("inf"), error=None), 2) == "infinite"
    assert figure(Measured(value=1.25, error=0.5), 2, sign=True) == "+1.25 ± 0.50"
