"""The command line is frozen: a flag is forever, so a new one is a decision."""

from __future__ import annotations

from typing import Any

import typer.main

from oomph import cli

# Positional arguments in capitals, as the usage line shows them.
COMMANDS = {
    "plan": {
        "RECIPE",
        "[KEY=VALUE]...",
        "--stage",
        "--gpu",
        "--gpus",
        "--no-ladder",
        "--fit",
        "--keep",
        "--json",
        "--help",
    },
    "measure": {"RECIPE", "[KEY=VALUE]...", "--stage", "--keep", "--json", "--help"},
    "train": {
        "RECIPE",
        "[KEY=VALUE]...",
        "--output",
        "--resume",
        "--memory-limit",
        "--check-data",
        "--stage",
        "--json",
        "--help",
    },
    "chat": {"FOLDER", "--image", "--prompt", "--help"},
    "eval": {"FOLDER", "DATA", "--images", "--batch", "--json", "--help"},
    "explain": {"FILE", "[KEY=VALUE]...", "--recipe", "--script", "--stage", "--gpu", "--gpus", "--json", "--help"},
    "report": {"FILE", "--html", "--force", "--json", "--help"},
}


def names(command: Any) -> set[str]:
    """The flags and positional arguments of one command."""
    found: set[str] = set()
    for parameter in command.get_params(command.context_class(command)):
        if parameter.param_type_name == "argument":
            found.add(parameter.metavar or parameter.name.upper())
        else:
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def test_the_flags_of_every_command_are_these() -> None:
    group: Any = typer.main.get_command(cli.app)
    found = {name: names(command) for name, command in group.commands.items()}
    changes = [
        f"{name}: {flag} {'is new' if flag in found.get(name, set()) else 'is gone'}"
        for name in sorted(found.keys() | COMMANDS.keys())
        for flag in sorted(found.get(name, set()) ^ COMMANDS.get(name, set()))
    ]
    assert not changes, (
        "the command line changed:\n" + "\n".join(changes) + "\nMost settings belong in the recipe, where key=value reaches "
        "them without a flag. If this one has to be a flag, change COMMANDS and the pages under docs/ with it."
    )
