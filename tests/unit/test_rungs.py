"""The rungs that a running model can change to."""

from __future__ import annotations

from dataclasses import replace

from oomph.core.rungs import live_rungs, recomputed
from oomph.records import Choice

ASKED = Choice(8, 2, 16)


def test_only_what_is_recomputed_may_differ() -> None:
    others = [
        replace(ASKED, optimizer="adamw-foreach", checkpointing="blocks"),
        replace(ASKED, attention="flash", loss="chunked"),
        replace(ASKED, precision="float32", loss="chunked"),
        replace(ASKED, sharding="zero3", loss="chunked"),
    ]
    assert live_rungs(ASKED, others) == (ASKED,)


def test_each_recomputes_more_than_the_one_before() -> None:
    chunked, blocks = replace(ASKED, loss="chunked"), replace(ASKED, checkpointing="blocks")
    both = replace(blocks, loss="chunked")
    assert live_rungs(ASKED, [chunked, blocks, both]) == (ASKED, chunked, both)
    assert live_rungs(ASKED, [both, chunked, blocks]) == (ASKED, both)
    assert live_rungs(blocks, [ASKED, replace(ASKED, checkpointing="every-2"), both]) == (blocks, both)
    assert live_rungs(replace(ASKED, loss="full-shifted"), [ASKED]) == (replace(ASKED, loss="full-shifted"), ASKED)
    assert live_rungs(ASKED, [ASKED, ASKED]) == (ASKED,)


def test_the_cut_is_not_a_matter_of_rungs() -> None:
    smaller = replace(ASKED, micro_batch=1, accumulation=16, eval_batch=1, loss="chunked")
    assert live_rungs(ASKED, [replace(smaller, loss="full"), smaller]) == (ASKED, replace(ASKED, loss="chunked"))


def test_rungs_have_names() -> None:
    assert recomputed(ASKED) == "none, none, full"
    assert recomputed(replace(ASKED, vision_checkpointing="blocks", loss="chunked")) == "none, blocks, chunked"
