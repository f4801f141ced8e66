"""Peak resident memory of a compression against the checkpoint's size: a synthetic Llama in several shards, streams on disk.

python benchmarks/memory.py [--gigabytes 1.5]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, SHARDS = 1024, 2816, 16, 4, 32000, 6


def synthesize(folder: Path, gigabytes: float) -> int:
    """Write a random bfloat16 Llama of about that size, shard by shard; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    per_block = 2 * (HIDDEN * HIDDEN * 2 + 2 * HIDDEN * KV_HEADS * (HIDDEN // HEADS) + 3 * HIDDEN * INNER)
    layers = round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / per_block)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    total = sum(2 * shape.numel() for shape in shapes.values())
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        shard[name] = (torch.randn(shape, generator=generator) * (1 if "norm" in name else 0.02)).to(torch.bfloat16)
        full = sum(2 * tensor.numel() for tensor in shard.values()) > total / SHARDS
        if full or name == list(shapes)[-1]:
            file = f"model-{len(set(where.values())) + 1:05d}-of-{SHARDS:05d}.safetensors"
            save_file(shard, folder / file)
            where.update(dict.fromkeys(shard, file))
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return total


def main() -> None:
    """Make the model, compress it in a fresh process, report the ratio."""
    p = argparse.ArgumentParser()
    p.add_argument("--gigabytes", type=float, default=1.5)
    p.add_argument("--worker", type=Path)
    a = p.parse_args()
    if a.worker:
        import planish
        from planish.recipe.schema import with_settings

        recipe = with_settings(planish.load_recipe("w8a8"), ["calibration.samples=8", "calibration.length=256"])
        planish.compress(recipe, a.worker / "model", a.worker / "out", offload_dir=a.worker)
        status = Path("/proc/self/status").read_text()  # of this program alone; ru_maxrss still knows the process that started it
        print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        size = synthesize(folder / "model", a.gigabytes)
        done = subprocess.run([sys.executable, __file__, "--worker", str(folder)], stdout=subprocess.PIPE, text=True, check=True)
        peak = int(done.stdout.split()[-1])
        print(json.dumps({"checkpoint_gb": round(size / 1e9, 3), "peak_gb": round(peak / 1e9, 3), "ratio": round(peak / size, 3)}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
