"""Two small tasks of lm-evaluation-harness, in files."""

import json
from pathlib import Path

WORDS = ("assert", "expression", "statement", "module", "class", "function", "value", "name", "else", "import")
CHOICE = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
"""
MEAN = "metric_list:\n  - metric: {metric}\n    aggregation: mean\n    higher_is_better: true\n"


def task_folder(folder: Path, documents: int = 12) -> Path:
    """A folder with tiny_choice (three choices; acc and acc_norm) and tiny_word (one continuation; perplexity and acc)."""
    folder.mkdir()
    rows = [
        {"text": " ".join(WORDS[(i + j) % 10] for j in range(2 + i % 7)), "choices": [WORDS[(i + k) % 10] for k in (1, 4, 7)], "gold": i % 3}
        for i in range(documents)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = {"data": data, "cache": folder / "cache"}
    means = MEAN.format(metric="acc")
    choice = 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: gold\ndoc_to_choice: "{{choices}}"\n'
    more = MEAN.format(metric="acc_norm").removeprefix("metric_list:\n")
    (folder / "choice.yaml").write_text(CHOICE.format(name="tiny_choice", **head) + choice + means + more)
    word = 'output_type: loglikelihood\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{\' \'+choices[0]}}"\n'
    first = "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
    (folder / "word.yaml").write_text(CHOICE.format(name="tiny_word", **head) + word + first + means.removeprefix("metric_list:\n"))
    return folder
