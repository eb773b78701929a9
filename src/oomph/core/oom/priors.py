"""How plausible numbers of samples and lengths are before anything is known: estimates, for ranking alone."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

VISION_TOKENS = 576
"""Tokens of an image of CLIP ViT-L/14 at 336 pixels, which LLaVA puts in place of one token."""

_BATCHES = {
    1: 30.0,
    2: 16.0,
    3: 2.0,
    4: 16.0,
    5: 1.0,
    6: 2.0,
    7: 0.3,
    8: 12.0,
    9: 0.3,
    10: 1.5,
    12: 2.0,
    14: 0.2,
    16: 8.0,
    20: 0.8,
    24: 1.0,
    28: 0.2,
    32: 4.0,
    40: 0.3,
    48: 0.5,
    64: 2.0,
    96: 0.2,
    100: 0.3,
    128: 0.8,
    256: 0.3,
    512: 0.1,
}
_LENGTHS = {
    128: 1.5,
    256: 2.5,
    384: 0.8,
    512: 7.0,
    768: 1.0,
    1024: 7.0,
    1280: 0.4,
    1536: 1.0,
    2048: 11.0,
    2560: 0.4,
    3072: 0.8,
    4096: 9.0,
    5120: 0.3,
    6144: 0.5,
    8192: 5.0,
    10000: 0.2,
    10240: 0.2,
    12288: 0.3,
    16384: 2.0,
    20480: 0.2,
    24576: 0.2,
    32768: 2.0,
    65536: 0.5,
    131072: 0.5,
    262144: 0.1,
    1500: 0.2,
    1600: 0.2,
    2000: 0.4,
    4000: 0.2,
    577: 0.3,
    576: 0.2,
    1025: 0.3,
    257: 0.3,
}
_SPECIAL, _SMOOTH = 0.6, 0.4
_SHORTEST, _LONGEST = 32, 262_144
_SPAN = math.log(_LONGEST / _SHORTEST)
_GIVEN = 0.7


class Priors:
    """Plausibilities of micro-batches and lengths, given what the text says of them."""

    def __init__(self, batches: Sequence[int] = (), lengths: Sequence[int] = ()) -> None:
        self.batches = _normalised(_BATCHES)
        if batches:
            given = {batch: _GIVEN / len(batches) for batch in batches}
            self.batches = {n: p * (1 - _GIVEN) for n, p in self.batches.items()}
            self.batches = {n: self.batches.get(n, 0.0) + given.get(n, 0.0) for n in {*self.batches, *given}}
        special = dict(_LENGTHS)
        for length, weight in tuple(_LENGTHS.items()):
            if 512 <= length <= 8192 and length & (length - 1) == 0:
                for images, share in ((1, 0.35), (2, 0.05), (4, 0.01)) if length <= 4096 else ((1, 0.03),):
                    with_images = length + images * (VISION_TOKENS - 1)
                    special[with_images] = special.get(with_images, 0.0) + share * weight
                special[length + VISION_TOKENS] = special.get(length + VISION_TOKENS, 0.0) + 0.05 * weight
        special = _normalised(special)
        self.given = frozenset(lengths)
        if lengths:
            told = {}
            for length in lengths:
                told[length] = 6.0
                told[length + VISION_TOKENS - 1] = 3.0
                told[length + 2 * (VISION_TOKENS - 1)] = 0.5
            told = _normalised(told)
            special = {n: (1 - _GIVEN) * special.get(n, 0.0) + _GIVEN * told.get(n, 0.0) for n in {*special, *told}}
        self._special = special
        self._sorted = sorted(special)

    def length(self, tokens: int) -> float:
        """The plausibility of a length."""
        if not _SHORTEST <= tokens <= _LONGEST:
            return 0.0
        smooth = _SMOOTH / (tokens * _SPAN)
        smooth *= 3.0 if tokens % 64 == 0 else 1.5 if tokens % 8 == 0 else 0.8
        return smooth + _SPECIAL * self._special.get(tokens, 0.0)

    def lengths(self, first: int, last: int) -> tuple[float, int]:
        """The plausibility of all lengths from the first to the last, and the most plausible of them."""
        first, last = max(first, _SHORTEST), min(last, _LONGEST)
        if first > last:
            return 0.0, 0
        if first == last:
            return self.length(first), first
        total = _SMOOTH * math.log((last + 0.5) / (first - 0.5)) / _SPAN
        inside = self._sorted[bisect_left(self._sorted, first) : bisect_right(self._sorted, last)]
        if inside:
            total += _SPECIAL * sum(self._special[tokens] for tokens in inside)
            return total, max(inside, key=lambda tokens: self._special[tokens])
        for step in (64, 8):
            if last // step * step >= first:
                return total, last // step * step
        return total, (first + last) // 2

    def is_special(self, tokens: int) -> bool:
        """Whether a length is one that people choose, or that images make of one."""
        return tokens in self._special


def length_in_words(tokens: int, given: frozenset[int] = frozenset()) -> str:
    """What makes a length plausible; empty where nothing does."""
    for images in (1, 2, 4):
        text = tokens - images * (VISION_TOKENS - 1)
        if text >= 512 and (text & (text - 1) == 0 or text in given):
            what = f"{images} image's" if images == 1 else f"{images} images'"
            return (
                f"{tokens:,} = {text:,} - {images} + {images * VISION_TOKENS:,}: {what} {VISION_TOKENS} tokens each "
                f"in place of {'its placeholder' if images == 1 else 'their placeholders'}, in a text of {text:,}"
            ).replace(" tokens each in place of its", " tokens in place of its")
    if tokens in given:
        return f"{tokens:,} is a length that the text gives"
    if tokens >= 128 and tokens & (tokens - 1) == 0:
        return f"{tokens:,} is a power of two, as limits on lengths are"
    return ""


def _normalised(weights: dict[int, float]) -> dict[int, float]:
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}
