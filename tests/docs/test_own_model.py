"""docs/your-own-model.md: its programs run as they stand, and print what the page says they print."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

PAGE = "docs/your-own-model.md"


def test_the_programs_print_what_the_page_shows(pages: dict[str, Any], quoting: Callable[[str, str], str]) -> None:
    page, names = pages[PAGE], {"__name__": "train"}
    programs, shown = page.blocks("python"), page.blocks("text")
    assert len(programs) == len(shown) >= 3
    for program, output in zip(programs, shown, strict=True):
        assert program.line < output.line
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program.text, "train.py", "exec"), names)
        text = printed.getvalue().rstrip("\n") + "\n"
        expected = quoting(output.text, text) if "[...]" in output.text else text
        assert output.text == expected, f"{PAGE}, line {output.line}: the program prints\n{expected}"
