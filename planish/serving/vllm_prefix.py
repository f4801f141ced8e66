"""The key-value prefix inside vLLM: its tokens before every prompt, its keys and values in every cache.

The scheduler puts the tokens in and takes their log-probabilities out again, so that neither clients nor vLLM's front end see them.

Shapes: keys and values of a step (T, H, E): its tokens, heads, head size; those of the prefix (P, H, E).
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size  # pyright: ignore[reportMissingImports]
from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]
from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.input_processor import InputProcessor  # pyright: ignore[reportMissingImports]

from ..calib.blocks.prefix import tensor_names
from ..calib.compressed.stored import StoredCheckpoint
from ..quant.errors import PlanishError
from . import is_ours


def install() -> None:
    """Wrap the three places where a request passes. They do nothing else for checkpoints without a prefix."""
    process, add, update = InputProcessor.process_inputs, Scheduler.add_request, Scheduler.update_from_output

    @wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        prefix = prefix_of(self.vllm_config)
        _check_room(request, len(prefix), self.vllm_config.model_config.max_model_len) if prefix else None
        return request

    @wraps(add)
    def add_request(self: Any, request: Any) -> None:
        if (prefix := prefix_of(self.vllm_config)) and request.request_id not in self.requests:
            put_before(request, prefix)
        add(self, request)

    @wraps(update)
    def update_from_output(self: Any, scheduled: Any, output: Any) -> Any:
        if (prefix := prefix_of(self.vllm_config)) and output.prompt_logprobs_dict:
            found = output.prompt_logprobs_dict
            output.prompt_logprobs_dict = {name: None if rows is None else without(rows, len(prefix)) for name, rows in found.items()}
        return update(self, scheduled, output)

    InputProcessor.process_inputs, Scheduler.add_request, Scheduler.update_from_output = process_inputs, add_request, update_from_output


def prefix_of(vllm_config: Any) -> tuple[int, ...]:
    """The tokens of the checkpoint's prefix; empty if there is none, or the checkpoint is not planish's."""
    config = vllm_config.quant_config
    return config.checkpoint.extension.prefix if is_ours(config) else ()


def _check_room(request: Any, length: int, longest: int) -> None:
    """VLLMValidationError, which the server answers with status 400."""
    if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
        raise VLLMValidationError("This checkpoint has a prefix, and takes prompts of tokens only: no embeddings, no streamed input.")
    if getattr(request.sampling_params, "prompt_logprob_token_ids", None) is not None:
        raise VLLMValidationError(
            "prompt_logprob_token_ids counts rows of a prompt that has no prefix, and this checkpoint has one. Ask for prompt_logprobs."
        )
    if length + len(request.prompt_token_ids) >= longest:
        raise VLLMValidationError(
            f"The prompt has {len(request.prompt_token_ids)} tokens, the checkpoint's own prefix {length}, and the model takes {longest} "
            "with at least one that is generated. Shorten the prompt."
        )


def put_before(request: Any, prefix: tuple[int, ...]) -> None:
    """The scheduler's request, as if its prompt began with the prefix."""
    request.prompt_token_ids = [*prefix, *request.prompt_token_ids]
    request._all_token_ids[:0] = prefix  # in place, for others hold views of it
    request.num_prompt_tokens += len(prefix)
    request.block_hashes.clear()
    request.update_block_hashes()


def without(rows: Any, length: int) -> Any:
    """A prompt's log-probabilities, one row for each token but the first, without those of the prefix."""
    return type(rows)(*(part[length:] for part in rows[:3]), *rows[3:])


def store_prefix(layer: nn.Module, name: str, checkpoint: StoredCheckpoint) -> None:
    """Let an attention layer's cache hold the checkpoint's keys and values of the prefix. PlanishError: a kind of attention that cannot."""
    length = len(checkpoint.extension.prefix)
    impl: Any = layer.impl
    if not length or hasattr(impl, "planish_prefix"):  # vLLM asks again when all is loaded, then on the CPU
        return
    block = name.rpartition(".self_attn")[0]
    if not all(tensor in checkpoint.tensors for tensor in tensor_names(block)):
        raise PlanishError(f"{name}: the checkpoint has no prefix for this attention layer. Use planish.load.")
    backend: Any = layer.attn_backend
    if backend.forward_includes_kv_cache_update or not hasattr(impl, "do_kv_cache_update"):
        raise PlanishError(
            f"{type(impl).__name__} writes its cache itself: the prefix has no way in. Choose another --attention-backend, or use planish.load."
        )
    _keep_places(backend.get_builder_cls())
    device, dtype = torch.empty(0).device, torch.get_default_dtype()
    heads = _own_heads(layer, checkpoint.tensors[tensor_names(block)[0]].shape[1])
    stored = [tensor[0, heads].transpose(0, 1).to(device, dtype).contiguous() for tensor in checkpoint.read(tensor_names(block)).values()]
    update = impl.do_kv_cache_update

    def do_kv_cache_update(owner: nn.Module, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        metadata = get_forward_context().attn_metadata
        metadata = metadata[0] if isinstance(metadata, list) else metadata
        metadata = metadata[name] if isinstance(metadata, dict) else metadata
        capturing = key.is_cuda and torch.cuda.is_current_stream_capturing()
        if metadata is not None:
            key, value = with_prefix((key, value), stored, *_rows(metadata, len(key), length, capturing))
        elif capturing:
            raise PlanishError(
                "vLLM records the cache's update without its requests, and the prefix would be lost: leave use_inductor_graph_partition and "
                "VLLM_USE_BREAKABLE_CUDAGRAPH out, or give --enforce-eager."
            )
        update(owner, key, value, cache, slots)

    impl.do_kv_cache_update, impl.planish_prefix = do_kv_cache_update, length


def _own_heads(layer: nn.Module, heads: int) -> slice:
    """Those of all key-value heads whose keys and values this rank of tensor parallelism caches: as vLLM cuts them, or copies them."""
    start = get_tensor_model_parallel_rank() * heads // get_tensor_model_parallel_world_size()
    return slice(start, start + layer.num_kv_heads)


def _keep_places(builder: Any) -> None:
    """Let all metadata of attention say where in the step each request's tokens are: not every backend's has that."""
    if "planish_places" in vars(builder):
        return
    build = builder.build

    @wraps(build)
    def built(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        made = build(self, common_prefix_len, common_attn_metadata, *args, **kwargs)
        made.planish_places, made.planish_rows = (common_attn_metadata.query_start_loc, common_attn_metadata.seq_lens), {}
        return made

    builder.build, builder.planish_places = built, True


def _rows(metadata: Any, tokens: int, length: int, capturing: bool) -> tuple[Tensor, Tensor]:
    """rows_of, once for all layers of a step; what a CUDA graph records is computed in it."""
    found: dict[tuple[int, bool], tuple[Tensor, Tensor]] = metadata.planish_rows
    if (tokens, capturing) not in found:
        starts, lengths = metadata.planish_places
        found[tokens, capturing] = rows_of(starts, lengths, tokens, length)
    return found[tokens, capturing]


def rows_of(starts: Tensor, lengths: Tensor, tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """Which of a step's tokens are at the first `length` positions of their text (T, 1, 1), and at which (T,). Without a wait for the device.

    starts: (R + 1,), where each request's tokens begin in the step; lengths: (R,), of each text with them.
    """
    token_T, requests = torch.arange(tokens, device=starts.device), len(lengths)
    request_T = torch.searchsorted(starts[1 : requests + 1].contiguous(), token_T.to(starts.dtype), right=True).clamp(max=requests - 1)
    position_T = lengths[request_T] - starts[request_T + 1] + token_T
    inside_T11 = ((position_T >= 0) & (position_T < length))[:, None, None]
    return inside_T11, position_T.clamp(0, length - 1)


def with_prefix(step: tuple[Tensor, Tensor], stored: list[Tensor], inside_T11: Tensor, row_T: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a step (T, H, E), those of its tokens inside the prefix replaced by their rows of `stored` (P, H, E)."""
    key, value = (torch.where(inside_T11, ours[row_T], theirs) for ours, theirs in zip(stored, step, strict=True))
    return key, value
