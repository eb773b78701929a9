"""What a stage says of experts, seen together: what it makes, what of it trains, and what keeps its load even."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from oomph.errors import UserError
from oomph.recipe.rules import parse_pattern
from oomph.recipe.schema import Stage


def problems(stage: Stage) -> Iterator[str]:
    """What cannot be meant, a sentence each, from the recipe alone."""
    experts, balance = stage.experts, stage.balance
    rates: dict[str, list[bool]] = {}
    for pattern, rate in stage.train.items():
        rates.setdefault(parse_pattern(pattern).part, []).append(rate != "frozen")
    if experts is not None:
        yield from _untrained(rates, stage.lora is not None)
        if experts.dispatch == "capacity" and balance is not None and (balance.kind != "micro-batch" or balance.z_loss):
            yield "dispatch capacity has DeepSpeed's balance, which is kind micro-batch without z_loss"
        if experts.top_k == 1 and any(rates.get("router", ())) and (balance is None or balance.kind == "bias"):
            yield "with top_k 1 the router learns from a balance loss alone, and the stage has none"
    elif balance is not None and "experts" not in rates:
        yield "balance is for experts, and the stage has none: it neither makes experts nor has a rule for the part `experts`"


def forgotten(stages: Sequence[Stage]) -> Iterator[tuple[str, str]]:
    """Stages that follow one that makes experts and do not say so, each with a sentence."""
    made = ""
    for stage in stages:
        if made and stage.experts is None:
            yield stage.name, f"stage {made} before it makes experts, so it needs the same section `experts` to go on"
        made = stage.name if stage.experts is not None else made


def _untrained(rates: dict[str, list[bool]], adapted: bool) -> Iterator[str]:
    """Experts and routers that the stage makes and does not train. Parts without a rule are for `rules.cover` to name."""
    if adapted:
        return
    if "experts" in rates and not any(rates["experts"]):
        yield (
            "the stage makes experts and leaves them frozen, so they would stay copies of the dense block; whatever the model, "
            "their part is named `experts`, as in `experts: 2e-5`, and that of their routers `router`"
        )
    if "router" in rates and not any(rates["router"]):
        yield "the stage makes routers, whose weights are new, and leaves the part `router` frozen"


def couples(stage: Stage) -> bool:
    """Whether what a sample adds to the gradient depends on those beside it in its micro-batch."""
    limited = stage.experts is not None and stage.experts.dispatch == "capacity"
    return limited or (stage.balance is not None and stage.balance.kind == "micro-batch" and stage.balance.coefficient > 0)


def check_dispatch(stages: Sequence[Stage]) -> None:
    """Whether stages that are to be trained send tokens to experts in a way that a step can be cut.

    Raises:
        UserError: with the problems of all stages.
    """
    planned = [stage.name for stage in stages if stage.experts is not None and stage.experts.dispatch != "dropless"]
    if planned:
        raise UserError(
            [
                f"stages.{name}.experts.dispatch capacity is planned and not trained: which tokens are dropped depends on the "
                "micro-batch, and memory grows with the square of its tokens"
                for name in planned
            ],
            "leave dispatch out, and every token goes to its experts",
        )
