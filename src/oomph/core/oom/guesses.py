"""Every tensor of a known model family whose size is that of a request, with its plausibility.

The size leaves an interval of bytes. For each kind of tensor, family, element type and number of samples, it is solved for the
lengths that lie in it. A plausibility is the product of those of the parts, which are estimates: they rank, and are no
frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from oomph.core.oom.clues import Clues
from oomph.core.oom.families import Family, families
from oomph.core.oom.priors import Priors

FLOAT32, HALF, BOOL, NF4 = "float32", "bfloat16 or float16", "bool", "4 bits (nf4)"
_KIND_WEIGHTS = {
    "scores": 0.20,
    "logits": 0.18,
    "mlp": 0.11,
    "hidden": 0.04,
    "weight": 0.20,
    "expert weights": 0.03,
    "flat": 0.06,
    "bucket": 0.04,
    "dispatch": 0.015,
    "mask": 0.02,
    "vision scores": 0.025,
}
_BYTES = {FLOAT32: 4.0, HALF: 2.0, BOOL: 1.0, NF4: 0.5}
_WORLDS = {1: 0.22, 2: 0.2, 3: 0.02, 4: 0.2, 5: 0.01, 6: 0.03, 7: 0.01, 8: 0.2, 16: 0.06, 24: 0.01, 32: 0.03, 64: 0.01}
_VISION_TOKENS = {
    577: 0.3,
    576: 0.05,
    257: 0.1,
    256: 0.04,
    197: 0.06,
    729: 0.15,
    730: 0.01,
    1025: 0.12,
    1024: 0.05,
    1370: 0.02,
    4096: 0.05,
}
_CAPACITIES = {(2, 3.0): 0.35, (2, 2.0): 0.25, (2, 4.0): 0.1, (2, 2.5): 0.1, (1, 1.0): 0.08, (1, 1.25): 0.07, (1, 1.5): 0.05}
_EXPERTS = {4: 0.4, 8: 0.3, 2: 0.05, 16: 0.1, 32: 0.05, 64: 0.1}
_SUB_GROUP = 1_000_000_000
_BUCKETS = {
    500_000_000: (0.4, "DeepSpeed's default bucket of 5e8 elements"),
    200_000_000: (0.25, "a DeepSpeed bucket of 2e8 elements, as in many examples"),
    _SUB_GROUP: (0.3, "a sub-group of ZeRO-3 (`sub_group_size` 1e9)"),
}
_HEAD = "embedding or output head"
_GIVEN = 0.75
_STRANGE_YEAR = 0.02
_NAMED, _BUILT = 300.0, 2000.0


class Guess(NamedTuple):
    """A tensor of the right size.

    Attributes:
        kind: of `clues.KINDS`.
        what: in words.
        symbols: what the dimensions are.
        shape: their values.
        dtype: of an element.
        weight: its plausibility.
        families: those that have it.
        lengths: the shortest and the longest length of the same size; none where it has no length.
        reason: a sentence about its kind.
    """

    kind: str
    what: str
    symbols: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    weight: float
    families: tuple[str, ...]
    lengths: tuple[int, int] | None = None
    reason: str = ""

    @property
    def bytes(self) -> int:
        """Of the tensor."""
        return int(math.prod(self.shape) * _BYTES[self.dtype])


class Size(NamedTuple):
    """The bytes that a request can have had."""

    low: int
    high: int

    def of(self, unit: float) -> tuple[int, int]:
        """The whole numbers of a unit of bytes that lie in it: the first and the last; the first is greater if none does."""
        return math.ceil(self.low / unit), math.floor(self.high / unit)


def guesses(size: Size, clues: Clues, extra: Mapping[str, float] | None = None) -> list[Guess]:
    """All guesses for a size, in no order, the same tensor of several families once.

    Args:
        size: the interval.
        clues: what else the text says.
        extra: further factors by kind.
    """
    priors = Priors(clues.batches, clues.lengths)
    known = _weighted(clues)
    merged: dict[tuple[str, tuple[int, ...], str], Guess] = {}
    for kind, find in _FINDERS.items():
        factor = _KIND_WEIGHTS[kind] * clues.factors.get(kind, 1.0) * (extra or {}).get(kind, 1.0)
        for guess in find(size, known, priors, clues):
            key = (guess.what, guess.shape, guess.dtype)
            weight = guess.weight * factor
            before = merged.get(key)
            if before is None:
                merged[key] = guess._replace(weight=weight)
            else:
                names = tuple(dict.fromkeys(before.families + guess.families))
                merged[key] = before._replace(weight=before.weight + weight, families=names)
    return list(merged.values())


def unknown_weight(size: Size) -> float:
    """The plausibility that the request was for something that no family has: alike for every order of magnitude."""
    return 0.02 * math.log((size.high + 512) / size.low) / math.log(2**15)


class _Known(NamedTuple):
    """The families with their weights, those of language models and those of image encoders, each summing to one."""

    language: tuple[tuple[Family, float], ...]
    vision: tuple[tuple[Family, float], ...]


def _weighted(clues: Clues) -> _Known:
    def weights(chosen: Sequence[Family]) -> tuple[tuple[Family, float], ...]:
        raw = []
        for family in chosen:
            weight = family.weight * (_NAMED if family.name in clues.named else 1.0)
            weight *= _BUILT if family.name in clues.built else 1.0
            raw.append(weight * (_STRANGE_YEAR if clues.latest and family.released > clues.latest else 1.0))
        total = sum(raw) or 1.0
        return tuple((family, weight / total) for family, weight in zip(chosen, raw, strict=True))

    everything = families()
    return _Known(weights([f for f in everything if not f.vision]), weights([f for f in everything if f.vision]))


class _Width(NamedTuple):
    """A dimension's value, and the families that have it: (plausibility, longest sequence, name), the most plausible first."""

    value: int
    having: tuple[tuple[float, int, str], ...]

    def at(self, tokens: int) -> tuple[float, tuple[str, ...]]:
        """The plausibility of the families whose sequences can be so long, and their names."""
        fit = [(share, name) for share, longest, name in self.having if longest >= tokens]
        return sum(share for share, _ in fit), tuple(name for _, name in fit)


def _widths(values: Sequence[tuple[Family, float]], field: str) -> list[_Width]:
    """The values of a dimension."""
    found: dict[int, list[tuple[float, int, str]]] = {}
    for family, weight in values:
        value = int(getattr(family, field))
        if value:
            found.setdefault(value, []).append((weight, family.longest, family.name))
    return [_Width(value, tuple(sorted(having, reverse=True))) for value, having in found.items()]


def _sum(samples: int, tokens: int) -> float:
    """How plausible so many samples of so many tokens are together: beyond 32768 tokens in all, the less the more there are."""
    return min(1.0, 32_768 / (samples * tokens))


def _scores(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    reason = "eager attention writes out every head's scores, and its softmax in float32 as often as not"
    for width in _widths(known.language, "heads"):
        heads = width.value
        for dtype, plausible in ((FLOAT32, 0.6), (HALF, 0.4)):
            for samples, batch in priors.batches.items():
                first, last = _roots(size, samples * heads * _BYTES[dtype])
                weight, tokens = priors.lengths(first, last)
                share, names = width.at(tokens) if weight else (0.0, ())
                if share:
                    shape = (samples, heads, tokens, tokens)
                    symbols = ("samples", "heads", "tokens", "tokens")
                    total = share * plausible * batch * weight * _sum(samples, tokens)
                    yield Guess("scores", "attention scores", symbols, shape, dtype, total, names, (first, last), reason)


def _mask(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    for dtype, plausible in ((FLOAT32, 0.35), (HALF, 0.35), (BOOL, 0.3)):
        for samples, batch in priors.batches.items():
            first, last = _roots(size, samples * _BYTES[dtype])
            weight, tokens = priors.lengths(first, last)
            if weight:
                shape = (samples, 1, tokens, tokens)
                symbols = ("samples", "1", "tokens", "tokens")
                total = plausible * batch * weight * _sum(samples, tokens)
                yield Guess("mask", "attention mask", symbols, shape, dtype, total, (), (first, last), "one for all heads")


def _vision_scores(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    symbols = ("images", "heads", "patches", "patches")
    for width in _widths(known.vision, "heads"):
        heads, (share, names) = width.value, width.at(0)
        for dtype, plausible in ((FLOAT32, 0.5), (HALF, 0.5)):
            for patches, weight in _VISION_TOKENS.items():
                first, last = size.of(heads * patches * patches * _BYTES[dtype])
                for images in range(first, min(last, first + 3, 4096) + 1) if first >= 1 else ():
                    total = share * plausible * weight * 0.7 * (0.5 * priors.batches.get(images, 0.0) + 0.05 / images)
                    shape = (images, heads, patches, patches)
                    yield Guess("vision scores", "attention scores of the vision tower", symbols, shape, dtype, total, names)
            first, last = _roots(size, heads * _BYTES[dtype])
            weight, patches = priors.lengths(first, last)
            if weight and last >= 2048:
                shape = (1, heads, patches, patches)
                total = share * plausible * 0.2 * weight
                what = "attention scores of the vision tower"
                yield Guess("vision scores", what, symbols, shape, dtype, total, names, (first, last))


class _Row(NamedTuple):
    """A tensor of samples, tokens and a width, its plausibility, and the lengths that have the same size."""

    shape: tuple[int, int, int]
    dtype: str
    weight: float
    families: tuple[str, ...]
    lengths: tuple[int, int]


def _rows(size: Size, widths: Sequence[_Width], types: Sequence[tuple[str, float]], priors: Priors) -> Iterator[_Row]:
    for width in widths:
        for dtype, plausible in types:
            for samples, batch in priors.batches.items():
                first, last = size.of(samples * width.value * _BYTES[dtype])
                if first > last:
                    continue
                weight, tokens = priors.lengths(first, last)
                share, names = width.at(tokens) if weight else (0.0, ())
                if share:
                    total = share * plausible * batch * weight * _sum(samples, tokens)
                    yield _Row((samples, tokens, width.value), dtype, total, names, (first, last))


def _logits(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    widths = _widths(known.language, "vocabulary")
    reason = "the loss takes the logits of every token, in float32 in most libraries"
    types = ((FLOAT32, 0.6), (HALF, 0.4))
    for row in _rows(size, widths, types, priors):
        symbols = ("samples", "tokens", "vocabulary")
        yield Guess("logits", "logits", symbols, row.shape, row.dtype, 0.85 * row.weight, row.families, row.lengths, reason)
    for width in widths:
        for dtype, plausible in types:
            for samples, batch in priors.batches.items():
                first, last = size.of(samples * width.value * _BYTES[dtype])
                weight, tokens = priors.lengths(first + 1, last + 1) if first <= last else (0.0, 0)
                share, names = width.at(tokens) if weight and priors.is_special(tokens) else (0.0, ())
                if share:
                    shape = (samples, tokens - 1, width.value)
                    total = 0.15 * share * plausible * batch * priors.length(tokens) * _sum(samples, tokens)
                    symbols = ("samples", "tokens - 1", "vocabulary")
                    yield Guess("logits", "logits without the last token", symbols, shape, dtype, total, names, None, reason)


def _mlp(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    widths = _widths([pair for pair in known.language if not pair[0].experts], "intermediate")
    symbols = ("samples", "tokens", "width of the MLP")
    for row in _rows(size, widths, ((HALF, 0.8), (FLOAT32, 0.2)), priors):
        yield Guess("mlp", "MLP activation", symbols, row.shape, row.dtype, row.weight, row.families, row.lengths)


def _hidden(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    symbols = ("samples", "tokens", "width")
    for row in _rows(size, _widths(known.language, "hidden"), ((HALF, 0.65), (FLOAT32, 0.35)), priors):
        yield Guess("hidden", "hidden states", symbols, row.shape, row.dtype, row.weight, row.families, row.lengths)


def _weights(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    reason = "a weight, its gradient and each of its optimizer states have this size"
    for family, share in known.language:
        attention = ((family.hidden, family.hidden), "attention weight", 0.12)
        fused = ((3 * family.hidden, family.hidden), "fused weight of queries, keys and values", 0.06)
        parts = [((family.vocabulary, family.hidden), _HEAD, 0.4), attention, fused]
        parts += [((family.vocabulary + 1, family.hidden), _HEAD, 0.05)]  # a padding token was added
        parts.append(((family.intermediate, family.hidden), "MLP weight", 0.3))
        if not family.experts:
            if family.gated:
                parts.append(((2 * family.intermediate, family.hidden), "fused MLP weight", 0.05))
        for shape, what, plausible in parts:
            for dtype, type_share in ((FLOAT32, 0.45), (HALF, 0.5), (NF4, 0.05)):
                if size.low <= math.prod(shape) * _BYTES[dtype] <= size.high and not (dtype == NF4 and what == _HEAD):
                    symbols = ("vocabulary", "width") if what == _HEAD else ("outputs", "inputs")
                    total = share * plausible * type_share
                    yield Guess("weight", what, symbols, shape, dtype, total, (family.name,), None, reason)


def _expert_weights(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    reason = "transformers 5 holds the weights of all experts of a layer in one tensor"
    for family, share in [(family, share) for family, share in known.language if family.experts]:
        for factor, what in ((2, "gate and up weights of all experts"), (1, "down weights of all experts")):
            shape = (family.experts, factor * family.intermediate, family.hidden)
            for dtype, plausible in ((HALF, 0.6), (FLOAT32, 0.4)):
                if size.low <= math.prod(shape) * _BYTES[dtype] <= size.high:
                    symbols = ("experts", "outputs", "inputs")
                    weight = 3 * share * plausible
                    yield Guess("expert weights", what, symbols, shape, dtype, weight, (family.name,), None, reason)


def _flat(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    worlds = dict(_WORLDS)
    if clues.gpus:
        worlds = {n: (1 - _GIVEN) * share for n, share in worlds.items()}
        for n in clues.gpus:
            worlds[n] = worlds.get(n, 0.0) + _GIVEN / len(clues.gpus)
    for family, share in known.language:
        for gpus, plausible in worlds.items():
            elements = -(-family.parameters // gpus)
            for dtype, type_share in ((FLOAT32, 0.65), (HALF, 0.35)):
                if elements and size.low <= elements * _BYTES[dtype] <= size.high:
                    what = "all parameters in one tensor" + (f", shared by {gpus} GPUs" if gpus > 1 else "")
                    symbols = ("parameters" if gpus == 1 else "parameters / GPUs",)
                    weight = share * plausible * type_share
                    reason = "DeepSpeed and FSDP keep weights, gradients and optimizer states flat"
                    yield Guess("flat", what, symbols, (elements,), dtype, weight, (family.name,), None, reason)


def _buckets(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    for elements, (share, what) in _BUCKETS.items():
        for dtype, plausible in ((HALF, 0.5), (FLOAT32, 0.5)):
            exact = int(elements * _BYTES[dtype])
            if size.low <= exact <= size.high:
                reason = "its size is a setting of DeepSpeed's and no tensor of the model's"
                yield Guess("bucket", what, ("elements",), (elements,), dtype, share * plausible, (), None, reason)
            elif elements == _SUB_GROUP and exact < size.low < exact * 1.06:
                held = int(size.high / _BYTES[dtype])
                weight = share * plausible * 0.5 * min(1.0, (size.high - size.low + 4_000_000) / (0.06 * exact))
                reason = "parameters are put into a sub-group until it has at least so many elements"
                yield Guess("bucket", what, ("elements",), (held,), dtype, weight, (), None, reason)


def _dispatch(size: Size, known: _Known, priors: Priors, clues: Clues) -> Iterator[Guess]:
    symbols = ("tokens", "experts", "capacity")
    reason = "DeepSpeed's gating writes out which token goes to which place of which expert: it grows with the tokens squared"
    for (_, factor), capacity_share in _CAPACITIES.items():
        for experts, experts_share in _EXPERTS.items():
            first, last = _roots(size, 4 * factor)
            for tokens in range(max(64, first - experts), min(last, 400_000) + 1):
                capacity = math.ceil(factor * tokens / experts)
                if not size.low <= 4 * tokens * experts * capacity <= size.high:
                    continue
                weight = sum(
                    share * priors.length(tokens // samples)
                    for samples, share in priors.batches.items()
                    if tokens % samples == 0
                )
                total = weight * capacity_share * experts_share
                if total > 1e-9:
                    shape = (tokens, experts, capacity)
                    yield Guess("dispatch", "expert dispatch", symbols, shape, FLOAT32, total, (), None, reason)


def _roots(size: Size, unit: float) -> tuple[int, int]:
    """The whole numbers whose squares times a unit of bytes lie in the size."""
    first, last = size.of(unit)
    root = math.isqrt(max(0, first - 1)) + 1 if first > 0 else 1
    return root, math.isqrt(max(0, last))


_FINDERS = {
    "scores": _scores,
    "logits": _logits,
    "mlp": _mlp,
    "hidden": _hidden,
    "weight": _weights,
    "expert weights": _expert_weights,
    "flat": _flat,
    "bucket": _buckets,
    "dispatch": _dispatch,
    "mask": _mask,
    "vision scores": _vision_scores,
}
