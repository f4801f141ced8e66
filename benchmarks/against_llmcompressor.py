"""The same compression by planish and by llm-compressor, side by side: seconds, peak memory, perplexity.

    python benchmarks/against_llmcompressor.py --peer-python PEER/bin/python --text CALIBRATION.txt --evaluation TEST.txt

Every measurement is a process of its own. planish's seconds are its whole compress call (checks, walk, writing, reloading); llm-compressor's are its
oneshot call alone, without loading and saving (llmcompressor_job.py). Peak memory is the process's resident maximum when the compression ends.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_W4A8, _W4A16 = ("w4a8", "w4a8-rotated"), ("w4a16", "w4a16-awq", "w4a16-rotated")
JOBS = {  # llmcompressor_job.py's at the same bits
    "w8a8": ("w8a8",),
    "w4a4-fast": ("w4a4",),
    "w4a4-best": ("w4a4",),
    "w4a8": _W4A8,
    "w4a8-portable": _W4A8,
    "w4a16-g128": _W4A16,
    "w4a16-best": _W4A16,
}


def worker(a: argparse.Namespace) -> dict[str, object]:
    """Compress and evaluate with planish in this process."""
    from transformers import AutoTokenizer

    import planish
    import planish.compressing.compression  # imports are no part of what is timed, for neither tool
    from planish.calib.compressed.stored import open_stored
    from planish.calib.data.windows import windows
    from planish.eval.scores.score import score
    from planish.recipe.schema import with_settings

    settings = [f"calibration.source={a.text}", "calibration.seed=null", f"calibration.samples={a.samples}", f"calibration.length={a.length}", *a.set]
    recipe = with_settings(planish.load_recipe(a.recipe), settings)
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.monotonic()
        planish.compress(recipe, a.model, folder / "out")
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        import torch

        tokenizer = AutoTokenizer.from_pretrained(a.model)
        ids = torch.tensor(tokenizer(Path(a.evaluation).read_text(), verbose=False).input_ids)
        value = score(open_stored(folder / "out"), windows(ids, 2048)[: a.windows]).perplexity
    finally:
        shutil.rmtree(folder)
    return {"tool": f"planish {a.recipe}", "perplexity": round(value, 4), "seconds": round(seconds, 1), "peak_gb": round(peak, 2)}


def child(command: list[str]) -> dict[str, object]:
    """Run a process and take the JSON line that it prints last."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Measure every tool `--repeat` times in turn and print the medians and ratios."""
    p = argparse.ArgumentParser()
    p.add_argument("--model", default="demo:smollm2")
    p.add_argument("--recipe", default="w8a8", choices=JOBS)
    p.add_argument("--set", action="append", default=[], help="a recipe setting, path=value")
    p.add_argument("--text", required=True)
    p.add_argument("--evaluation", required=True)
    p.add_argument("--samples", type=int, default=32)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--windows", type=int, default=4)
    p.add_argument("--repeat", type=int, default=1)
    p.add_argument("--peer-python", help="the interpreter of llm-compressor's environment; without it planish alone is measured")
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"], help="of llm-compressor's model")
    p.add_argument("--worker", action="store_true")
    a = p.parse_args()
    if a.worker:
        print(json.dumps(worker(a)))
        return
    from planish.calib.files.locate import resolve

    folder = str(resolve(a.model))
    sizes = ["--samples", str(a.samples), "--length", str(a.length), "--windows", str(a.windows)]
    own = [sys.executable, __file__, "--worker", "--model", folder, "--recipe", a.recipe, "--text", a.text, "--evaluation", a.evaluation, *sizes]
    own += [part for setting in a.set for part in ("--set", setting)]
    commands = {"planish": own}
    if a.peer_python:
        script = str(Path(__file__).with_name("llmcompressor_job.py"))
        texts = ["--calibration", a.text, "--evaluation", a.evaluation]
        peer = [a.peer_python, "-I", script, "--model", folder, *texts, *sizes]
        commands |= {f"llm-compressor {job}, {dtype}": [*peer, "--job", job, "--dtype", dtype] for dtype in a.dtypes for job in JOBS[a.recipe]}
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in commands}
    for _ in range(a.repeat):
        for name, command in commands.items():
            runs[name].append(child(command))
    middle = {name: sorted(found, key=lambda run: float(str(run["seconds"])))[len(found) // 2] for name, found in runs.items()}
    print("\n| tool | seconds | peak GB | perplexity |\n|---|---|---|---|")
    for name, run in middle.items():
        print(f"| {name} | {run['seconds']} | {run['peak_gb']} | {run['perplexity']} |")
    peers = [run for name, run in middle.items() if name != "planish"]
    if peers:
        fastest = min(peers, key=lambda run: float(str(run["seconds"])))
        for key in ("seconds", "peak_gb"):
            print(f"{key}: {float(str(middle['planish'][key])) / float(str(fastest[key])):.2f} of the faster llm-compressor run")


if __name__ == "__main__":
    main()
