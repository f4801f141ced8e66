"""The same numbers as lm-evaluation-harness by hand, planish's checkpoints in its own program, and an interruption."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import quick, source
from helpers_front import start, wait_for
from helpers_tasks import task_folder

import planish
from planish.calib.compressed.stored import open_any
from planish.eval.tasks.harness import LoadedLM, run_task
from planish.eval.tasks.tasks import open_tasks

TASKS = ("tiny_choice", "tiny_word")
LIMIT = 6


def by_hand(module: str, out: Path, *options: str) -> dict[str, Any]:
    """Run lm-evaluation-harness's program in a process of its own: its results, and the samples of each task by its name."""
    command = [sys.executable, "-m", module, "run", *options, "--tasks", ",".join(TASKS)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "datasets")}
    ran = subprocess.run([*command, "--output_path", str(out), "--log_samples"], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (results,) = out.rglob("results_*.json")
    samples = {name: [json.loads(line) for line in next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()] for name in TASKS}
    return {"results": json.loads(results.read_text())["results"], "samples": samples}


def own(model: str | Path, folder: Path, batch_size: int) -> dict[str, Any]:
    """The same from planish."""
    lm = LoadedLM(planish.load(model), open_any(model).tokenizer(), batch_size=batch_size)
    found = [run_task(lm, task) for task in open_tasks(TASKS, limit=LIMIT, include_path=folder)]
    return {key: {name: value for one in found for name, value in one[key].items()} for key in ("results", "samples")}


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Every metric of every task."""
    return {
        f"{name} {key}": value for name in TASKS for key, value in results["results"][name].items() if key.endswith(",none") and "_stderr" not in key
    }


def answers(results: dict[str, Any]) -> list[float]:
    """Log-likelihoods of every answer to every document, to the last bit."""
    ordered = [sorted(results["samples"][name], key=lambda sample: int(sample["doc_id"])) for name in TASKS]
    return [float(answer[0]) for samples in ordered for sample in samples for answer in sample["filtered_resps"]]


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_model_in_bfloat16_is_exactly_that_of_transformers(tmp_path: Path) -> None:
    folder, model = task_folder(tmp_path / "tasks"), open_any("demo:smollm2").path
    options = ("--model", "hf", "--model_args", f"pretrained={model},dtype=bfloat16", "--limit", str(LIMIT), "--batch_size", "1", "--device", "cpu")
    expected, found = by_hand("lm_eval", tmp_path / "out", *options, "--include_path", str(folder)), own(model, folder, 1)
    assert len(answers(found)) == LIMIT * 4
    assert answers(found) == answers(expected)
    assert figures(found) == figures(expected)


@pytest.mark.slow
def test_a_checkpoint_with_a_prefix_in_the_harness_own_program(tmp_path: Path) -> None:
    base, folder = source("llama", tmp_path / "base"), task_folder(tmp_path / "tasks")
    planish.compress(quick("w4a4-fast", "steps=[prefix: {tokens: [5, 9]}, hadamard]"), base, tmp_path / "out")
    options = ("--model", "planish", "--model_args", f"pretrained={tmp_path / 'out'},dtype=float32", "--batch_size", "8")
    expected = by_hand("planish.lm_eval", tmp_path / "results", *options, "--include_path", str(folder))
    found = planish.evaluate(tmp_path / "out", tasks=TASKS, include_path=folder, text="none", dtype=torch.float32)
    assert {f"{task.name} {name},none": metric.value for task in found.tasks for name, metric in task.metrics.items()} == pytest.approx(
        figures(expected)
    )


@pytest.mark.slow
def test_an_interruption_is_clean_and_keeps_what_the_base_model_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "kept"))
    base, folder = source("llama", tmp_path / "base"), task_folder(tmp_path / "tasks", documents=2000)
    task = open_tasks(["tiny_choice"], include_path=folder)[0]
    options = ("--tasks", ",".join(TASKS), "--include-path", folder, "--text", "none")
    process = start("eval", base, "--against", base, *options, folder=tmp_path)
    kept = tmp_path / "kept" / "evaluations"
    wait_for(kept, process)
    while not list(kept.glob("*.json")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "Stopped."
    assert "Traceback" not in err
    assert planish.evaluate(base, against=base, tasks=[task.name], include_path=folder, text="none").tasks[0].base_cached
