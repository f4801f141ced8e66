"""Stock transformers loads the checkpoint and computes what planish does.

Not bit for bit with quantized activations: compressed-tensors divides a token's maximum by 127.5 where servers and planish divide by 127, and last
bits decide codes anyway. So the divergence is held against the one that planish has from itself when its last bits are disturbed. Measured in
float32, nats per token: a model of 30 blocks, w8a8 0.0061 against 0.0042, w4a8 0.045 against 0.033, weight-only 0 against 2e-9; random models of
3 blocks, where nothing grows and the divisor is what remains, 7e-4 against 0.
"""

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import CompressedTensorsConfig

from ...calib.blocks.families import is_mixture
from ...calib.compressed.packing import OWN, PLAIN, has_experts, is_own, other_grid
from ...calib.compressed.stored import StoredCheckpoint
from ...calib.files.checkpoint import auto_class
from ...calib.files.shards import read_json
from ...calib.walk.runner import HEAD_TOKENS, BlockRunner
from ..scores.check import Check, Figure, listed, not_done
from ..scores.score import Divergence, Report, arithmetic, final_hidden, last_bits

NAME = "transformers"
LONGEST, MOST = 512, 2  # tokens of a window, and windows: the whole model computes them, with all logits in memory
TIMES = 3.0  # as far apart as rounding takes two evaluations, this many times
LEAST_WEIGHTS, LEAST_ACTIVATIONS = 1e-5, 2e-3  # nats per token that pass in any case: without and with quantized activations or experts
MEMORY_SHARE = 0.7  # of the free memory, what the whole model may take
_REFUSALS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError)


def check_stock(checkpoint: StoredCheckpoint, ids_NL: Tensor, report: Report | None = None) -> Check:
    """KL(planish || transformers) per token in float32 on the CPU, with the whole model in memory."""
    quantization: dict[str, Any] = dict(read_json(checkpoint.path / "config.json")["quantization_config"])  # type: ignore[call-overload]
    own = is_own(quantization) or has_experts(quantization)
    reason = _why_not(checkpoint, own)
    if reason is not None:
        return not_done(NAME, reason)
    if own:
        return _refused(checkpoint)
    ids = ids_NL[:MOST, :LONGEST]
    with arithmetic(torch.float32):
        try:
            logits, faults = _stock_logits(checkpoint, ids)
        except _REFUSALS as error:
            return Check(NAME, False, f"transformers does not run the checkpoint: {type(error).__name__}: {error}", {})
        if faults:
            return Check(NAME, False, f"transformers does not load the whole checkpoint: {listed(faults)}", {})
        found, rounding = _divergences(checkpoint, ids, logits, report)
    limit = TIMES * rounding + _least(checkpoint)
    figures: dict[str, Figure] = {
        "kl": found.mean_kl,
        "agreement": found.agreement,
        "kl_of_rounding": rounding,
        "tolerance": limit,
        "tokens": found.tokens,
    }
    message = (
        f"KL from planish's own evaluation {found.mean_kl:.2g} nats per token, of which rounding explains {limit:.2g}; "
        f"same top token {found.agreement:.1%}"
    )
    return Check(NAME, found.mean_kl <= limit, message, figures)


def _refused(checkpoint: StoredCheckpoint) -> Check:
    """Transformers by itself knows nothing of the checkpoint's transforms and prefix, or of a mixture's layers, so it must not load it."""
    try:
        with by_itself():
            _stock_logits(checkpoint, torch.zeros(0, 1, dtype=torch.long))
    except _REFUSALS as error:
        return Check(NAME, True, f"refuses the checkpoint, as it must where planish is not imported: {type(error).__name__}", {})
    return Check(NAME, False, "transformers loads the checkpoint without planish, but knows nothing of what planish writes: it would run wrong", {})


def wide(model: nn.Module, _: object) -> None:
    """To be called before a model's forward, behind the hook that unpacks weights: those of NVFP4 become bfloat16, whatever dtype was asked for."""
    for parameter in model.parameters():
        if parameter.dtype is torch.bfloat16:
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Transformers as it is where planish is not imported."""
    known: tuple[dict[str, Any], ...] = (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
    before = [dict(mapping) for mapping in known]
    for mapping in known:
        mapping.pop(OWN, None)
    AUTO_QUANTIZATION_CONFIG_MAPPING[PLAIN] = CompressedTensorsConfig
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it says about the checkpoint is for those who wanted to load it
    try:
        yield
    finally:
        logger.setLevel(level)
        for mapping, entries in zip(known, before, strict=True):
            mapping.update(entries)


def _why_not(checkpoint: StoredCheckpoint, own: bool) -> str | None:
    """Why stock transformers cannot be asked, None if it can."""
    if not own and any(other_grid(how.scheme.activations) for how in checkpoint.packed.values()):
        return "symmetric dynamic activations of fewer than 8 bits have another grid in transformers, which computes something else"
    skeleton = checkpoint.skeleton(torch.float32)
    plain = [name for name in checkpoint.packed if not isinstance(skeleton.get_submodule(name), nn.Linear)]
    if plain and not own:
        kind = type(skeleton.get_submodule(plain[0])).__name__
        return f"transformers runs quantized nn.Linear layers only, and this model has {kind} layers ({plain[0]})"
    needed = 4 * sum(parameter.numel() for parameter in skeleton.parameters())
    free = psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        return f"the whole model in float32 takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
    return None


def _least(checkpoint: StoredCheckpoint) -> float:
    activations = any(how.scheme.activations is not None for how in checkpoint.packed.values())
    rounded = is_mixture(checkpoint.config)  # it makes ordinary weights of experts' codes, in the scales' dtype
    return LEAST_ACTIVATIONS if activations or rounded else LEAST_WEIGHTS


def _stock_logits(checkpoint: StoredCheckpoint, ids_NL: Tensor) -> tuple[list[Tensor], list[str]]:
    """The logits (L, V) of each window, and the names of tensors that did not find their place."""
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that nobody asked for
        loaded: Any = auto_class(checkpoint.config).from_pretrained(
            str(checkpoint.path), dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
        model, info = loaded
        model.register_forward_pre_hook(wide)
        faults = [f"{name} ({key})" for key in ("missing_keys", "mismatched_keys", "unexpected_keys") for name in info[key]]
        return [model(ids_L[None], use_cache=False).logits[0] for ids_L in ids_NL], faults


def _divergences(checkpoint: StoredCheckpoint, ids_NL: Tensor, logits: list[Tensor], report: Report | None) -> tuple[Divergence, float]:
    """From the given logits; and, unless that is next to nothing, the mean KL from planish with its last bits disturbed."""
    runner = BlockRunner(checkpoint, torch.float32, torch.device("cpu"))
    (own_NLD,) = final_hidden(runner, [ids_NL], report)
    with runner.head() as head:
        found = _divergence((head.logits(own_LD), torch.split(logits_LV, HEAD_TOKENS)) for own_LD, logits_LV in zip(own_NLD, logits, strict=True))
    if found.mean_kl <= _least(checkpoint):
        return found, 0.0
    (disturbed_NLD,) = final_hidden(runner, [ids_NL], report, last_bits)
    with runner.head() as head:
        rounding = _divergence((head.logits(own_LD), head.logits(other_LD)) for own_LD, other_LD in zip(own_NLD, disturbed_NLD, strict=True))
    return found, rounding.mean_kl


def _divergence(windows: Iterable[tuple[Iterable[Tensor], Iterable[Tensor]]]) -> Divergence:
    """Over all windows, each given as two sequences of pieces of logits (t, V)."""
    divergence = Divergence()
    for one, other in windows:
        for p_tV, q_tV in zip(one, other, strict=True):
            divergence.add(p_tV, q_tV)
    return divergence
