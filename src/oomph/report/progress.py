"""How a run goes, on stderr: a bar with figures in a terminal, lines elsewhere."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from oomph.report import words
from oomph.report.lines import NARROWEST, clean, hanging, kept
from oomph.report.run import recovery
from oomph.run_records import EvaluationRecord, StepRecord
from oomph.units import size

_LINES = 100
"""Lines that a stage's steps get at the most where there is no bar."""
_PATIENCE = 4
"""Pictures of the bar in a second."""


class Screen:
    """Shows a run. What it has to say goes to stderr, above the bar where there is one.

    Args:
        console: stderr; by default that of the process.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._numbers = Text()

    def note(self, sentence: str) -> None:
        """Something noteworthy: wrapped in a terminal, one line elsewhere."""
        said = clean(sentence)
        self._console.print(self._wrapped(said, 0) if self._console.is_terminal else Text(said), soft_wrap=True)

    def begin(self, stage: str, steps: int, done: int) -> None:
        """A stage's steps begin."""
        if not self._console.is_terminal:
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task(clean(stage), total=steps, completed=done)
        self._numbers = Text()
        self._live = Live(
            get_renderable=lambda: Group(self._bar, self._numbers),
            console=self._console,
            refresh_per_second=_PATIENCE,
            redirect_stdout=False,
        )
        self._live.start()

    def step(self, record: StepRecord) -> None:
        """A step is committed."""
        for found in record.recoveries:
            self.note(f"{record.stage}: {recovery(found)}")
        for what, names in (("left out", record.skipped), ("made smaller", record.shrunk)):
            if names:
                self.note(f"{record.stage}: step {record.step:,}: {what}, as it does not fit: {', '.join(names)}")
        if record.step == 0:
            self.note(f"{record.stage}: dry run of the largest samples: {_memory(record)}")
        elif self._live is not None:
            self._bar.update(self._task, completed=record.step)
            self._numbers = self._wrapped(", ".join(map(kept, figures(record).split(", "))), 2)
        elif record.step in (1, record.steps) or record.step % -(-record.steps // _LINES) == 0:
            self.note(f"{record.stage} {record.step:,}/{record.steps:,}: {figures(record)}")

    def evaluation(self, record: EvaluationRecord) -> None:
        """The model was evaluated."""
        tokens = words.counted(record.label_tokens, "label token")
        self.note(f"{record.stage}: loss {record.loss:.4f} on held-out data after step {record.step:,} ({tokens})")

    def end(self) -> None:
        """The stage's steps end."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _wrapped(self, text: str, indent: int) -> Text:
        return Text("\n").join(hanging(text, max(self._console.width, NARROWEST), indent))


def figures(record: StepRecord) -> str:
    """A step in figures: loss, learning rate, speed, memory, how long it waited for data, how busy the device was."""
    spent = record.seconds["data"] + record.seconds["step"]
    found = ["no label" if record.loss is None else f"loss {record.loss:.4f}"]
    found += [f"lr {max(record.learning_rates.values(), default=0.0):.2e}"]
    if spent > 0:
        found += [f"{words.number(record.samples / spent)} samples/s", f"{words.number(record.tokens / spent)} tokens/s"]
    found += [_memory(record)]
    if spent > 0:
        found += [f"data wait {100 * record.seconds['data'] / spent:.0f} %"]
    if record.activity is not None:
        found += [f"busy {100 * record.activity:.0f} %"]
    return ", ".join(found)


def _memory(record: StepRecord) -> str:
    shown = []
    if record.measured_peak_bytes is not None:
        shown.append(size(record.measured_peak_bytes))
    if record.predicted_peak_bytes is not None:
        shown.append(f"predicted {size(record.predicted_peak_bytes)}")
    return f"memory {' / '.join([*shown, f'allowed {size(record.limit_bytes)}'])}"
