"""How a step is spread over ranks: decided by every rank by itself, from the costs of all of the step's samples.

Samples go to ranks so that all take about as long, and each rank's samples are cut as a step of its own would be. All ranks
have the costs of all samples and what was learnt from all failures, so all come to the same without talking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oomph.core.admission import Cost, Split, TooLargeError


def spread(split: Callable[[Sequence[Cost]], Split], costs: Sequence[Cost], ranks: int) -> tuple[Split, ...]:
    """The splits of all ranks, in positions of the step's samples.

    The sample that takes longest by itself goes first, each to the rank that has least to do then (Graham's rule: no rank has
    more than 4/3 of what it had at best, as far as the times of single samples add up). A rank may get nothing.

    Args:
        split: cuts the samples of one rank; deterministic.
        costs: of the samples of the step.
        ranks: how many there are.

    Raises:
        TooLargeError: a sample does not fit by itself; its position is that in the step.
    """
    if ranks == 1:
        return (split(costs),)
    seconds = _seconds(split, costs)
    loads, shares = [(0.0, rank) for rank in range(ranks)], [list[int]() for _ in range(ranks)]
    for position in sorted(range(len(costs)), key=lambda at: (-seconds[at], at)):
        load, rank = min(loads)
        loads[rank] = load + seconds[position], rank
        shares[rank].append(position)
    return tuple(_of_one(split, costs, sorted(share)) for share in shares)


def joined(splits: Sequence[Split]) -> Split:
    """The micro-batches of all ranks, rank by rank, as one split; its seconds are those of the slowest."""
    if len(splits) == 1:
        return splits[0]
    return Split(
        tuple(piece for split in splits for piece in split.micro_batches),
        tuple(shape for split in splits for shape in split.shapes),
        tuple(peak for split in splits for peak in split.peak_bytes),
        max(split.seconds for split in splits),
    )


def _seconds(split: Callable[[Sequence[Cost]], Split], costs: Sequence[Cost]) -> list[float]:
    """Estimated for each sample alone; samples of one size are asked for once."""
    known: dict[tuple[int, int], float] = {}
    for position, cost in enumerate(costs):
        if (cost.tokens, cost.images) not in known:
            known[cost.tokens, cost.images] = _of_one(split, costs, [position]).seconds
    return [known[cost.tokens, cost.images] for cost in costs]


def _of_one(split: Callable[[Sequence[Cost]], Split], costs: Sequence[Cost], share: Sequence[int]) -> Split:
    """The split of one rank's share."""
    try:
        found = split([costs[position] for position in share])
    except TooLargeError as error:
        raise TooLargeError(share[error.position], error.peak_bytes, error.limit_bytes) from None
    return found._replace(micro_batches=tuple(tuple(share[at] for at in piece) for piece in found.micro_batches))
