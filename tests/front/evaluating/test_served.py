"""`planish eval --server`: what a running server says of the same tokens is what planish measures itself."""

import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_checkpoint import edit_json
from helpers_compress import quick
from helpers_front import Ran
from helpers_openai import serving
from helpers_text import build_tokenizer

import planish
from planish.calib.compressed.stored import open_any
from planish.eval.scores.evaluation import Evaluation, TextBase, TextResult
from planish.eval.servers.client import connect
from planish.eval.tasks.harness import LoadedLM
from planish.eval.tasks.served_lm import ServedLM
from planish.quant.errors import PlanishError

Planish = Callable[..., Ran]
SHORT: dict[str, Any] = {"windows": 2, "length": 48}
OPTIONS = ("--windows", "2", "--length", "48", "--quiet")

HEAD = "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n  cache_dir: {cache}\ntest_split: test\n"
METRIC = "metric_list:\n  - metric: {metric}\n    aggregation: {aggregation}\n    higher_is_better: true\n"
TASKS = {
    "tiny_pick": 'output_type: multiple_choice\ndoc_to_text: "{{{{text}}}}"\ndoc_to_target: gold\ndoc_to_choice: "{{{{choices}}}}"\n'
    + METRIC.format(metric="acc", aggregation="mean"),
    "tiny_rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{{{long}}}}"\n'
    + METRIC.format(metric="byte_perplexity", aggregation="weighted_perplexity"),
    "tiny_say": 'output_type: generate_until\ndoc_to_text: "{{{{text}}}}"\ndoc_to_target: "{{{{text}}}}"\n'
    + 'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 5\n'
    + METRIC.format(metric="exact_match", aggregation="mean"),
}


@pytest.fixture(scope="module")
def compressed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "compressed"
    planish.compress(quick("w8a8"), original, folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "own"
    folder.mkdir()
    rows = [{"text": f"assert {i}", "choices": ["if", " is not", f" {i}"], "gold": i % 3, "long": f"if x is {i}: assert x " * 20} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        head = HEAD.format(name=name, data=folder / "rows.jsonl", cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(head + rest.replace("{{{{", "{{").replace("}}}}", "}}"))
    return folder


def parts(evaluation: Evaluation) -> tuple[TextResult, TextBase]:
    assert evaluation.text
    assert evaluation.text.base
    return evaluation.text, evaluation.text.base


@pytest.mark.parametrize("cut", [{}, {"stride": 20}, {"bos": "window"}])
def test_text_is_what_planish_measures(cut: dict[str, Any], compressed: Path, original: Path) -> None:
    own = planish.evaluate(compressed, against=original, **SHORT, **cut)
    with serving(compressed, root=str(compressed)) as (url, _):
        served = planish.evaluate(compressed, against=original, server=f"{url}/v1/", **SHORT, **cut)
    (found, base), (text, own_base) = parts(served), parts(own)
    assert found.perplexity.value == pytest.approx(text.perplexity.value, rel=1e-5)
    assert base.perplexity == pytest.approx(own_base.perplexity, rel=1e-9)
    assert base.ratio.value == pytest.approx(own_base.ratio.value, rel=1e-5)
    assert base.ratio.error == pytest.approx(own_base.ratio.error, rel=0.01)
    assert base.agreement == own_base.agreement
    assert own_base.agreement
    assert (found.sha256, found.tokens) == (text.sha256, text.tokens)
    assert base.kl is None
    assert list(found.missing) == ["kl"]
    assert served.served
    assert (served.served.url, served.served.model, served.served.engine, served.served.version) == (url, "tiny", "vLLM", "0.0.1")


@pytest.mark.parametrize("refuses", [False, True])
def test_server_with_echo_alone(refuses: bool, compressed: Path, original: Path) -> None:
    own = planish.evaluate(compressed, against=original, **SHORT)
    with serving(compressed, numbers=False, refuses=refuses) as (url, _):
        served = planish.evaluate(compressed, against=original, server=url, **SHORT)
    (found, base), (text, _) = parts(served), parts(own)
    assert found.perplexity.value == pytest.approx(text.perplexity.value, rel=1e-5)
    assert base.agreement is None
    assert sorted(found.missing) == ["agreement", "kl"]


@pytest.mark.parametrize("numbers", [True, False])
@pytest.mark.parametrize("bos", [False, True])
def test_tasks_are_what_planish_measures(numbers: bool, bos: bool, compressed: Path, tasks: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "copy"))
    build_tokenizer(bos=bos).save_pretrained(folder)
    settings: dict[str, Any] = {"tasks": tuple(TASKS), "include_path": tasks, "text": "none", "dtype": torch.float32, "batch_size": 3}
    own = planish.evaluate(folder, **settings)
    with serving(folder, numbers=numbers) as (url, ways):
        served = planish.evaluate(folder, server=url, **settings)
    assert values(served) == pytest.approx(values(own), rel=1e-5)
    assert [task.sha256 for task in served.tasks] == [task.sha256 for task in own.tasks]
    assert all(math.isfinite(value) for value in values(own).values())
    assert served.dtype == "the server's"
    assert ways.calls.count("/v1/completions") >= 6 * 3 + 6 + 6


def test_answers_in_words_are_what_planish_gives(compressed: Path) -> None:
    checkpoint = open_any(compressed)
    own = LoadedLM(planish.load(compressed, dtype=torch.float32), checkpoint.tokenizer())
    words = ("assert", "if x is 3: return", "else")
    requests = [SimpleNamespace(args=(text, {"until": ["e"], "max_gen_toks": 6, "do_sample": False})) for text in words]
    with serving(compressed) as (url, _):
        served = ServedLM(connect(url, checkpoint), checkpoint.tokenizer(), max_length=own.max_length, batch_size=2)
        answers = served.generate_until(requests)
    assert answers == own.generate_until(requests)
    assert any(answers)


def values(evaluation: Evaluation) -> dict[str, float]:
    return {f"{task.name} {name}": metric.value for task in evaluation.tasks for name, metric in task.metrics.items()}


def refuses(model: Path, url: str, *words: str, **options: Any) -> None:
    with pytest.raises(PlanishError) as caught:
        planish.evaluate(model, server=url, **{**SHORT, **options})
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_no_server_there(compressed: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    refuses(compressed, url, f"server {url}: none answers there", "Connection refused", "vllm serve")
    refuses(compressed, "127.0.0.1:8000", "is no address", "http://")
    refuses(compressed, "ftp://127.0.0.1", "is no address")


def test_another_kind_of_server(compressed: Path) -> None:
    with serving(compressed, html=True) as (url, _):
        refuses(compressed, url, "not in JSON")
    with serving(compressed, names=()) as (url, _):
        refuses(compressed, url, "/v1/models lists no model")
    with serving(compressed, numbers=False, echo=False) as (url, _):
        refuses(compressed, url, "gives no log-probabilities", "prompt_logprobs", "echo")
    with serving(compressed, shift=1) as (url, _):
        refuses(compressed, url, "not those of the tokens sent")


def test_another_model_is_served(compressed: Path, original: Path) -> None:
    with serving(compressed, root=str(original)) as (url, _):
        refuses(compressed, url, f"serves {original}, which is another model than {compressed}")
    with serving(compressed, tokenizer=build_tokenizer(bos=True)) as (url, _):  # the text itself is the same, without the token for a beginning
        assert planish.evaluate(compressed, server=url, **SHORT).served
    other = build_tokenizer()
    other.add_tokens(["hammering"])
    with serving(compressed, tokenizer=other) as (url, _):
        refuses(compressed, url, "makes other tokens of a text", "another model")


def test_a_copy_elsewhere_is_the_same_model(compressed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    with serving(compressed, root=str(copy)) as (url, _):
        assert planish.evaluate(compressed, server=url, **SHORT).served
        edit_json(copy / "config.json", rope_theta=5.0)
        refuses(compressed, url, "another model")


def test_several_models(compressed: Path) -> None:
    with serving(compressed, names=("base", "adapter")) as (url, _):
        refuses(compressed, url, "serves base, adapter", "Give the name")
        refuses(compressed, url, "no model named adaptor. Did you mean adapter?", served_name="adaptor")
        found = planish.evaluate(compressed, server=url, served_name="adapter", **SHORT)
        assert found.served
        assert found.served.model == "adapter"
    with serving(compressed, names=("org/other", f"org/{compressed.name}")) as (url, _):
        found = planish.evaluate(compressed, server=url, **SHORT)
        assert found.served
        assert found.served.model == f"org/{compressed.name}"


def test_context_too_short(compressed: Path) -> None:
    with serving(compressed, context=48) as (url, ways):
        refuses(compressed, url, "need a context of 49, but the server has 48", "at most 47", "--max-model-len 49")
        assert "/v1/completions" not in ways.calls
        assert planish.evaluate(compressed, server=url, windows=2, length=47).served
    with serving(compressed, context=None) as (url, _):
        assert planish.evaluate(compressed, server=url, **SHORT).served


@pytest.mark.parametrize(("spoilt", "words"), [(math.nan, "a log-probability is NaN"), (None, "a log-probability is None")])
def test_log_probabilities_that_are_no_numbers(spoilt: float | None, words: str, compressed: Path, original: Path) -> None:
    with serving(compressed, spoilt=(spoilt,)) as (url, _):
        refuses(compressed, url, words, "broken", "planish verify", against=original)
    with serving(compressed, spoilt=(spoilt,), numbers=False) as (url, _):
        refuses(compressed, url, words if spoilt is not None else "gives no log-probabilities")


def test_slow_server(compressed: Path) -> None:
    with serving(compressed, delay=1.0) as (url, _):
        refuses(compressed, url, "no answer within 0.2 seconds", server_timeout=0.2)


def test_key(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(compressed, key="secret") as (url, _):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        refuses(compressed, url, "HTTP 401", "Set OPENAI_API_KEY")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert planish.evaluate(compressed, server=url, **SHORT).served


def test_command(planish: Planish, compressed: Path, original: Path) -> None:
    with serving(compressed) as (url, _):
        ran = planish("eval", compressed, "--against", original, "--server", url, *OPTIONS, "--gate", "perplexity_ratio=1.05")
        assert ran.code == 0
        for words in (f"served by vLLM 0.0.1 at {url}, against", "not measured", "kl not measured: a server tells", "met: perplexity_ratio"):
            assert words in ran.out
        ran = planish("eval", compressed, "--against", original, "--server", url, *OPTIONS, "--gate", "kl=0.1")
        assert ran.code == 2
        assert "kl is not measured by this evaluation" in ran.err
        assert "No server tells whole distributions" in ran.err
