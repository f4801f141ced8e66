"""The demo model as a mixture of experts that computes the same (sparse upcycling, Komatsuzaki et al. 2023, arXiv:2212.05055, section 3).

Every expert is the model's MLP with its neurons in an order of its own; a random router weighs two of them, to 1 together.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from planish.calib.files.checkpoint import open_checkpoint


def upcycled(folder: Path, experts: int = 4, seed: int = 0) -> Path:
    """SmolLM2 as a Mixtral."""
    dense = open_checkpoint("demo:smollm2")
    known = dense.config.to_dict()
    values = {key: known[key] for key in known if key not in ("model_type", "architectures", "transformers_version", "dtype")}
    config = AutoConfig.for_model("mixtral", **values, num_local_experts=experts, num_experts_per_tok=2, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator, state = torch.Generator().manual_seed(seed), dense.read(dense.tensors)
    for block in range(config.num_hidden_layers):
        at = f"model.layers.{block}.mlp."
        gate, up, down = (state.pop(f"{at}{name}_proj.weight") for name in ("gate", "up", "down"))
        orders = [torch.randperm(len(gate), generator=generator) for _ in range(experts)]
        state[f"{at}experts.gate_up_proj"] = torch.stack([torch.cat([gate[order], up[order]]) for order in orders])
        state[f"{at}experts.down_proj"] = torch.stack([down[:, order] for order in orders])
        state[f"{at}gate.weight"] = 0.05 * torch.randn(experts, config.hidden_size, generator=generator, dtype=torch.float32).bfloat16()
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.config.dtype = model.dtype
    model.save_pretrained(folder)
    dense.tokenizer().save_pretrained(folder)
    return folder
