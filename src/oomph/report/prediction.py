"""A prediction by itself as a terminal screen, as `oomph.predict` gives it for somebody's own step."""

from __future__ import annotations

from rich.text import Text

from oomph.records import Prediction
from oomph.report import words
from oomph.report.lines import NARROWEST, clean, field, paragraph, printed
from oomph.report.text import memory


def render(prediction: Prediction, width: int = 80, color: bool = False) -> str:
    """The prediction as text.

    Args:
        prediction: what to show.
        width: cells of a line; below 70 it is taken as 70. No line is longer.
        color: whether to add escape codes for colour and weight; the words are the same.
    """
    width = max(width, NARROWEST)
    lines = paragraph(words.verdict(prediction), width, 2, "bold green" if prediction.fits else "bold red")
    if prediction.failing_request:
        lines += [Text(), *paragraph(words.shortage(prediction.failing_request, prediction.usable_bytes), width)]
    lines += memory(prediction, "the card", width)
    lines += [Text(), *field("error bound", [words.bound(prediction)], width)]
    lines += field("not counted", [clean(item) for item in prediction.leaves_out], width)
    return printed(lines, color)
