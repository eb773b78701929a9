"""Which commands of a script start a training: the program, its flags, and how many GPUs the launcher gives it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from oomph.core.launch.shell import Command, Word

MODEL = "model_name_or_path"
"""The flag by which a training is known: no evaluation and no server of these projects has it."""

_PER_NODE = ("nproc_per_node", "num_gpus")
_IN_ALL = ("num_processes",)
_NODES = ("nnodes", "num_nodes", "num_machines")
_LAUNCHERS = ("deepspeed", "torchrun", "accelerate")


@dataclass(frozen=True)
class Training:
    """A command that starts a training.

    Attributes:
        launcher: ``deepspeed``, ``torchrun``, ``accelerate`` or ``python``.
        program: the file or module that trains.
        flags: its flags by their names without dashes, with underscores; each has its values.
        gpus: all GPUs of the run; None where neither launcher nor script says it.
        nodes: the machines.
        gpus_why: where the number of GPUs is from.
        expandable_segments: whether the allocator's option is on.
        config: of accelerate, the file that ``--config_file`` names; empty where none is.
        lost: lines that look like flags and follow the command, but are none of it.
        line: of the script.
    """

    launcher: str
    program: str
    flags: dict[str, tuple[Word, ...]]
    gpus: int | None
    nodes: int
    gpus_why: str
    expandable_segments: bool = False
    config: str = ""
    lost: tuple[str, ...] = field(default=())
    line: int = 1


def trainings(commands: Sequence[Command]) -> list[Training]:
    """The commands that start a training, in the order of the script."""
    found = []
    for number, command in enumerate(commands):
        if any(_name(word.text) == MODEL for word in command.words):
            found.append(_training(command, _lost(commands[number + 1 :])))
    return found


def _training(command: Command, lost: tuple[str, ...]) -> Training:
    words = command.words
    start = _program(words)
    before = _flags(words[:start])
    launcher = next((name for name in map(_base, words[:start]) if name in _LAUNCHERS), "python")
    if any(word.text in ("torch.distributed.launch", "torch.distributed.run") for word in words[:start]):
        launcher = "torchrun"
    gpus, nodes, why = _gpus(launcher, before, command)
    allocator = _variable(command, "PYTORCH_CUDA_ALLOC_CONF") + _variable(command, "PYTORCH_ALLOC_CONF")
    config = before.get("config_file", ())
    return Training(
        launcher=launcher,
        program=words[start].text if start < len(words) else "",
        flags=_flags(words[start + 1 :]),
        gpus=gpus,
        nodes=nodes,
        gpus_why=why,
        expandable_segments="expandable_segments:true" in allocator.lower().replace(" ", ""),
        config=config[0].text if config else "",
        lost=lost,
        line=command.line,
    )


def _program(words: Sequence[Word]) -> int:
    """The place of the program that trains: the first Python file, or what stands before the first flag that it knows."""
    for at, word in enumerate(words):
        if word.text.endswith(".py") and not word.text.startswith("-"):
            return at
        if word.text in ("-m", "--module") and at + 1 < len(words) and "train" in words[at + 1].text:
            return at + 1
        if _name(word.text) == MODEL:
            return at - 1 if at else at
    return len(words)


def _flags(words: Sequence[Word]) -> dict[str, tuple[Word, ...]]:
    """Flags with their values, the last of a name; ``-2`` is a value, as is whatever does not begin with two dashes."""
    found: dict[str, tuple[Word, ...]] = {}
    name = ""
    for word in words:
        if word.text.startswith("--") and len(word.text) > 2:
            name = _name(word.text)
            _, equals, value = word.text.partition("=")
            found[name] = (Word(value, word.unknown),) if equals else ()
        elif name:
            found[name] = (*found[name], word)
    return found


def _name(text: str) -> str:
    return text.partition("=")[0].removeprefix("--").replace("-", "_") if text.startswith("--") else ""


def _base(word: Word) -> str:
    return PurePath(word.text).name


def _lost(following: Sequence[Command]) -> tuple[str, ...]:
    """Flags on lines of their own: what ended the command before them was a comment, or a space after a backslash."""

    def stray() -> Iterator[str]:
        for command in following:
            if not command.words[0].text.startswith("--"):
                return
            yield from (word.text for word in command.words if word.text.startswith("--"))

    return tuple(stray())


def _gpus(launcher: str, flags: dict[str, tuple[Word, ...]], command: Command) -> tuple[int | None, int, str]:
    """All GPUs, the machines, and where that is from."""
    nodes = next((number for name in _NODES if (number := _number(flags, name))), 1)
    for name in _PER_NODE:
        if number := _number(flags, name):
            each = f" on each of {nodes} machines" if nodes > 1 else ""
            return number * nodes, nodes, f"--{name} {number}{each}"
    for name in _IN_ALL:
        if number := _number(flags, name):
            return number, nodes, f"--{name} {number}"
    if "include" in flags and flags["include"] and not flags["include"][0].unknown:
        return _included(flags["include"][0].text)
    visible = _variable(command, "CUDA_VISIBLE_DEVICES")
    if visible and "$" not in visible:
        number = len([device for device in visible.split(",") if device.strip()])
        return number * nodes, nodes, f"CUDA_VISIBLE_DEVICES={visible}"
    if launcher == "torchrun" and not any(name in flags for name in _PER_NODE):
        return nodes, nodes, "torchrun starts one process where it is not told a number"
    if launcher == "python":
        return 1, 1, "one process without a launcher"
    return None, nodes, ""


def _included(text: str) -> tuple[int | None, int, str]:
    """DeepSpeed's ``host:0,1@host:0,1``; a host without numbers has all its GPUs, however many."""
    hosts = [host.partition(":")[2] for host in text.split("@")]
    if not all(hosts):
        return None, len(hosts), ""
    return sum(len(devices.split(",")) for devices in hosts), len(hosts), f"--include {text}"


def _number(flags: dict[str, tuple[Word, ...]], name: str) -> int | None:
    """A whole number above 0; of ``1:4``, as torchrun takes it, the most."""
    values = flags.get(name, ())
    text = values[0].text.rpartition(":")[2] if values and not values[0].unknown else ""
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text[:9]) and len(text) < 9 else None


def _variable(command: Command, name: str) -> str:
    return command.variables[name].text if name in command.variables else ""
