"""Errors that are the user's to mend: what is wrong, why, and the way out."""

from __future__ import annotations


class UserError(Exception):
    """Wrong usage or input. The command line prints it and exits with code 2.

    Attributes:
        problems: one sentence for each thing that is wrong, all of them at once.
        hint: a way out, or an empty string.
    """

    def __init__(self, problems: str | list[str], hint: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.hint = hint
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str], str]]:
        """A copy from another process has the same problems and the same hint."""
        return type(self), (self.problems, self.hint)

    def render(self) -> str:
        """The text for stderr: an ``error:`` line for each problem, a blank line, ``hint:``."""
        lines = [f"error: {problem}" for problem in self.problems]
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return "\n".join(lines)


class UntraceableError(UserError):
    """The model's own code cannot run on fake tensors (data-dependent shapes, custom kernels)."""


class RunError(UserError):
    """A run that could not go on, though what was asked for was right: exit code 1."""
