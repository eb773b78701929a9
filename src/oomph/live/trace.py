"""Records what a training step asks of the allocator while it runs, on fake or on real tensors.

A `TorchDispatchMode` sees every operator; a storage is born when an operator's output has one that was not there
before, and dies when its last owner lets go. Module hooks and the sequence numbers of autograd nodes say which module's
forward each operator, also of the backward, belongs to.
"""

from __future__ import annotations

import bisect
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from oomph.core.events import Kind
from oomph.core.trace import NOWHERE, Operation, Parameter, Piece, Stack, Storage, Trace, layer_of, stack_of
from oomph.live.cuda_rules import CudaRules, Extra, Program, as_unwatched
from oomph.live.layers import Owner, owners
from oomph.live.offload import in_host_memory
from oomph.live.quantization import Arrival, arrival
from oomph.live.tensors import dtype_name, tensors_in
from oomph.live.work import Done, Meter, temporaries

_EMPTY = Owner("", NOWHERE)
HOST = -1
"""In place of a storage's number: it lies on the CPU, and its life is not recorded."""
_HOST_PLACE = -2
"""In place of a place: on the CPU."""
_ONCE = ("load", "warmup/optimizer")
"""Pieces that run once in a training run: what they compute is not noted."""
_ROLES = {"forward": "activation", "recompute": "activation", "evaluate": "activation"}
Run = Callable[[Any, Any, Any], Any]
_DEVICE = torch.ops.prim.device.default
_HOST_CONSTANT = torch.ops.aten.lift_fresh.default


def _plainly(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Collects a `Trace`. Use `recording` to enter it together with its module hooks.

    Args:
        model: whose modules own the storages.
        stacks: the model's stacks of layers, as `layers.shorten` gives them.
        rules: what CUDA allocates beside the traced operators' outputs; none to record the traced device as it is.
        run: how an operator is run.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[Stack], rules: CudaRules | None = None, run: Run = _plainly) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run
        self.trace = Trace(stacks=list(stacks))
        self.phase = "load"
        self._rules = rules
        self._without = rules.without if rules is not None else frozenset()
        self._meter = Meter(rules.device.capability if rules is not None else None)
        self._owners = owners(model, list(stacks))
        self._frames: list[Owner] = []
        self._sequence: list[int] = [-1]
        self._sequence_owner: list[Owner] = [_EMPTY]
        self._here = NOWHERE
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._workspaces: set[tuple[str, str]] = set()
        named = list(model.named_parameters())
        self._parameter_index = {id(parameter): number for number, (_, parameter) in enumerate(named)}
        self._parameter_owners = [self._owners[name.rpartition(".")[0]] for name, _ in named]
        self._open: tuple[str, int] | None = None
        self._inputs = self._paused = False
        self._births: list[int] = []

    # What the step's runner says.

    def start(self, name: str) -> None:
        """Ends the open piece of the timeline and starts the next; an empty name only ends."""
        position = len(self.trace.timeline)
        if self._open is not None:
            self.trace.pieces.append(Piece(self._open[0], self._open[1], position))
        self._open = (name, position) if name else None

    def enter(self, phase: str) -> None:
        """The operators from here on belong to another phase."""
        self.phase = phase
        self.trace.marks.append((len(self.trace.timeline), phase))
        if phase in ("forward", "optimizer", "evaluate"):
            self._here = NOWHERE

    @contextmanager
    def making_inputs(self) -> Iterator[None]:
        """Storages born in the block are the step's inputs."""
        self._inputs = True
        yield
        self._inputs = False

    def revive(self, index: int, parameter: Tensor) -> None:
        """Gives the parameter a gradient that stands for the one of the first micro-batch, which has died since."""
        self._paused = True
        gradient = torch.empty_like(parameter)
        self._paused = False
        rows = self.trace.storages
        number = next(n for n, s in enumerate(rows) if s.parameter == index and s.kind.role == "gradient")
        self._adopt(gradient, number)
        parameter.grad = gradient

    def finish(self) -> None:
        """Ends the last piece. What dies from here on is no longer recorded."""
        self.start("")
        self._live.clear()

    def load(self, model: nn.Module, part: Callable[[str], str]) -> None:
        """Allocates the parameters and buffers, children first as ``Module.to`` moves them, tied ones once."""
        for name, p in model.named_parameters():
            shape = tuple(p.shape)
            self.trace.parameters.append(Parameter(name, shape, dtype_name(p.dtype), p.requires_grad, part(name)))
        for path, module in _children_first(model):
            owner = self._owners[path]
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.untyped_storage()._cdata not in self._live:
                    self._arrive(arrival(module, name) or Arrival((), (tensor,)), owner)

    def _arrive(self, weight: Arrival, owner: Owner) -> None:
        """What brings a weight to the GPU is there until all of the weight is."""
        extras = [Extra(shape, dtype, "source") for shape, dtype in weight.transients]
        transients = [self._extra(extra, "load", owner, "load", owner.place) for extra in extras]
        for tensor in weight.held:
            if tensor.untyped_storage()._cdata not in self._live:
                kind = Kind("load", owner.template, "load", "weight", dtype_name(tensor.dtype))
                self._birth(tensor, kind, owner.place, owner.place, self._parameter_index.get(id(tensor), -1))
        for number in transients:
            self._event(~number, owner.place)

    def assign(self, tensors: Iterable[tuple[int, Tensor]], role: str) -> None:
        """Gives the storages of tensors a role and the parameter they belong to, and that parameter's home.

        The parameter is -1 for a tensor that belongs to several, and then has no home.
        """
        for parameter, tensor in tensors:
            entry = self._live.get(tensor.untyped_storage()._cdata)
            if entry is not None and entry[0] != HOST:
                self._relabel(entry[0], role, parameter)

    def _relabel(self, number: int, role: str, parameter: int) -> None:
        storage = self.trace.storages[number]
        if storage.kind.role == "weight":
            return
        owner = self._parameter_owners[parameter] if parameter >= 0 else _EMPTY
        kind = storage.kind._replace(role=role, module=owner.template)
        self.trace.storages[number] = storage._replace(kind=kind, home=owner.place, parameter=parameter)
        if role == "optimizer":
            self.trace.places[self._births[number]] = owner.place

    def whereabouts(self) -> str:
        """The module that runs now, for a message."""
        path = self._frames[-1].template if self._frames else ""
        layer = str(layer_of(self._here)) if self._here != NOWHERE else ""
        return path.replace("{}", layer) or "the model"

    # Modules.

    def enter_module(self, path: str) -> int:
        """A module's forward begins; returns the depth to give back to `leave_module`."""
        owner = self._owners[path]
        self._frames.append(owner)
        self._note(owner)
        if owner.place != NOWHERE:
            self._here = owner.place
        return len(self._frames) - 1

    def leave_module(self, depth: int) -> None:
        """The forward that `enter_module` announced has ended, normally or by an exception."""
        del self._frames[depth:]
        self._note(self._frames[-1] if self._frames else _EMPTY)
        outside = not self._frames or self._frames[-1].place == NOWHERE
        if self.phase in ("forward", "evaluate") and outside and self._is_last(self._here):
            self._here = NOWHERE

    def _is_last(self, where: int) -> bool:
        return where != NOWHERE and layer_of(where) == self.trace.stacks[stack_of(where)].layers - 1

    def _note(self, owner: Owner) -> None:
        self._sequence.append(_sequence_number())
        self._sequence_owner.append(owner)

    def _owner_now(self) -> tuple[Owner, str]:
        """The owner of the operator that runs now, and its phase."""
        if self.phase != "backward":
            return (self._frames[-1] if self._frames else _EMPTY), self.phase
        recompute = bool(self._frames) or torch.is_grad_enabled()
        phase = "recompute" if recompute else "backward"
        if self._frames:
            return self._frames[-1], phase
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return _EMPTY, phase
        variable = getattr(node, "variable", None)
        if variable is not None:
            index = self._parameter_index.get(id(variable), -1)
            return (self._parameter_owners[index] if index >= 0 else _EMPTY), phase
        owner = self._sequence_owner[bisect.bisect_right(self._sequence, node._sequence_nr()) - 1]
        if recompute and owner.place != NOWHERE:
            owner = Owner(owner.template[: owner.template.index("{}") + 2], owner.place)
        return owner, phase

    # Storages.

    def _event(self, entry: int, where: int) -> None:
        self.trace.timeline.append(entry)
        self.trace.places.append(where)

    def _new(self, storage: Storage, where: int) -> int:
        number = len(self.trace.storages)
        self.trace.storages.append(storage)
        self._births.append(len(self.trace.timeline))
        self._event(number, where)
        return number

    def _birth(self, tensor: Tensor, kind: Kind, home: int, where: int, parameter: int = -1) -> None:
        storage = tensor.untyped_storage()
        row = Storage(storage.nbytes(), tuple(tensor.shape), tensor.element_size(), kind, home, parameter)
        number = self._new(row, where)
        self._adopt(tensor, number)

    def _adopt(self, tensor: Tensor, number: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._live[key] = (number, weakref.ref(storage, functools.partial(self._death, key)))

    def _death(self, key: int, _: object) -> None:
        entry = self._live.pop(key, None)
        if entry is None or entry[0] == HOST:
            return
        number = entry[0]
        home = self.trace.storages[number].home
        inside = self._frames and self._frames[-1].place != NOWHERE
        released = self.phase == "backward" and not self._frames and torch._C._current_autograd_node() is None
        own = self.phase == "optimizer" or released or (self._here == NOWHERE and not inside)
        self._event(~number, home if own else self._here)

    def _extra(self, extra: Extra, op: str, owner: Owner, phase: str, where: int) -> int:
        kind = Kind(f"{op}:{extra.name}", owner.template, phase, "temporary", dtype_name(extra.dtype))
        size = (extra.size, extra.arguments)
        return self._new(Storage(extra.bytes, extra.shape, extra.dtype.itemsize, kind, owner.place, -1, *size), where)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs as much as the recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        with torch._C.DisableTorchFunction():
            return self._record(*as_unwatched(func, args, kwargs or {}, self._without), kwargs or {})

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator and records what it allocates and frees."""
        outputs = self._run(func, args, kwargs)
        if self._paused:
            return outputs
        if self._rules is not None and in_host_memory():
            for tensor in tensors_in(outputs):
                if tensor.untyped_storage()._cdata not in self._live:
                    self._adopt(tensor, HOST)
            return outputs
        owner, phase = self._owner_now()
        if owner.place != NOWHERE:
            self._here = owner.place
        if (phase == "backward" and func is torch.ops.aten.add_.Tensor) or func is torch.ops.aten.detach.default:
            self._gradient(args)
        program = self._rules.program(func, args, kwargs, outputs) if self._rules is not None else None
        name = str(func)
        before = [self._extra(extra, name, owner, phase, self._here) for extra in program.before] if program else []
        self._outputs(func, args, outputs, Kind(name, owner.template, phase, "", ""), owner)
        if program is not None:
            self._after(program.after, name, owner, phase)
        for number in before:
            self._event(~number, self._here)
        if self._rules is not None:
            self._library(func, args, kwargs, phase)
        if self._open is not None and self._open[0] not in _ONCE and not self._inputs:
            self._operation(self._meter.done(func, args, kwargs, outputs), args, name, phase, program)
        return outputs

    def _operation(self, done: Done | None, args: Sequence[Any], name: str, phase: str, program: Program | None) -> None:
        """Notes what an operator computes and moves; its temporary tensors are written and read.

        The optimizer's belong to the layers of the tensors that they change; one over lists of tensors is one launch with
        parts in several layers.
        """
        if done is None:
            return
        assert self._open is not None
        noted, piece = self.trace.operations, self._open[0]
        if phase == "recompute" and not self._frames and torch._C._current_autograd_node() is None:
            phase = "backward"  # the step's own sum of losses, between two backwards
        if phase != "optimizer":
            traffic = (*done.traffic, *(product for part in done.parts for product in part.traffic))
            if program is not None:
                traffic += temporaries(program)
            noted.append(Operation(piece, phase, name, done.dtype, self._here, done.launches, done.flops, traffic))
            return
        first = next(tensors_in(args), None)
        where = self._here if first is None else self._place_of(first)
        if where == _HOST_PLACE:
            return
        place = NOWHERE if done.parts else where
        noted.append(Operation(piece, phase, name, done.dtype, place, done.launches, done.flops, done.traffic))
        for part in done.parts:
            noted.append(Operation(piece, phase, name, done.dtype, self._place_of(part.first), 0, (), part.traffic))

    def _place_of(self, tensor: Tensor) -> int:
        """The home of the tensor's storage."""
        number = self._live.get(tensor.untyped_storage()._cdata, (None,))[0]
        if number == HOST:
            return _HOST_PLACE
        return self._here if number is None else self.trace.storages[number].home

    def _gradient(self, args: Sequence[Any]) -> None:
        node: Any = torch._C._current_autograd_node()
        variable = getattr(node, "variable", None)
        index = self._parameter_index.get(id(variable), -1)
        if index >= 0:
            self.assign([(index, args[-1])], "gradient")

    def _outputs(self, func: Any, args: Sequence[Any], outputs: Any, kind: Kind, owner: Owner) -> None:
        for position, tensor in enumerate(tensors_in(outputs)):
            if tensor.untyped_storage()._cdata in self._live:
                continue
            if self._rules is not None and self._on_host(func, position, kind.phase):
                self._adopt(tensor, HOST)
                continue
            home = owner.place
            if kind.phase == "optimizer":
                home = self._here = self._home_of(args, position)
            role = "input" if self._inputs else _ROLES.get(kind.phase, "temporary")
            self._birth(tensor, kind._replace(role=role, dtype=dtype_name(tensor.dtype)), home, self._here)
            if self._rules is not None and not self._rules.classified(func):
                self.trace.unclassified.add(kind.op)

    def _on_host(self, func: Any, position: int, phase: str) -> bool:
        """Whether an output lives on the CPU; in the optimizer, numbers that become tensors do."""
        assert self._rules is not None
        return self._rules.on_host(func, position) or (func is _HOST_CONSTANT and phase == "optimizer")

    def _home_of(self, args: Sequence[Any], position: int) -> int:
        """In the optimizer: the home of the first argument, of its `position`-th where it is a list; else the last one's."""
        first = args[0] if args else None
        if isinstance(first, list | tuple):
            first = first[position] if position < len(first) else None
        if isinstance(first, Tensor):
            entry = self._live.get(first.untyped_storage()._cdata)
            if entry is not None and entry[0] != HOST:
                return self.trace.storages[entry[0]].home
        return self._here

    def _after(self, program: Sequence[Extra | int], name: str, owner: Owner, phase: str) -> None:
        held: list[int | None] = []
        for item in program:
            if isinstance(item, int):
                number = held[item]
                assert number is not None
                self._event(~number, self._here)
                held[item] = None
            else:
                held.append(self._extra(item, name, owner, phase, self._here))
        for number in held:
            if number is not None:
                self._event(~number, self._here)

    def _library(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], phase: str) -> None:
        assert self._rules is not None
        thread = "autograd" if phase in ("backward", "recompute") else "main"
        for key, nbytes in self._rules.workspaces(func, tuple(args), kwargs):
            if (key, thread) not in self._workspaces:
                self._workspaces.add((key, thread))
                kind = Kind(f"{key} ({thread} thread)", "", phase, "workspace", "uint8")
                self._new(Storage(nbytes, (nbytes,), 1, kind, NOWHERE), NOWHERE)


def _children_first(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    def visit(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            yield from visit(f"{path}.{name}" if path else name, child)
        yield path, module

    return visit("", model)


def _hook(recorder: Recorder, path: str, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Tells the recorder when the module's forward begins and ends; a forward may run inside itself."""
    depths: list[int] = []

    def begin(*_: Any) -> None:
        depths.append(recorder.enter_module(path))

    def end(*_: Any) -> None:
        recorder.leave_module(depths.pop())

    return module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end, always_call=True)


def _sequence_number() -> int:
    """The number that the next autograd node will get."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


@contextmanager
def recording(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Hooks the model's modules and records every operator until the block ends. Cyclic garbage collection is held off.

    The collector would free storages at moments that depend on unrelated allocations, and no two traces would agree.
    """
    with ExitStack() as stack:
        enabled = gc.isenabled()
        gc.disable()
        if enabled:
            stack.callback(gc.enable)
        for path, module in model.named_modules():
            for handle in _hook(recorder, path, module):
                stack.callback(handle.remove)
        stack.enter_context(recorder)
        yield
