"""A mixture of experts as linear layers: what transformers computes with one tensor of all experts, by a layer for each.

Calibration sees a layer's inputs and puts another in its place, so it needs layers; and files have them (mlp.experts.3.gate_proj.weight).

Shape suffixes: T tokens, D width of the stream, K experts a token is sent to, E experts, I inner channels of one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import is_mixture


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)). x: (T, D)."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D)."""
        y_TD: Tensor = self.down_proj(self.act_fn(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return y_TD


@dataclass(slots=True, eq=False)
class Routes:
    """Where the first run of a block sent its tokens. error: how far the routers' logits of later runs were off, relative, at most."""

    sent: tuple[Tensor, Tensor] | None = None
    logits: Tensor | None = None
    error: float = 0.0

    def note(self, _router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        """A run of the router."""
        if self.logits is None:
            self.logits = output[0]
        self.error = max(self.error, float((output[0] - self.logits).norm() / self.logits.norm()))


class Experts(nn.ModuleList):
    """All experts of a block, each by its number. all_tokens: see `seeing_all`. routes: see `routed_alike`."""

    all_tokens = False
    routes: Routes | None = None

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The experts' outputs, weighed by what the router says: (T, D). index_TK, weight_TK: the experts of each token, and how they count."""
        if self.routes is not None:
            index_TK, weight_TK = self.routes.sent = self.routes.sent or (index_TK, weight_TK)
        return self._all(x_TD, index_TK, weight_TK) if self.all_tokens else self._routed(x_TD, index_TK, weight_TK)

    def _routed(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        for number in index_TK.flatten().bincount().nonzero().flatten().tolist():
            rows, slots = torch.where(index_TK == number)
            y_TD = self[number](x_TD[rows]) * weight_TK[rows, slots, None]
            out_TD.index_add_(0, rows, y_TD.to(out_TD.dtype))
        return out_TD

    def _all(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        weight_TE = weight_TK.new_zeros(len(x_TD), len(self)).scatter_(1, index_TK, weight_TK)
        out_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self):
            out_TD += (expert(x_TD) * weight_TE[:, number, None]).to(out_TD.dtype)
        return out_TD


def separate(model: PreTrainedModel) -> None:
    """Let layers of their own stand where a model of a known family has one tensor of all experts; weights are views of it. In place.

    Others are left alone: their experts may compute something else.
    """
    if not is_mixture(model.config):
        return
    for path, module in list(model.named_modules()):
        both_EID, down_EDI, act = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj", "act_fn"))
        if isinstance(both_EID, nn.Parameter) and isinstance(down_EDI, nn.Parameter) and isinstance(act, nn.Module) and both_EID.dim() == 3:
            experts = Experts(_expert(both_ID, down_DI, act) for both_ID, down_DI in zip(both_EID, down_EDI, strict=True))
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, experts)


@contextmanager
def seeing_all(block: nn.Module) -> Iterator[None]:
    """While the `with` lasts, every expert of the block is given every token, also those that the router sends elsewhere: they count nothing in the
    block's output, and a layer that few tokens reach is calibrated on all. The sites of the block run in their order whatever the router says."""
    found = [module for module in block.modules() if isinstance(module, Experts) and not module.all_tokens]
    for experts in found:
        experts.all_tokens = True
    try:
        yield
    finally:
        for experts in found:
            experts.all_tokens = False


@contextmanager
def routed_alike(block: nn.Module, routes: Routes) -> Iterator[None]:
    """While the `with` lasts, runs of the block send tokens where the first run with these routes did: where two experts are nearly tied, rounding
    alone decides between them, and says nothing of whether two blocks compute the same."""
    found = [module for module in block.modules() if isinstance(module, Experts)]
    handles = [module.register_forward_hook(routes.note) for module in block.modules() if found and routes_tokens(module)]
    for experts in found:
        experts.routes = routes
    try:
        yield
    finally:
        for experts in found:
            experts.routes = None
        for handle in handles:
            handle.remove()


def routes_tokens(module: nn.Module) -> bool:
    """Whether it is a router of transformers: it has the matrix (experts, channels) itself, and its output begins with the logits."""
    return hasattr(module, "top_k") and isinstance(getattr(module, "weight", None), nn.Parameter)


def _expert(gate_up_ID: Tensor, down_DI: Tensor, act: nn.Module) -> Expert:
    gate_ID, up_ID = gate_up_ID.chunk(2)
    return Expert(_linear(gate_ID), _linear(up_ID), _linear(down_DI), act)


def _linear(weight_OI: Tensor) -> nn.Linear:
    out_features, in_features = weight_OI.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
    return linear
