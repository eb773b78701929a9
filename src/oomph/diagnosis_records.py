"""What `oomph explain` finds in the text of a failure: the messages, what was asked for, why it failed, and what helps.

All of it can be had from the text alone. What needs a recipe (`event`, `alive`, `why_now`, the predicted numbers of a
cure) is empty or None without one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oomph.record import SCHEMA, Document, Record
from oomph.records import Choice, FailingRequest

Reporter = Literal[
    "cuda allocator",
    "cuda runtime",
    "cublas",
    "cudnn",
    "nccl",
    "hip allocator",
    "hip runtime",
    "xpu allocator",
    "mps",
    "cpu allocator",
    "linux oom killer",
]
FailedPhase = Literal[
    "load", "forward", "recompute", "backward", "optimizer", "checkpoint saving", "evaluation", "communication", ""
]
Certainty = Literal["certain", "likely", "possible", "unlikely"]
CauseName = Literal[
    "real need",
    "huge request",
    "fragmentation",
    "other process",
    "outside the allocator",
    "limit",
    "host memory",
    "device memory",
    "allocator gave up",
]


@dataclass(frozen=True)
class Frame(Record):
    """A line of the traceback, the outermost first. `line` is 0 and `code` empty where the text lacks them."""

    file: str
    line: int
    function: str
    code: str = ""


@dataclass(frozen=True)
class OtherProcess(Record):
    """Another process on the same card. `pid` is None where the text does not give it."""

    pid: int | None
    bytes: int


@dataclass(frozen=True)
class OomMessage(Record):
    """One report that memory ran out, as its reporter wrote it.

    Sizes are those nearest to the printed text, None where it does not give them. The size that was asked for lies from
    `requested_low` to `requested_high`, both included: the printed number is rounded, and the ends are what prints so.

    Attributes:
        kind: who reports it.
        text: the message itself, on one line, without what stood around it.
        line: the line of the text in which it begins, from 1.
        rank: the rank whose message it is, by a prefix as ``[rank3]:``.
        gpu: the number of the device, as the process that ran out counts.
        requested_bytes: what was asked for.
        capacity_bytes: the card's memory; of the host's allocators and of cgroups, the limit.
        free_bytes: what the driver had left.
        process_bytes: what the process holds in all, with what is not the allocator's.
        allocated_bytes: what tensors held.
        unallocated_bytes: what the allocator held and no tensor.
        reserved_bytes: what the allocator held in all.
        limit_bytes: what the process was allowed by a fraction or a watermark.
        private_pool_bytes: the part of `allocated_bytes` in the pools of CUDA graphs.
        other_bytes: what is not the allocator's, where the message gives it (MPS).
        others: other processes on the card.
        torch: the versions of PyTorch that word it so, as ``2.2 to 2.8``; empty where nothing says it.
        hints: the advice at the end of the message, in our words: ``max_split_size_mb``, ``expandable_segments``.
        truncated: whether its end is missing.
        frames: the traceback that belongs to it.
        module: the last frame of a model's code, as ``modeling_phi.py, line 384, forward``; empty where there is none.
        phase: when it happened; empty where nothing says it.
        phase_why: how that is known.
        process: the name of the process that was killed (Linux).
        repeats: how many messages of the text say the same, this one included.
    """

    kind: Reporter
    text: str
    line: int
    rank: int | None = None
    gpu: int | None = None
    requested_bytes: int | None = None
    requested_low: int | None = None
    requested_high: int | None = None
    capacity_bytes: int | None = None
    free_bytes: int | None = None
    process_bytes: int | None = None
    allocated_bytes: int | None = None
    unallocated_bytes: int | None = None
    reserved_bytes: int | None = None
    limit_bytes: int | None = None
    private_pool_bytes: int | None = None
    other_bytes: int | None = None
    others: tuple[OtherProcess, ...] = ()
    torch: str = ""
    hints: tuple[str, ...] = ()
    truncated: bool = False
    frames: tuple[Frame, ...] = ()
    module: str = ""
    phase: FailedPhase = ""
    phase_why: str = ""
    process: str = ""
    repeats: int = 1


@dataclass(frozen=True)
class Candidate(Record):
    """A tensor whose size is that of the request.

    Attributes:
        what: ``attention scores``, ``logits``, ``expert dispatch`` and so on.
        symbols: what the dimensions are, as ``("samples", "heads", "tokens", "tokens")``.
        shape: their values.
        dtype: ``float32``, ``bfloat16 or float16``.
        bytes: the tensor's, before the allocator's rounding.
        models: catalogued models, or families, that have such a tensor.
        why: sentences.
        certainty: of the fixed set.
        rank: from 1, the most plausible.
    """

    what: str
    symbols: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    models: tuple[str, ...]
    why: tuple[str, ...]
    certainty: Certainty
    rank: int


@dataclass(frozen=True)
class Cause(Record):
    """Why the request could not be served.

    Attributes:
        name: of the fixed set.
        title: the cause in a few words.
        numbers: the bytes that it is reckoned from, by their names.
        why: sentences with the arithmetic.
        certainty: of the fixed set.
        rank: from 1, the most plausible.
    """

    name: CauseName
    title: str
    numbers: dict[str, int]
    why: tuple[str, ...]
    certainty: Certainty
    rank: int


@dataclass(frozen=True)
class Cure(Record):
    """A change that helps, the best first. What is predicted is None without a recipe.

    Attributes:
        change: what to do, in one sentence.
        why: what it does to the request, in words.
        exact: whether the step's result stays the same in exact arithmetic; None where it does not touch the mathematics
            or nobody knows.
        saves_bytes: how much smaller the tensor that failed gets; None where that does not follow.
        choice: the configuration that was predicted.
        asked: whether it is the change that the reader asked about.
    """

    change: str
    why: str
    exact: bool | None = None
    saves_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    samples_per_second: float | None = None
    fits: bool | None = None
    choice: Choice | None = None
    asked: bool = False


@dataclass(frozen=True)
class Diagnosis(Document):
    """`oomph explain`'s answer, and its ``--json``.

    Attributes:
        source: the file that was read, or ``standard input``.
        messages: the reports in the order of the text, those that repeat another left out.
        explained: which of them the rest is about: its place in `messages`, from 0.
        candidates: what the request can have been, the most plausible first.
        causes: why it failed, the most plausible first.
        event: the request of the traced step that failed; None without a recipe, or where none matches.
        alive: bytes alive at that moment, by role.
        why_now: sentences: which sample length makes the request, and how often there is one.
        cures: changes that help.
        notes: what the reader has to know besides.
        recipe: the recipe's name; None without one.
    """

    source: str
    messages: tuple[OomMessage, ...]
    explained: int
    candidates: tuple[Candidate, ...]
    causes: tuple[Cause, ...]
    event: FailingRequest | None = None
    alive: dict[str, int] = field(default_factory=dict)
    why_now: tuple[str, ...] = ()
    cures: tuple[Cure, ...] = ()
    notes: tuple[str, ...] = ()
    recipe: str | None = None
    kind: Literal["diagnosis"] = "diagnosis"
    schema: int = SCHEMA

    @property
    def message(self) -> OomMessage:
        """The report that is explained."""
        return self.messages[self.explained]
