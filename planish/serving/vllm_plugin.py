"""vLLM's entry point (group vllm.general_plugins): vLLM serves the checkpoints that planish alone runs.

Their quantized linears run as planish.load runs them, transforms and side paths included. A key-value prefix: the tokens it is made of stand before
every prompt, unseen by clients, and where vLLM caches their keys and values, the checkpoint's are stored instead. So positions, masks, paging and
vLLM's own prefix caching are right by themselves, and a request pays for the prefix as for that many tokens, once.

Besides, vLLM's CPU build serves NVFP4, in vLLM's own arithmetic.
"""

from . import METHOD


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once."""
    from vllm.model_executor.layers import quantization  # type: ignore[import-not-found, unused-ignore]  # pyright: ignore[reportMissingImports]

    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    from . import vllm_prefix
    from .vllm_config import PlanishConfig

    quantization.register_quantization_config(METHOD)(PlanishConfig)
    vllm_prefix.install()
    _emulate_nvfp4()


def _emulate_nvfp4() -> None:
    """On a CPU vLLM has no kernel for NVFP4, but arithmetic that says what its kernels compute: slow, and enough to verify a checkpoint by."""
    from vllm.model_executor.kernels.linear import (  # type: ignore[import-not-found, unused-ignore]  # pyright: ignore[reportMissingImports]
        EmulationNvFp4LinearKernel,
        register_linear_kernel,
    )
    from vllm.platforms import PlatformEnum  # type: ignore[import-not-found, unused-ignore]  # pyright: ignore[reportMissingImports]

    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
