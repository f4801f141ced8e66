"""Massive activations along the depth: where they are born, what they are worth, where they die.

Sun, Chen, Kolter and Liu, "Massive Activations in Large Language Models", COLM 2024, section 2: a value is massive if it is above a floor and above
1000 times the median of its layer. Section 4: those of one channel have about the same value in every text. Nothing is kept of the hidden
states but each layer's largest values and the first positions' means.

Shape suffixes: N samples, B samples of a batch, L positions, D width, P first positions, E entries beyond large_ratio, K places watched.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .diagnosis import LayerMagnitudes, MassiveActivation, Thresholds

FIRST = 8  # positions whose means are kept from the embeddings on
FIXED = 4  # at more positions of its own than this, a channel is large anywhere
ENTRIES = 256  # largest values of one sample in one layer that are looked at
PLACES = 64  # tokens at which a value of varying position is watched
LISTED = 40  # entries of a report that are not massive, at most
USUAL = 0.25  # share of the samples in which an entry is massive, or large, at least
_MEDIAN_VALUES = 1 << 16

Key = tuple[int, int | None]
"""Channel, and position if it is always at that one."""


@dataclass(frozen=True, slots=True)
class Birth:
    """A massive activation in the first layer that has it. value: its mean over the samples that do."""

    channel: int
    position: int | None
    value: float


@dataclass(slots=True)
class _Sighting:
    """One key in one layer. samples, massive: in how many samples it is large, and massive. token, position: if several entries all have the same."""

    value: float
    largest: float
    spread: float
    ratio: float
    samples: int
    massive: int
    entries: int
    token: int | None
    position: int | None


@dataclass(slots=True)
class _Life:
    """What was seen of one key: by layer, and its mean value by layer since the first sighting. places: (sample, position) pairs."""

    places: list[tuple[int, int]]
    sightings: dict[int, _Sighting] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Entry:
    sample: int
    position: int
    channel: int
    value: float


class Magnitudes:
    """The bookkeeping of one walk. ids_NL: the tokens, None where a model has none (images)."""

    def __init__(self, thresholds: Thresholds, samples: int, ids_NL: Tensor | None = None) -> None:
        self.thresholds, self.samples, self.ids_NL = thresholds, samples, ids_NL
        self.layers: list[LayerMagnitudes] = []
        self._first_PD: list[Tensor] = []
        self._lives: dict[Key, _Life] = {}

    @torch.no_grad()
    def add(self, layer: int, hidden: Iterable[Tensor]) -> tuple[Birth, ...]:
        """Take in the hidden states (B, L, D) of every batch after one layer; call for -1 (the embeddings), 0, 1, ... `hidden` is gone through twice.

        Returns what is massive in this layer, in USUAL of the samples, and was not in any before.
        """
        tops, medians, peaks, first_PD = [], [], [], None
        for hidden_BLD in hidden:
            for h_LD in hidden_BLD:
                top, median, peak = _sample(h_LD)
                tops.append(top)
                medians.append(median)
                peaks.append(peak)
            summed_PD = hidden_BLD[:, :FIRST].sum(0, dtype=torch.float32).cpu()
            first_PD = summed_PD if first_PD is None else first_PD + summed_PD
        assert first_PD is not None
        self._first_PD.append(first_PD / self.samples)
        median = sum(medians) / len(medians)
        entries = self._second_look(layer, hidden, median)
        mean_3 = torch.tensor(tops).mean(0).tolist()
        massive = [entry for entry in entries if self._is_massive(entry.value, median)]
        record = LayerMagnitudes(
            layer=layer,
            top=(mean_3[0], mean_3[1], mean_3[2]),
            median=median,
            massive=len(massive),
            large=len(entries),
            residual_peak=sum(peaks) / len(peaks),
        )
        self.layers.append(record)
        return self._sight(layer, entries, median)

    def _is_massive(self, value: float, median: float) -> bool:
        return abs(value) > self.thresholds.massive_floor and abs(value) >= self.thresholds.massive_ratio * median

    def _usual(self, sighting: _Sighting) -> bool:
        return sighting.massive >= USUAL * self.samples

    def _second_look(self, layer: int, hidden: Iterable[Tensor], median: float) -> list[_Entry]:
        """The values beyond large_ratio, and the mean values of what is watched."""
        entries: list[_Entry] = []
        watched = [(sample, position, number) for number, life in enumerate(self._lives.values()) for sample, position in life.places]
        seen: dict[int, list[float]] = defaultdict(list)
        channels = [channel for channel, _ in self._lives]
        done = 0
        for hidden_BLD in hidden:
            for sample, h_LD in enumerate(hidden_BLD, done):
                entries += self._beyond(h_LD, sample, median)
            here = [(sample - done, position, number) for sample, position, number in watched if done <= sample < done + len(hidden_BLD)]
            if here:
                rows, columns, numbers = (list(part) for part in zip(*here, strict=True))
                values = hidden_BLD[rows, columns, [channels[number] for number in numbers]].float().tolist()
                for number, value in zip(numbers, values, strict=True):
                    seen[number].append(value)
            done += len(hidden_BLD)
        for number, life in enumerate(self._lives.values()):
            life.values[layer] = sum(seen[number]) / len(seen[number])
        return entries

    def _beyond(self, h_LD: Tensor, sample: int, median: float) -> list[_Entry]:
        """The largest entries of one sample beyond large_ratio; none where the median is 0, for then there is nothing to compare with."""
        bar = self.thresholds.large_ratio * median
        low, high = h_LD.aminmax()
        if not bar or max(-float(low), float(high)) <= bar:
            return []
        flat = h_LD.flatten()
        size = flat.abs()
        where = (size > bar).nonzero()[:, 0]
        if len(where) > ENTRIES:
            where = where[size[where].topk(ENTRIES).indices]
        width = h_LD.shape[1]
        values = flat[where].float().tolist()
        return [_Entry(sample, at // width, at % width, value) for at, value in zip(where.tolist(), values, strict=True)]

    def _sight(self, layer: int, entries: Sequence[_Entry], median: float) -> tuple[Birth, ...]:
        """Sort the entries by key, and note what is new."""
        births: list[Birth] = []
        for key, group in self._grouped(entries).items():
            sighting = self._sighting(group, median)
            life = self._lives.get(key)
            if life is None:
                life = self._lives[key] = _Life([])
            if self._usual(sighting) and not any(map(self._usual, life.sightings.values())):
                mean = [entry.value for entry in group if self._is_massive(entry.value, median)]
                births.append(Birth(key[0], key[1], sum(mean) / len(mean)))
            life.sightings[layer] = sighting
            if key[1] is None:
                life.places = [(entry.sample, entry.position) for entry in group[:PLACES]]
                life.values[layer] = sighting.value
            elif not life.places:
                life.places = [(sample, key[1]) for sample in range(self.samples)]
                life.values[layer] = sum(entry.value for entry in group) / len(group)
        return tuple(births)

    def _grouped(self, entries: Sequence[_Entry]) -> dict[Key, list[_Entry]]:
        """Entries by channel and position, where most samples have one there, else by channel."""
        counts: dict[tuple[int, int], int] = defaultdict(int)
        for entry in entries:
            counts[entry.channel, entry.position] += 1
        usual: dict[int, set[int]] = defaultdict(set)
        for (channel, position), count in counts.items():
            if 2 * count > self.samples:
                usual[channel].add(position)
        groups: dict[Key, list[_Entry]] = defaultdict(list)
        for entry in entries:
            own: Key = (entry.channel, entry.position)
            fixed = own in self._lives or (entry.position in usual[entry.channel] and len(usual[entry.channel]) <= FIXED)
            groups[own if fixed else (entry.channel, None)].append(entry)
        return dict(groups)

    def _sighting(self, group: Sequence[_Entry], median: float) -> _Sighting:
        values = torch.tensor([entry.value for entry in group], dtype=torch.float64)
        value = values.mean().item()
        ids = set[int | None]() if self.ids_NL is None else {int(self.ids_NL[entry.sample, entry.position]) for entry in group}
        return _Sighting(
            value=value,
            largest=max((entry.value for entry in group), key=abs),
            spread=values.std(correction=0).item() / abs(value) if value else float("inf"),
            ratio=values.abs().mean().item() / median,
            samples=len({entry.sample for entry in group}),
            massive=len({entry.sample for entry in group if self._is_massive(entry.value, median)}),
            entries=len(group),
            token=ids.pop() if len(ids) == 1 else None,
            position=group[0].position if len(group) > 1 and len({entry.position for entry in group}) == 1 else None,
        )

    def activations(self, text: Callable[[int], str]) -> tuple[MassiveActivation, ...]:
        """What was found, largest ratio first: everything massive, and the LISTED largest of the rest. text: of a token id."""
        found = sorted((self._summary(key, life, text) for key, life in self._lives.items()), key=lambda one: -one.ratio)
        large = [one for one in found if not one.massive and one.share >= USUAL][:LISTED]
        return tuple([one for one in found if one.massive] + large)

    def _summary(self, key: Key, life: _Life, text: Callable[[int], str]) -> MassiveActivation:
        """It lives in the layers in which at least half as many samples have it as in any layer."""
        massive = any(map(self._usual, life.sightings.values()))
        counts = {layer: sighting.massive if massive else sighting.samples for layer, sighting in life.sightings.items()}
        lived = [layer for layer, count in counts.items() if 2 * count >= max(counts.values())]
        layer = max(lived, key=lambda at: life.sightings[at].ratio)
        best = life.sightings[layer]
        return MassiveActivation(
            layer=layer,
            position=best.position if key[1] is None else key[1],
            token=None if best.token is None else text(best.token),
            channel=key[0],
            value=best.value,
            largest=best.largest,
            ratio=best.ratio,
            spread=best.spread,
            constant=best.entries > 1 and best.spread < self.thresholds.constant_spread,
            share=counts[layer] / self.samples,
            born=lived[0],
            died=None if lived[-1] == self.layers[-1].layer else lived[-1] + 1,
            massive=massive,
            by_layer=tuple(self._value(key, life, number, record.layer) for number, record in enumerate(self.layers)),
        )

    def _value(self, key: Key, life: _Life, number: int, layer: int) -> float:
        """The mean after a layer; before anything was watched, that of the first positions, and 0 for others."""
        channel, position = key
        if layer in life.values:
            return life.values[layer]
        return self._first_PD[number][position, channel].item() if position is not None and position < FIRST else 0.0


def _sample(h_LD: Tensor) -> tuple[list[float], float, float]:
    """One sample: its three largest |h|, the median of |h|, and the first token's norm over the median token's."""
    size_LD = h_LD.abs()
    top = size_LD.flatten().topk(3).values.float().tolist()
    median = size_LD[:: -(-size_LD.numel() // _MEDIAN_VALUES)].float().median().item()
    norm_L = torch.linalg.vector_norm(h_LD.float(), dim=1)
    middle = norm_L.median().item()
    return top, median, norm_L[0].item() / middle if middle else 1.0
