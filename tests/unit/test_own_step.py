"""`oomph.predict`: what it takes, what it refuses and how it says so, and that it changes nothing of the user's."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
import threading
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oomph
from oomph.errors import UntraceableError, UserError
from oomph.live.predict import Task, predict, trace_steps
from oomph.live.surroundings import Reading
from oomph.live.untraceable import untraceable

CARD = "A100-SXM4-40GB"
ROWS = torch.zeros(4, 16)


class Inner(nn.Module):
    """Calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Model(nn.Module):
    """Two layers, and a function in a module of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 8))
        self.tail = Inner(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    model(batch).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def peak(step: Callable[..., Any] = train, model: nn.Module | None = None, batch: Any = ROWS, **settings: Any) -> int:
    settings = {"optimizer": adamw, "gpu": CARD} | settings
    return predict(step, Model() if model is None else model, batch, **settings).allocated_peak_bytes


# Nothing of the user's is changed.


def test_nothing_of_the_users_is_changed() -> None:
    model = Model()
    model.norm = nn.BatchNorm1d(8)
    model(ROWS + 1).sum().backward()
    model.body[0].eval()
    model.register_forward_hook(lambda module, args, output: None)
    before = pickle.dumps({name: tensor.numpy() for name, tensor in model.state_dict().items()})
    tensors = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    gradients = {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    batch = {"x": torch.arange(64.0).view(4, 16), "keep": [1, 2]}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
        model.train()
        torch.manual_seed(3)
        random.random()
        np.random.rand()
        batch["x"].add_(torch.rand(4, 16))
        batch["keep"].append(3)
        model.norm(model(batch["x"])).sum().backward()
        optimizer.step()
        model.seen = batch["x"]

    predict(step, model, batch, gpu=CARD, optimizer=adamw)
    assert pickle.dumps({name: tensor.numpy() for name, tensor in model.state_dict().items()}) == before
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == tensors
    for name, parameter in model.named_parameters():
        assert (name in gradients) == (parameter.grad is not None)
        assert name not in gradients or (id(parameter.grad) == gradients[name][0] and parameter.grad.equal(gradients[name][1]))
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert (torch.get_rng_state().equal(states[0]), random.getstate(), np.random.get_state()[1].tolist()) == (True, *states[1:])
    assert not hasattr(model, "seen")
    assert batch["x"].equal(torch.arange(64.0).view(4, 16))
    assert batch["keep"] == [1, 2]
    with torch.no_grad():
        model(torch.ones(4, 16))  # it runs for real as ever


def test_a_failing_step_changes_nothing_either() -> None:
    model = Model()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        model.eval()
        raise KeyError("lost")

    with pytest.raises(KeyError):
        peak(step, model)
    assert model.training
    assert not model._forward_hooks
    assert torch.ones(2).add_(1).tolist() == [2, 2]
    assert f"{torch.ones(()):.1f}" == "1.0"


# What a model and a batch may be.


def test_weights_may_be_anywhere() -> None:
    real, half = Model(), Model()
    half.body[0].to("meta")
    with torch.device("meta"):
        none = Model()
    assert peak(model=real) == peak(model=half) == peak(model=none)


def test_tied_weights_count_once() -> None:
    tied, loose = (
        nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)),
        nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)),
    )
    tied[1].weight = tied[0].weight
    batch = torch.zeros(2, 512)
    weights = [predict(train, model, batch, gpu=CARD, optimizer=adamw).by_role["weight"] for model in (loose, tied)]
    assert weights[0] - weights[1] == 512 * 512 * 4


@dataclasses.dataclass
class Record:
    """Holds a tensor."""

    x: Tensor


def test_a_batch_may_be_any_structure() -> None:
    def of(pick: Callable[[Any], Tensor]) -> Callable[..., None]:
        return lambda model, optimizer, batch: train(model, optimizer, pick(batch))

    plain = peak()
    assert peak(of(lambda b: b["a"][0]), batch={"a": [ROWS, "text"]}) == plain
    assert peak(of(lambda b: b.x), batch=Record(ROWS)) == plain
    assert peak(of(lambda b: b["x"]), batch=UserDict(x=ROWS)) == plain
    assert peak(of(lambda b: torch.from_numpy(b).cuda()), batch=ROWS.numpy()) == plain
    assert peak(of(lambda b: b[0]), batch=(ROWS, threading.Lock())) == plain


def test_words_for_devices_leave_tensors_where_they_are() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        model.cuda()
        model.to("cuda:0")
        x = batch.cuda(non_blocking=True).to("cuda").to(0).to(next(model.parameters()).device)
        assert x is batch
        train(model, optimizer, x + torch.zeros(16, device="cuda") * 0)
        torch.cuda.synchronize()

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        train(model, optimizer, batch + torch.zeros(16) * 0)

    assert peak(step) == peak(plain)


def test_copies_to_the_host_are_not_counted() -> None:
    def keep(where: Callable[[Tensor], Tensor]) -> int:
        kept: list[Tensor] = []

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
            train(model, optimizer, batch)
            kept.append(where(torch.zeros(1 << 20, device="cuda")) + 1)

        return peak(step)

    gpu, host, word = keep(lambda x: x), keep(Tensor.cpu), keep(lambda x: x.to("cpu"))
    assert gpu - host >= 4 << 20
    assert host == word


def test_autocast_and_scaler_run_as_on_a_gpu() -> None:
    sizes: dict[str, set[torch.dtype]] = {}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        scaler = torch.amp.GradScaler("cuda")
        with torch.autocast("cuda", dtype=torch.float16):
            out = model(batch)
        sizes.setdefault("out", set()).add(out.dtype)
        scaler.scale(out.sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    assert peak(step)
    assert sizes == {"out": {torch.float16}}


# Phases.


def test_phases_are_found_out() -> None:
    prediction = predict(train, Model(), ROWS, gpu=CARD, optimizer=adamw)
    assert [phase.phase for phase in prediction.phases] == ["load", "forward", "backward", "optimizer"]
    assert prediction.by_role["optimizer"]


@pytest.mark.parametrize(
    "call", [Tensor.backward, torch.autograd.backward, lambda loss: torch.autograd.grad(loss, [loss.root])]
)
def test_a_backward_is_one_however_it_is_called(call: Callable[[Tensor], Any]) -> None:
    def step(model: nn.Module, batch: Tensor) -> None:
        loss = model(batch).sum()
        loss.root = next(model.parameters())
        call(loss)

    trace = trace_steps(Task(step, Model(), ROWS, capability=(8, 0))).trace
    products = {s.kind.phase for s in trace.storages if s.kind.op == "aten.mm.default"}
    assert products == {"backward"}


def test_what_is_recomputed_is_told_apart() -> None:
    def step(model: nn.Module, batch: Tensor) -> None:
        torch.utils.checkpoint.checkpoint(model, batch, use_reentrant=False).sum().backward()

    prediction = predict(step, Model(), ROWS, gpu=CARD)
    trace = trace_steps(Task(step, Model(), ROWS)).trace
    assert {"forward", "recompute", "backward"} <= {storage.kind.phase for storage in trace.storages}
    assert prediction.fits


def test_a_step_without_a_backward_is_an_evaluation() -> None:
    def evaluate(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return model(batch)

    prediction = predict(evaluate, Model(), ROWS, gpu=CARD)
    assert prediction.evaluation
    assert prediction.evaluation.allocated_peak_bytes == prediction.allocated_peak_bytes
    assert "allocated peak of each phase" in oomph.render(prediction)
    assert "evaluation" in oomph.render(prediction)


def test_an_optimizer_in_the_backward_frees_each_gradient() -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        for parameter in parameters:
            own = torch.optim.SGD([parameter], lr=0.1)

            def update(parameter: Tensor, own: torch.optim.Optimizer = own) -> None:
                own.step()
                own.zero_grad()

            parameter.register_post_accumulate_grad_hook(update)
        return torch.optim.SGD(parameters, lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        model(batch).sum().backward()

    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    batch = torch.zeros(2, 256)
    fused = predict(step, model, batch, gpu=CARD, optimizer=make)
    plain = predict(train, model, batch, gpu=CARD, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert plain.allocated_peak_bytes - fused.allocated_peak_bytes > 6 * 256 * 256 * 4


# Layers.


class Deep(nn.Module):
    """Equal layers."""

    def __init__(self, layers: int, counted: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(layers))
        self.counted = [0] * layers if counted else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.counted is not None:
            x = x * sum(1 for number, _ in enumerate(self.counted) if self.layers[number])
        return x


@pytest.mark.parametrize("counted", [False, True])
def test_a_few_of_equal_layers_stand_for_all(counted: bool) -> None:
    """`counted` looks every layer up by its number, so that none can be left out; then all are traced."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        model(batch).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    batch = torch.zeros(8, 32)
    all_layers, equal = (
        predict(step, Deep(12, counted), batch, gpu=CARD, optimizer=fused, layers=layers) for layers in ("all", "equal")
    )
    assert all_layers == equal
    assert any("layers.*" in module for module in equal.by_module)


# Values.


def test_integers_of_the_batch_keep_their_values() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
        rows, lengths = batch
        assert lengths.tolist() == [1, 3]
        assert int(lengths.max()) == 3
        assert lengths.cpu().sum().item() == 4
        train(model, optimizer, rows[lengths > 1].expand(1024, 16))

    picked = peak(step, batch=(ROWS[:2], torch.tensor([1, 3])))
    given = peak(lambda model, optimizer, b: train(model, optimizer, b.expand(1024, 16)), batch=ROWS[:1])
    assert 0 < picked - given < 8192


def test_numbers_that_are_read_are_one_and_finite() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> str:
        loss = model(batch).sum()
        assert torch.isfinite(loss)
        assert not torch.isnan(loss).any()
        assert loss.item() == float(loss) == loss.tolist() == 1.0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return f"{loss:.3f} {loss.item():.2f} {round(loss.item(), 2)}"

    assert any("floating-point" in item for item in predict(step, Model(), ROWS, gpu=CARD, optimizer=adamw).leaves_out)
    assert not any("floating-point" in item for item in predict(train, Model(), ROWS, gpu=CARD, optimizer=adamw).leaves_out)


def test_a_number_that_was_read_never_becomes_a_size() -> None:
    read = Reading(1.0)
    for number in (read, 2 * read, read**2 - 1, -read / 3):
        assert isinstance(number, Reading)
        for make in (int, round, math.ceil, math.floor, math.trunc):
            with pytest.raises(RuntimeError):
                make(number)


def test_the_worst_case_selects_everything() -> None:
    def select(x: Tensor) -> Tensor:
        return x[x > 0] + x.masked_select(x > 0)

    with pytest.raises(UntraceableError) as caught:
        peak(model=Model(select))
    assert "worst_case=True" in caught.value.hint
    prediction = predict(train, Model(select), ROWS, gpu=CARD, optimizer=adamw, worst_case=True)
    assert any("worst case" in item for item in prediction.leaves_out)
    assert peak(worst_case=True) == peak()


# What is left out is said.


def test_memory_that_grows_is_said() -> None:
    kept: list[Tensor] = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        train(model, optimizer, batch)
        kept.append(torch.zeros(1 << 20))

    leaves_out = predict(step, Model(), ROWS, gpu=CARD, optimizer=adamw).leaves_out
    assert any("each keeps 4.0 MiB more" in item for item in leaves_out)
    assert not any(
        "more than the one before" in item for item in predict(train, Model(), ROWS, gpu=CARD, optimizer=adamw).leaves_out
    )


def test_kernels_that_nobody_knows_are_said() -> None:
    images = torch.zeros(2, 3, 16, 16)
    prediction = predict(train, nn.Conv2d(3, 4, 3), images, gpu=CARD, optimizer=adamw)
    assert "the workspaces that cuDNN picks for convolutions" in prediction.leaves_out
    assert not any("patch embedding" in item for item in prediction.leaves_out)
    assert prediction.error_bound > 0.01
    recurrent = predict(
        lambda m, o, b: train(lambda x: m(x)[0], o, b), nn.LSTM(16, 8), torch.zeros(3, 2, 16), gpu=CARD, optimizer=adamw
    )
    assert any("recurrent" in item for item in recurrent.leaves_out)


def test_optimizers_choose_as_on_a_gpu() -> None:
    """AdamW works on lists of tensors there, with temporaries as large as all of them; on the CPU on one after the other."""
    model, batch = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))), torch.zeros(1, 256)
    chosen, lists, loop = (
        predict(train, model, batch, gpu=CARD, optimizer=lambda p, f=f: torch.optim.AdamW(p, foreach=f)).phases
        for f in (None, True, False)
    )
    assert chosen == lists
    assert chosen != loop


# Refusals.

UNTRACEABLE: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "nonzero": (lambda x: x * x.nonzero().sum(), "aten.nonzero gives a tensor whose shape depends on values", "worst_case"),
    "boolean index": (lambda x: x[x > 0], "aten.index.Tensor gives a tensor whose shape", "worst_case"),
    "unique": (lambda x: x.unique(), "aten._unique2 gives a tensor whose shape", "worst_case"),
    "size": (lambda x: x.new_ones(int(x.sum().item())), "it reads a value", "shapes"),
    "size by int": (lambda x: x.new_ones(int(x.sum())), "it reads a value", "shapes"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "it reads a value", "shapes"),
    "argument of the maximum": (lambda x: x[x.argmax().item() :], "it reads a value", "shapes"),
    "NumPy": (lambda x: x + torch.from_numpy(x.detach().numpy()), "it asks for a tensor's memory", "NumPy"),
    "NumPy's own": (lambda x: x + np.asarray(x.detach()).sum(), "it asks for a tensor's memory", "NumPy"),
    "operator": (lambda x: torch.ops.oomph_tests.plain(x), "oomph_tests.plain has no kernel for fake tensors", "register_fake"),
    "custom operator": (lambda x: custom(x), "oomph_tests.custom has no kernel for fake tensors", "register_fake"),
    "GPU": (lambda x: x * torch.cuda.current_device(), "it asks for a GPU", "leave out"),
}


@torch.library.custom_op("oomph_tests::custom", mutates_args=())
def custom(x: Tensor) -> Tensor:
    """An operator without a fake kernel."""
    return x.clone()


@pytest.fixture(scope="module", autouse=True)
def _plain_operator() -> Any:
    library = torch.library.Library("oomph_tests", "FRAGMENT")
    library.define("plain(Tensor x) -> Tensor")
    library.impl("plain", lambda x: x.clone(), "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_fake_tensors_cannot_do_is_explained(name: str) -> None:
    function, what, hint = UNTRACEABLE[name]
    with pytest.raises(UntraceableError) as caught:
        peak(model=Model(function))
    (problem,) = caught.value.problems
    line = function.__code__.co_firstlineno
    assert problem.startswith(f"tail ({__file__}, line {line}) cannot be traced: ")
    assert what in problem
    assert hint in caught.value.hint
    assert caught.value.__cause__ is not None


def test_a_place_is_the_module_and_the_line_of_the_code_that_called() -> None:
    def step(model: nn.Module, batch: Tensor) -> None:
        model(batch).numpy()

    with pytest.raises(UntraceableError, match=rf"the step \({__file__}, line {step.__code__.co_firstlineno + 1}\)"):
        predict(step, Model(), ROWS, gpu=CARD)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [(lambda x: x @ x.new_ones(3, 3), RuntimeError, "must have same reduction dim"), (lambda x: {}["x"], KeyError, "'x'")],
)
def test_errors_of_the_steps_own_stay_its_own(function: Callable[[Tensor], Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        peak(model=Model(function))
    assert not isinstance(caught.value, UserError)
    assert f"raised in tail ({__file__}, line {function.__code__.co_firstlineno})" in caught.value.__notes__[0]


def make_lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4))


def make_locked() -> nn.Module:
    model = Model()
    model.lock = threading.Lock()
    return model


def make_hooked() -> nn.Module:
    model = Model()
    model.body[0].weight.register_hook(lambda grad: grad)
    return model


class Odd(Tensor):
    """A subclass."""


def make_odd() -> nn.Module:
    model = Model()
    model.register_buffer("odd", torch.zeros(3).as_subclass(Odd))
    return model


def make_compiled() -> nn.Module:
    model = Model()
    model.body.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_lazy, "0.weight has no shape yet: run the model once"),
        (make_locked, "cannot be copied: TypeError: cannot pickle '_thread.lock'"),
        (make_hooked, "body.0.weight has a hook"),
        (make_odd, "odd is a Odd, and only plain dense tensors"),
        (make_compiled, "body is compiled"),
        (lambda: torch.compile(Model(), backend="eager"), "the model is compiled"),
        (lambda: nn.DataParallel(Model()), "the model is a DataParallel, which needs its GPUs: pass the module inside it"),
        (lambda: torch.jit.trace(nn.Linear(16, 4), ROWS), "TorchScript"),
        (lambda: "model", "the model is a str, not an nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_models_that_cannot_be_traced_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        peak(model=make())
    assert words in caught.value.render()


def test_arguments_are_checked_at_once() -> None:
    made = torch.optim.SGD(Model().parameters(), lr=0.1)
    with pytest.raises(UserError) as caught:
        predict("step", Model(), ROWS, gpu=CARD, optimizer=made, steps=1, layers="some")  # type: ignore[arg-type]
    assert [problem.split()[1] for problem in caught.value.problems] == ["step", "optimizer", "is", "is"]
    assert "lambda parameters: SGD(parameters" in caught.value.render()
    with pytest.raises(UserError, match="`H1000` is not in the catalogue"):
        peak(gpu="H1000")
    with pytest.raises(UserError, match="optimizer= gave a list"):
        peak(optimizer=list)


def test_weights_and_optimizers_from_elsewhere_are_refused() -> None:
    model, head = Model(), nn.Linear(8, 2)
    outside = torch.optim.AdamW(model.parameters())

    def with_head(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        train(lambda x: head(model(x)), optimizer, batch)

    def with_optimizer(model: nn.Module, batch: Tensor) -> None:
        train(model, outside, batch)

    with pytest.raises(UserError, match=r"a parameter of shape \[2, 8\] that is not in the model"):
        peak(with_head, model)
    with pytest.raises(UserError, match=r"calls an optimizer \(AdamW\) over parameters that are not those of its model"):
        predict(with_optimizer, model, ROWS, gpu=CARD)
    assert head.weight.grad is None
    both = nn.ModuleDict({"model": model, "head": head})
    assert peak(lambda m, o, b: train(lambda x: m["head"](m["model"](x)), o, b), both)


def test_other_tensors_from_elsewhere_are_inputs() -> None:
    table = torch.zeros(1 << 18)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        train(model, optimizer, batch + table[:16])

    assert (1 << 20) <= peak(step) - peak() < (1 << 20) + 4096


def test_a_step_that_ends_early_is_refused() -> None:
    def forward_only(model: nn.Module, batch: Tensor) -> Tensor:
        return F.relu(model(batch)).sum()

    with pytest.raises(UserError, match="returns a tensor with a graph and never calls backward"):
        predict(forward_only, Model(), ROWS, gpu=CARD)
    with pytest.raises(UserError, match="the optimizer never stepped in 2 steps"):
        peak(lambda model, optimizer, batch: model(batch).sum().backward())
    calls = iter(range(1, 100))

    def every_other(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        model(batch).sum().backward()
        if next(calls) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()

    assert peak(every_other, steps=4)


def test_a_plan_says_the_line_too() -> None:
    model = Model(lambda x: {}["x"])
    with pytest.raises(KeyError) as caught:
        model(ROWS)
    (problem,) = untraceable(caught.value, model, "the model").problems
    line = model.tail.function.__code__.co_firstlineno
    assert problem == f"tail ({__file__}, line {line}) cannot be traced: KeyError: 'x'"


# Names.


def test_the_package_offers_it() -> None:
    prediction = oomph.predict(train, Model(), ROWS, gpu="a100-40gb", optimizer=adamw)
    assert prediction == predict(train, Model(), ROWS, gpu=CARD, optimizer=adamw)
    text = oomph.render(prediction, color=False)
    assert text.startswith("  fits: ")
    assert max(map(len, text.splitlines())) <= 80
    with pytest.raises(TypeError, match="a str cannot be rendered"):
        oomph.render("text")  # type: ignore[arg-type]


def test_a_failing_request_is_shown() -> None:
    with torch.device("meta"):
        model = nn.Linear(1 << 17, 1 << 17)
    prediction = oomph.predict(train, model, torch.zeros(1, 1 << 17), gpu=CARD, optimizer=adamw)
    assert not prediction.fits
    assert prediction.failing_request
    text = oomph.render(prediction)
    assert "does not fit: 64.00 GiB is asked for where" in text
    assert "a weight" in text


def test_a_prediction_travels() -> None:
    prediction = predict(train, Model(), ROWS, gpu=CARD, optimizer=adamw)
    assert oomph.Prediction.from_json(prediction.to_json()) == prediction
