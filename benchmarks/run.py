"""Times planning as a user meets it, and the two loops that a search over configurations runs on.

Prints one table: each figure with its spread, its ratio to a baseline of the same run, and the aim beside it. Nothing is
asserted, since seconds belong to the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from oomph.core.allocator import Allocator, AllocatorSettings, Replay, replay
from oomph.core.closed_form import ClosedForm
from oomph.core.events import Events
from oomph.core.forms import CachedForms, FormKey, Traced
from oomph.core.layout import Shape, lay_out
from oomph.core.plan import make_plan
from oomph.recipe import data_of, load, stage_of

RECIPE = "moe-llava/phi2-clip336-as-published"
STAGE = "finetune"
PLAN = [sys.executable, "-m", "oomph", "plan"]
BARE = [sys.executable, "-c", "pass"]
IMPORTS = [sys.executable, "-c", "import torch, transformers"]
GIGABYTE = 10**9
LOOP_SECONDS = 1.0

KIMI = """\
name: kimi-k2.5
model: kimi-k2.5
data: {max_tokens: 4096}
hardware: {gpu: H200-SXM-141GB, gpus: 256, nodes: 32}
memory: {micro_batch: 1, sharding: zero3}
stages:
  - name: finetune
    train: {vision: frozen, projector: 1.0e-5, language: 1.0e-5, experts: 1.0e-5, router: 1.0e-5, head: 1.0e-5}
    effective_batch: 256
"""


class Finished(NamedTuple):
    """A process that has ended: wall seconds, and the bytes that its largest process held at most."""

    seconds: float
    resident_bytes: int


class Row(NamedTuple):
    """A line of the table. `samples` and `baseline` have one entry for each round, or a single one each."""

    name: str
    samples: Sequence[float]
    unit: str
    baseline: Sequence[float] = ()
    against: str = ""
    aim: str = ""


class Compared(NamedTuple):
    """What one call takes, in seconds, and what the least work of its kind takes beside it; one entry for each round."""

    seconds: list[float]
    baseline: list[float]


class Remembered:
    """A source of closed forms that makes none, reads those of an earlier run, and keeps what it gave last."""

    def __init__(self, folder: Path) -> None:
        self._cached = CachedForms(_refuse, folder=folder)
        self.given: list[Traced] = []

    def prepare(self, keys: Sequence[FormKey]) -> None:
        """Reads the forms."""
        self._cached.prepare(keys)

    def traced(self, key: FormKey) -> Traced:
        """The form of a key."""
        self.given.append(self._cached.traced(key))
        return self.given[-1]


def _refuse(keys: Sequence[FormKey], done: Callable[[FormKey, Traced], None]) -> None:
    raise LookupError(f"the cache lacks {len(keys)} traces of the last timed run; was the package changed meanwhile?")


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="rounds; the median of them is printed (default 3)")
    rounds = parser.parse_args().runs
    for line in machine():
        print(line)
    print(f"load before   {_load()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*processes(Path(folder), rounds), *loops(Path(folder), rounds)]
    for line in table(rows):
        print(line)
    print(f"\nload after    {_load()}")


def machine() -> Iterator[str]:
    """The machine and the versions, a line each."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"processor     {_processor()}, {affinity} of {os.cpu_count()} cores"
    yield f"system        {platform.system()} {platform.release()}, {platform.machine()}"
    names = ("oomph", "torch", "transformers", "numpy")
    yield f"versions      Python {platform.python_version()}, {', '.join(f'{name} {metadata.version(name)}' for name in names)}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _load() -> str:
    return f"{os.getloadavg()[0]:.2f} (one-minute average)" if hasattr(os, "getloadavg") else "unknown"


def processes(folder: Path, rounds: int) -> list[Row]:
    """Whole processes, round by round, so that each is compared with a start of the interpreter in the same round."""
    kimi = folder / "kimi.yaml"
    kimi.write_text(KIMI, encoding="utf-8")
    taken: dict[str, list[Finished]] = {name: [] for name in ("bare", "imports", "cold", "cached", "kimi")}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=sys.stderr, flush=True)
        ours, other = folder / str(number), folder / f"{number}-kimi"
        taken["bare"].append(run(BARE, ours))
        taken["imports"].append(run(IMPORTS, ours))
        taken["cold"].append(run([*PLAN, RECIPE], ours, {0, 1}))
        taken["cached"].append(run([*PLAN, RECIPE], ours, {0, 1}))
        taken["kimi"].append(run([*PLAN, str(kimi)], other, {0, 1}))
    seconds = {name: [done.seconds for done in runs] for name, runs in taken.items()}
    resident = {name: [done.resident_bytes / GIGABYTE for done in runs] for name, runs in taken.items()}
    start, libraries = (seconds["bare"], "python -c pass"), (resident["imports"], "the imports")
    return [
        Row("python -c pass", seconds["bare"], "s"),
        Row('python -c "import torch, transformers"', seconds["imports"], "s", *start),
        Row("plan, three stages, nothing cached", seconds["cold"], "s", *start, "20 s"),
        Row("plan, three stages, cached", seconds["cached"], "s", *start, "2 s"),
        Row("plan of Kimi-K2.5, nothing cached", seconds["kimi"], "s", *start, "20 s"),
        Row("memory: import torch, transformers", resident["imports"], "GB"),
        Row("memory: plan, three stages, nothing cached", resident["cold"], "GB", *libraries, "1.5 GB"),
        Row("memory: plan of Kimi-K2.5, nothing cached", resident["kimi"], "GB", *libraries),
    ]


def run(command: Sequence[str], cache: Path, allowed: frozenset[int] | set[int] = frozenset({0})) -> Finished:
    """Runs a command with a trace cache of its own.

    Raises:
        RuntimeError: it ended with an exit code that is not allowed; with what it printed to stderr.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in allowed:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors.read().decode()}")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return Finished(seconds, usage.ru_maxrss * unit)


def loops(folder: Path, rounds: int) -> list[Row]:
    """Evaluations of a closed form and replays of the allocator, on the stage that the published settings cannot hold."""
    form, events, shape = planned(folder / str(rounds - 1) / "oomph" / "traces")
    timeline = [entry for segment in events.segments for entry in segment.timeline]
    settings, tokens = AllocatorSettings(), count(1024)
    signs = np.where(np.array(timeline) >= 0, 1, -1)

    def anew() -> Shape:
        return shape._replace(tokens=next(tokens))

    def replayed() -> Replay:
        return replay(events.sizes, events.segments, Allocator(settings=settings))

    sizes = compare(lambda: form.sizes(anew()), lambda: signs.cumsum().max(), rounds)
    peaks = compare(lambda: form.live_peak(anew(), True), lambda: signs.cumsum().max(), rounds)
    replays = compare(replayed, lambda: _walk(timeline), rounds)
    running, walking = f"a running sum of {len(timeline):,} numbers", f"a walk over {len(timeline):,} events"
    return [
        _rate("closed form: sizes", sizes, running),
        _rate("closed form: sizes and most bytes alive", peaks, running, "3,000/s"),
        _rate("allocator: replays of a step", replays, walking),
        _rate("allocator: events", replays, walking, per_call=len(timeline)),
    ]


def planned(folder: Path) -> tuple[ClosedForm, Events, Shape]:
    """The form, the events and the shape of the published finetune stage, from traces that are in a cache."""
    recipe, source = load(RECIPE), Remembered(folder)
    stage = make_plan(recipe, source, [STAGE]).stages[0]
    form = source.given[0].form
    assert form is not None
    images = data_of(recipe, stage_of(recipe, STAGE)).images_per_sample
    shape = Shape(stage.choice.micro_batch, stage.samples_tokens, stage.choice.micro_batch * images)
    return form, lay_out(form, stage.choice, stage.samples_tokens, images), shape


def _walk(timeline: Sequence[int]) -> None:
    """The least that a replay in Python does: it looks at every event, and notes births and deaths."""
    alive: dict[int, int] = {}
    for entry in timeline:
        if entry >= 0:
            alive[entry] = entry
        else:
            alive.pop(~entry)


def compare(call: Callable[[], object], baseline: Callable[[], object], rounds: int) -> Compared:
    """Times a call and its baseline, one after the other in each round."""
    found = Compared([], [])
    for _ in range(rounds):
        found.seconds.append(_seconds(call))
        found.baseline.append(_seconds(baseline))
    return found


def _seconds(call: Callable[[], object]) -> float:
    """Seconds that one of many calls in a row takes."""
    call()
    begin, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < LOOP_SECONDS:
        call()
        calls += 1
    return spent / calls


def _rate(name: str, compared: Compared, against: str, aim: str = "", per_call: int = 1) -> Row:
    """A row that shows calls for each second, or what `per_call` counts in them, of the call and of its baseline."""
    rates = [per_call / seconds for seconds in compared.seconds]
    return Row(name, rates, "/s", [per_call / seconds for seconds in compared.baseline], against, aim)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as lines: median, least and most, the median of the ratios, the aim."""
    head = ("", "median", "from", "to", "ratio", "aim", "ratio to")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for line in cells:
        texts = [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:-1], widths[1:-1], strict=True))]
        yield "  ".join([*texts, line[-1]]).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    shown = [statistics.median(row.samples), min(row.samples), max(row.samples)]
    numbers = [f"{_number(value)}{' ' if row.unit.isalpha() else ''}{row.unit}" for value in shown]
    ratios = [value / base for value, base in zip(row.samples, row.baseline, strict=True)] if row.baseline else []
    return row.name, *numbers, _number(statistics.median(ratios)) if ratios else "", row.aim, row.against


def _number(value: float) -> str:
    """Three digits that count, and whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
