"""What noise at a site's input costs: one backward pass through the model, a block in memory at a time, from the last to the first.

The loss is the log-likelihood of tokens drawn from the model's own predictions, whose expected curvature is the mean square of its gradient (Fisher's
information). Noise that is alike in all directions, with variance v in each channel of token t, costs v |g_t|^2 / 2, g_t the gradient with
respect to the site's input. Where one token is attended to by all others, as a sink is, most of a site's cost can be that token's.

Shape suffixes: L tokens of a sample, T = all tokens of a batch, D width, C channels of a site.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..blocks.experts import seeing_all
from ..blocks.sites import Site
from ..machine.precision import ordered_attention
from .runner import BlockRunner, Call, Head


@dataclass(frozen=True, slots=True, eq=False)
class Felt:
    """A site's inputs x_TC, in the runner's dtype, and the squares of their gradients |g_t|^2: (T,) float32."""

    x_TC: Tensor
    squares_T: Tensor


@dataclass(slots=True, eq=False)
class _Seen:
    """The tensors that a site's readers were given in the last run; those that share one are noted once."""

    given: list[Tensor] = field(default_factory=list)

    def note(self, x: Tensor) -> None:
        if not any(x is other for other in self.given):
            self.given.append(x)

    def felt(self, grads: Sequence[Tensor]) -> Felt:
        x = self.given[0].detach()
        total_TC = torch.stack([grad.float().reshape(-1, x.shape[-1]) for grad in grads]).sum(0)
        return Felt(x.reshape(-1, x.shape[-1]), total_TC.square().sum(-1))


def sensitivities(
    runner: BlockRunner, batches: Sequence[Tensor], sites: Sequence[Sequence[Site]], *, seed: int = 0
) -> Iterator[tuple[int, dict[str, Felt]]]:
    """What sites feel, the last block first, all batches together. batches: ids (B, L). sites: of each block. seed: of the tokens drawn.

    Holds what enters every block, in the runner's dtype, until that block's turn. Raises PlanishError for a model without a head.
    """
    calls: list[Call] = []
    entering: list[list[Tensor]] = [[] for _ in range(len(runner.blocks) + 1)]
    with torch.no_grad():
        for hidden, call in runner.start(list(batches)):
            calls.append(call)
            entering[0].append(hidden)
        for index in range(len(runner.blocks)):
            block = runner.load_block(index)
            entering[index + 1] = [call.run(block, index, hidden) for call, hidden in zip(calls, entering[index], strict=True)]
            runner.release_block(index)
    grads = _at_the_end(runner, entering.pop(), seed)
    for index in reversed(range(len(runner.blocks))):
        block = runner.load_block(index)
        found: list[dict[str, Felt]] = []
        with torch.enable_grad(), ordered_attention(runner.device), _watched(block, sites[index]) as seen:
            for batch, hidden in enumerate(entering.pop()):
                leaf = hidden.detach().requires_grad_()
                grads[batch], felt = _backward(calls[batch].run(block, index, leaf), grads[batch], leaf, seen)
                found.append(felt)
        runner.release_block(index)
        yield index, {site.name: _joined([felt[site.name] for felt in found]) for site in sites[index]}


def _at_the_end(runner: BlockRunner, outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The loss's gradients with respect to the last block's outputs."""
    generator = torch.Generator().manual_seed(seed)
    grads: list[Tensor] = []
    with torch.enable_grad(), runner.head() as head:
        for hidden in outputs:
            grads.append(torch.stack([_of_the_loss(head, sample_LD.detach().requires_grad_(), generator) for sample_LD in hidden]))
    return grads


def _of_the_loss(head: Head, sample_LD: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, (L, D), of - log p(y) summed over positions, y drawn from p."""
    total_LD = torch.zeros_like(sample_LD)
    for logits in head.logits(sample_LD):
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        total_LD += torch.autograd.grad(loss, sample_LD)[0]
    return total_LD


def _backward(out: Tensor, grad: Tensor, hidden: Tensor, seen: Mapping[str, _Seen]) -> tuple[Tensor, dict[str, Felt]]:
    """The gradient with respect to hidden, and what the sites feel."""
    wanted = [hidden, *(x for site in seen.values() for x in site.given)]
    found = iter(torch.autograd.grad(out, wanted, grad))
    before = next(found)
    felt = {name: site.felt([next(found) for _ in site.given]) for name, site in seen.items()}
    for site in seen.values():
        site.given.clear()
    return before, felt


def _joined(parts: Sequence[Felt]) -> Felt:
    return Felt(torch.cat([part.x_TC for part in parts]), torch.cat([part.squares_T for part in parts]))


@contextmanager
def _watched(block: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, _Seen]]:
    """While the `with` lasts, each run of the block leaves there what its sites' readers were given."""
    seen = {site.name: _Seen() for site in sites}

    def note(into: _Seen) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: into.note(inputs[0])

    handles = [block.get_submodule(path).register_forward_pre_hook(note(seen[site.name])) for site in sites for path in site.readers]
    try:
        with seeing_all(block):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
