"""Is a compressed checkpoint on disk what it says, does it compute what was measured, and what did it cost?

Checks, in this order: files, structure, values, probe, transformers, against, server. One that cannot be done says why.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...calib.compressed.layout import declared, read_layout
from ...calib.compressed.stored import StoredCheckpoint, open_stored
from ...calib.data.windows import tokens
from ...calib.files.checkpoint import Checkpoint, open_checkpoint
from ...calib.machine.device import pick_device
from ...quant.errors import PlanishError
from ..scores.check import Check, Figure, Verification, not_done
from ..scores.score import Report, compare
from .origin import check_files, check_made_from, origin_note
from .probe import PROBE_FILE, check_probe, read_probe
from .server import check_server, server_python
from .stock import check_stock
from .structure import check_structure, check_values

ON_DISK = ("structure", "values")
BEHAVIOUR = ("probe", "transformers", "against", "server")

Stages = Callable[[str, int, int], None]
"""stages(name, done, total): so many steps of the stage of that name are done."""


def verify(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    text: str = "builtin",
    windows: int = 4,
    length: int = 2048,
    server: str | None = None,
    server_env: str | Path | None = None,
    stock: bool = True,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    report: Stages | None = None,
) -> Verification:
    """Check the compressed checkpoint in `folder`.

    against: the original model, as `planish compress` takes it, to measure perplexity before and after and the divergence. text: builtin (its half
    for evaluation), or a source as of calib.data.tokens; windows and length: at most so much of it. server: "vllm", in the environment server_env
    or PLANISH_VLLM_ENV. stock: whether transformers is asked too, which loads the whole model. device: None: a GPU where there is one.
    A checkpoint that planish did not write has no digests and no probe; the rest is checked. Raises PlanishError for arguments that cannot be used,
    among them a folder without a compressed-tensors checkpoint and an original of another build; what is wrong with the checkpoint is in the result.
    """
    folder, device = Path(folder), pick_device(device)
    declared(folder)
    python = None if server is None else server_python(server, server_env)
    base = None if against is None else open_checkpoint(against, allow_pickle=allow_pickle)
    checks = list(_on_disk(folder))
    broken = [check.name for check in checks if check.name in ON_DISK and not check.ok]
    if broken:
        checks += [not_done(name, f"{' and '.join(broken)} must be right first") for name in BEHAVIOUR]
        return Verification(folder, tuple(checks))
    checkpoint = open_stored(folder)
    if base is not None:
        check_made_from(base, checkpoint)
    ids_NL = evaluation_windows(checkpoint, text, windows, length) if stock or base or python else None
    checks.append(_probe(checkpoint, device, _of("probe", report)))
    if not stock or ids_NL is None:
        checks.append(not_done("transformers", "not asked for"))
    else:
        checks.append(check_stock(checkpoint, ids_NL, _of("transformers", report)))
    if base is None or ids_NL is None:
        checks.append(not_done("against", "no original model was given"))
    else:
        checks.append(check_against(base, checkpoint, ids_NL, device, _of("against", report)))
    if python is None or ids_NL is None:
        checks.append(not_done("server", "no server was asked for"))
    else:
        checks.append(check_server(checkpoint, ids_NL, python, device=device, report=_of("server", report)))
    return Verification(folder, tuple(checks))


def _of(stage: str, report: Stages | None) -> Report | None:
    return None if report is None else lambda done, total: report(stage, done, total)


def _on_disk(folder: Path) -> tuple[Check, Check, Check]:
    files = check_files(folder)
    try:
        layout = read_layout(folder)
    except PlanishError as error:
        return files, Check("structure", False, str(error), {}), not_done("values", "the checkpoint cannot be read")
    return files, check_structure(layout), check_values(layout)


def evaluation_windows(checkpoint: Checkpoint, text: str, windows: int, length: int) -> Tensor:
    """The first windows of a text: (N, L) with N and L at most as given, fewer where the text is short, shorter where the model is.

    Raises PlanishError when the text holds not one window.
    """
    for name, value, least in (("windows", windows, 1), ("length", length, 2)):
        if value < least:
            raise PlanishError(f"{name} is {value}, but must be at least {least}.")
    length = min(length, getattr(checkpoint.config.get_text_config(), "max_position_embeddings", length))
    tokenizer = checkpoint.tokenizer()
    try:
        return tokens(text, tokenizer, samples=windows, length=length, part="evaluation")
    except PlanishError:  # the text is short, so all of it is not much; if it is bad, this says so again
        return tokens(text, tokenizer, samples=None, length=length, part="evaluation")


def _probe(checkpoint: StoredCheckpoint, device: torch.device | str, report: Report | None) -> Check:
    probe = read_probe(checkpoint.path)
    if probe is None:
        return not_done("probe", f"no {PROBE_FILE}: not written by planish, or from a recipe without calibration")
    found = check_probe(checkpoint, probe, device=device, report=report)
    figures = found.to_dict()
    where = f"{found.tokens} tokens in {figures['dtype']}"
    if found.identical:
        return Check("probe", True, f"reloaded, bit-identical to the model in memory on {where}", figures)
    message = (
        f"reloaded, log-probabilities differ from the model in memory by {found.found.logprob_mean:.2g} in the mean and "
        f"{found.found.logprob_max:.2g} at most on {where}; rounding explains up to {found.tolerance.mean:.2g} and {found.tolerance.highest:.2g}"
    )
    return Check("probe", found.ok, message, figures)


def check_against(base: Checkpoint, checkpoint: StoredCheckpoint, ids_NL: Tensor, device: torch.device | str, report: Report | None) -> Check:
    """What the compression cost, in float32: perplexity before and after, and divergence. Says if the base is not the manifest's model."""
    found = compare(base, checkpoint, ids_NL, device=device, progress=report)
    note = origin_note(base, checkpoint)
    before, after = found.base.perplexity, found.quantized.perplexity
    figures: dict[str, Figure] = {
        "perplexity_base": before,
        "perplexity": after,
        "kl": found.kl,
        "agreement": found.agreement,
        "windows": ids_NL.shape[0],
        "length": ids_NL.shape[1],
        "tokens": found.base.tokens,
        "note": note,
    }
    message = (
        f"perplexity {before:.2f} before, {after:.2f} after; KL {found.kl:.4f} nats per token; same top token {found.agreement:.1%}; "
        f"{ids_NL.shape[0]} windows of {ids_NL.shape[1]} tokens"
    )
    message += "" if note is None else f". Note: {note}"
    return Check("against", after < float("inf") and found.kl < float("inf"), message, figures)
