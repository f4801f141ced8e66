"""Documents from every kind of source, and one clear message for every way that a source can be wrong."""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from planish.calib.data import documents
from planish.calib.data.documents import Document, builtin, prose, take
from planish.quant.errors import PlanishError


def every(source: str | Path) -> list[Document]:
    found, complete = take(str(source), "all", None)
    assert complete
    return found


def test_builtin_is_planishs_own_text_and_the_topics() -> None:
    everything, first, own = builtin("all"), builtin("calibration"), prose()
    assert everything == [*own, *(topics[name] for name in sorted(topics))]
    assert first == everything[: len(first)]
    assert 0.5 <= sum(map(len, first[len(own) :])) / sum(map(len, everything[len(own) :])) <= 0.7


@pytest.mark.smoke
def test_own_text_is_of_many_kinds_in_turn() -> None:
    kinds = [path.read_text(encoding="utf-8") for path in sorted(Path(documents.__file__).with_name("text").glob("*.txt"))]
    own = prose()
    assert sum(map(len, own)) > 90_000
    assert len(set(own)) == len(own) == sum(kind.count("\n%%\n") + 1 for kind in kinds)
    assert all(any(document in kind for document in own[: len(kinds)]) for kind in kinds)
    assert all(len(document) > 200 and "%%" not in document and "\ufffd" not in document for document in own)


def test_builtin_evaluation_repeats_nothing_of_calibration() -> None:
    seen = {paragraph for text in builtin("calibration") for paragraph in text.split("\n\n")}
    held_out = [paragraph for text in builtin("evaluation") for paragraph in text.split("\n\n")]
    assert not seen.intersection(held_out)
    assert sum(map(len, held_out)) > 100_000
    assert set(held_out) <= {paragraph for text in builtin("all") for paragraph in text.split("\n\n")}


def test_take_stops_at_the_budget() -> None:
    taken, complete = take("builtin", "all", 5000)
    assert not complete
    assert taken == builtin("all")[: len(taken)]
    assert sum(map(len, taken[:-1])) < 5000 <= sum(map(len, taken))


def test_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "Text.TXT"
    path.write_bytes("\ufeffé\r\ncat\n".encode())
    assert every(path) == ["é\ncat\n"]
    assert take(str(path), "all", 2) == (["é\n"], False)
    assert take(str(path), "all", 6) == (["é\ncat\n"], True)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("cat", encoding="utf-8")
    assert every("~/a.txt") == ["cat"]


def test_jsonl_skips_blank_lines_and_prefers_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "messages": 3}\n\n  \n{"text": null, "messages": [{"role": "user", "content": "hi"}]}\n', encoding="utf-8")
    assert every(path) == ["one", [{"role": "user", "content": "hi"}]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a.jsonl:2: not a line of JSON"),
        (b'{"text": "\xff"}', r"a.jsonl:2: not a line of JSON in UTF-8"),
        (b'["a"]', r"a.jsonl:2: a list where an object"),
        (b'{"body": "a", "id": 1}', r"a.jsonl:2: no value in a field text, messages, conversations; it has body, id"),
        (b"{}", r"a.jsonl:2: .* it has nothing"),
        (b'{"text": 3}', r"a.jsonl:2: text is a int, not a string"),
        (b'{"text": "a\\ud800"}', r"a.jsonl:2: text holds half a surrogate pair at character 1"),
        (b'{"messages": []}', r"a.jsonl:2: messages is not a list of messages"),
        (b'{"messages": "hi"}', r"a.jsonl:2: messages is not a list of messages"),
        (b'{"conversations": ["hi"]}', r"a.jsonl:2: conversations is not a list of messages"),
        (b'{"messages": [{"role": "user"}]}', r"a.jsonl:2: messages\[0\] has role, but a message has role and content"),
        (b'{"messages": [{"role": "user", "content": ["hi"]}]}', r"a.jsonl:2: messages\[0\].content is a list, not a string"),
        (b'{"conversations": [{"from": "gpt"}]}', r"a.jsonl:2: conversations\[0\] has from"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(PlanishError, match=message):
        every(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bultin", "Text source bultin is unknown. Did you mean builtin?"),
        ("nowhere.txt", "nowhere.txt cannot be read: No such file"),
        ("wiki=latin.txt", "wiki=latin.txt cannot be read: No such file or directory. Texts have no names here: give latin.txt."),
        ("nowhere/", "Text source nowhere/ is unknown"),
        ("folder", "folder cannot be read: Is a directory"),
        ("a.csv", "a.csv ends in .csv, so its format is unknown"),
        ("plain", "plain ends in no suffix, so its format is unknown"),
        ("latin.txt", "latin.txt is not UTF-8"),
        ("hub:", "does not read hub:NAME"),
        ("hub:a:b:c:d", "does not read hub:NAME"),
    ],
)
def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").touch()
    (tmp_path / "plain").touch()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(PlanishError, match=message):
        every(source)


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    chat = [[{"role": "user", "content": "hi"}]]
    assert every(write_parquet(tmp_path / "a.parquet", id=[1, 2], text=["one", "two"])) == ["one", "two"]
    assert every(write_parquet(tmp_path / "b.parquet", messages=chat)) == chat
    assert take(str(write_parquet(tmp_path / "c.parquet", text=["one"] * 1000)), "all", 30) == (["one"] * 10, False)


def test_bad_parquet(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match=r"a.parquet: no column text, messages, conversations; it has body"):
        every(write_parquet(tmp_path / "a.parquet", body=["one"]))
    with pytest.raises(PlanishError, match=r"b.parquet row 2: no value"):
        every(write_parquet(tmp_path / "b.parquet", text=["one", None]))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(PlanishError, match=r"c.parquet is not a sound Parquet file"):
        every(tmp_path / "c.parquet")
    (tmp_path / "d.parquet").touch()
    with pytest.raises(PlanishError, match=r"d.parquet is not a sound Parquet file"):
        every(tmp_path / "d.parquet")


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "a.parquet"), ("pyarrow.parquet", "a.parquet"), ("datasets", "hub:name")])
def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").touch()
    if module == "pyarrow.parquet":
        monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PlanishError, match=rf"{source} needs {module}, which is not installed. Run: pip install 'planish\[data\]'"):
        every(source)


class DatasetsError(Exception):
    pass


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: list[Any] | Exception) -> list[tuple[Any, ...]]:
    """Stands for `datasets`; returns the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[Any]:
        calls.append((name, config, split, streaming))
        if isinstance(answer, Exception):
            raise answer
        return answer

    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hub:org/name", ("org/name", None, "train", True)),
        ("hub:name:config", ("name", "config", "train", True)),
        ("hub:name:config:test", ("name", "config", "test", True)),
        ("hub:name::test", ("name", None, "test", True)),
    ],
)
def test_hub_names(monkeypatch: pytest.MonkeyPatch, source: str, call: tuple[Any, ...]) -> None:
    calls = fake_hub(monkeypatch, [{"text": "one"}, {"text": "two"}])
    assert every(source) == ["one", "two"]
    assert calls == [call]


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("no route"), DatasetsError("no route")])
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fake_hub(monkeypatch, error)
    with pytest.raises(PlanishError, match="hub:name cannot be had: no route"):
        every("hub:name")


def test_hub_rows_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, [{"text": "one"}, {"sentence": "two"}])
    with pytest.raises(PlanishError, match="hub:name row 2: no value"):
        every("hub:name")


def test_datasets_itself_reads_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")), encoding="utf-8")
    assert every(f"hub:{tmp_path}") == ["one", "two"]
    with pytest.raises(PlanishError, match="cannot be had"):
        every(f"hub:{tmp_path}::nosplit")
