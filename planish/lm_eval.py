"""Planish's checkpoints in lm-evaluation-harness's own program and API, as its model `planish`.

    python -m planish.lm_eval run --model planish --model_args pretrained=DIR --tasks arc_easy --batch_size 8

That library (0.4.13) finds no third party's models by itself, neither by entry points nor in --include_path: a model is known once its module has
been imported. This module is `lm_eval` with that one import; in scripts, `import planish.lm_eval` comes before
`lm_eval.simple_evaluate(model="planish", ...)`.
"""

import sys
from pathlib import Path

import torch

from .calib.compressed.stored import open_any
from .eval.tasks.harness import LoadedLM
from .evaluating.job import prefix_length
from .loading.model import load
from .quant.errors import PlanishError, nearest

from lm_eval.api.registry import register_model  # isort: skip

UNASKED = "cuda:0"  # what the program of lm-evaluation-harness says where no device was asked for, GPU or none; its own model `hf` takes the CPU then
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@register_model("planish")
class PlanishLM(LoadedLM):
    """A checkpoint that planish wrote, or any that `planish.load` takes.

    pretrained: the folder. dtype: auto (as stored), float32, bfloat16 or float16. device: default cuda where there is one. The others: as of `hf`.
    """

    def __init__(
        self,
        pretrained: str | Path,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise PlanishError(f"dtype {dtype} is unknown. {nearest(dtype, DTYPES)}")
        if device == UNASKED and not torch.cuda.is_available():
            device = None
        checkpoint = open_any(pretrained)
        super().__init__(
            load(pretrained, dtype=DTYPES[dtype], device=device, kernels="reference"),
            checkpoint.tokenizer(),
            prefix=prefix_length(checkpoint),
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
        )


def main() -> None:
    """`lm_eval`, which knows the model `planish`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except PlanishError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
