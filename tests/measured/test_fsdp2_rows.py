"""The layout of one rank against torch's own FSDP2: peak and end of every segment to the byte, and the order in between.

`fsdp2.json` has what real training steps allocated, on the CPU over gloo. Running this file measures that anew.
"""

import functools
import gc
import itertools
import json
import os
import re
import sys
import time
import types
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, PhiConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

from oomph.core.closed_form import ClosedForm, constant_form
from oomph.core.events import Events
from oomph.core.layout import Shape, compose
from oomph.core.sharding import FsdpSettings, shard
from oomph.live.batch import Images, images_of
from oomph.live.checkpointing import apply_checkpointing
from oomph.live.cuda_rules import as_unwatched
from oomph.live.layers import find_stacks
from oomph.live.model import build, compose_llava
from oomph.live.optimizers import make_optimizer
from oomph.live.simulate import Setup, Simulator
from oomph.live.step import LOSSES, train_step
from oomph.live.tensors import tensors_in
from oomph.records import Choice

DATA = Path(__file__).with_name("fsdp2.json")
SMALLEST = 17
WHOLE = 1 << 20

# Models.

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 515, "num_hidden_layers": 2}


def llama(tied: bool = False) -> PretrainedConfig:
    return LlamaConfig(intermediate_size=98, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES)


def llava() -> PretrainedConfig:
    tower = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=56, patch_size=14, **tower)
    return compose_llava(vision, PhiConfig(intermediate_size=96, num_key_value_heads=4, **SIZES), -2, "patch")


def moe() -> PretrainedConfig:
    sizes: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    return Qwen3MoeConfig(num_key_value_heads=2, **SIZES, **sizes)


@dataclass(frozen=True)
class Trained:
    """A model and how it is trained on one GPU; `only` matches the names of the parameters that train."""

    config: Callable[[], PretrainedConfig]
    dtype: torch.dtype
    optimizer: Any
    only: str = "."
    checkpointing: Any = "none"
    loss: Any = "full"

    def model(self) -> PreTrainedModel:
        """On the ``meta`` device."""
        model = build(self.config(), self.dtype, "sdpa")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(re.search(self.only, name)))
        return model

    def images(self) -> Images | None:
        return images_of(self.config(), None) if self.config is llava else None

    @property
    def shape(self) -> Shape:
        return Shape(2, 40, 2 if self.config is llava else 0)

    @cache  # noqa: B019 - a handful of them, as long as the tests
    def form(self) -> ClosedForm:
        """The step as traced on fake tensors, as the tracer sees it on the CPU."""
        knobs = "sdpa", self.loss, self.optimizer, self.checkpointing, self.checkpointing
        setup = Setup(*knobs, None, precision="bfloat16" if self.dtype is HALF else "float32")  # type: ignore[arg-type]
        return constant_form(Simulator(self.model(), setup, WHOLE, self.images()).trace(self.shape))


HALF, SINGLE = torch.bfloat16, torch.float32
NOT_TOWER = r"^(?!.*vision_tower)"
STEPS = {
    "LLaVA": Trained(llava, SINGLE, "adamw-foreach"),
    "LLaVA, frozen tower, recomputed": Trained(llava, HALF, "adamw-fused", NOT_TOWER, "blocks"),
    "LLaVA, frozen patches": Trained(llava, HALF, "adamw-foreach", "layers|language|head|projector"),
    "LLaVA, projector alone, shifted loss": Trained(llava, SINGLE, "adamw-foreach", "projector", loss="full-shifted"),
    "Llama, frozen embedding, recomputed": Trained(llama, SINGLE, "adamw-loop", "layers|head", "blocks"),
    "Llama, some weights of each layer": Trained(llama, HALF, "adamw-foreach", "q_proj|norm"),
    "Llama, tied, chunked loss": Trained(functools.partial(llama, True), HALF, "adamw-foreach", loss="chunked"),
    "Qwen3-MoE": Trained(moe, HALF, "adamw-fused"),
}


@dataclass(frozen=True)
class Run:
    """A step on several ranks."""

    step: str
    sharding: Any
    gpus: int
    nodes: int = 1
    accumulation: int = 1
    masters: bool = False

    def choice(self) -> Choice:
        trained, samples = STEPS[self.step], STEPS[self.step].shape.samples
        return Choice(
            micro_batch=samples,
            accumulation=self.accumulation,
            effective_batch=samples * self.accumulation * self.gpus,
            gpus=self.gpus,
            nodes=self.nodes,
            checkpointing=trained.checkpointing,
            loss=trained.loss,
            precision="bfloat16" if trained.dtype is HALF else "float32",
            optimizer=trained.optimizer,
            master_weights=self.masters,
            sharding=self.sharding,
        )


RUNS = [
    Run("LLaVA", "fsdp2", 2, accumulation=2),
    Run("LLaVA", "fsdp2", 3),
    Run("LLaVA", "fsdp2-no-reshard", 2, accumulation=3),
    Run("LLaVA", "fsdp2-hybrid", 4, 2, accumulation=2),
    Run("LLaVA, frozen tower, recomputed", "fsdp2", 2, accumulation=2, masters=True),
    Run("LLaVA, frozen tower, recomputed", "fsdp2", 4),
    Run("LLaVA, frozen tower, recomputed", "fsdp2-no-reshard", 2, masters=True),
    Run("LLaVA, frozen tower, recomputed", "fsdp2-hybrid", 4, 2, accumulation=2, masters=True),
    Run("LLaVA, frozen patches", "fsdp2", 2),
    Run("LLaVA, projector alone, shifted loss", "fsdp2", 2, accumulation=2),
    Run("Llama, frozen embedding, recomputed", "fsdp2", 2, accumulation=2),
    Run("Llama, frozen embedding, recomputed", "fsdp2-no-reshard", 4),
    Run("Llama, some weights of each layer", "fsdp2", 2, masters=True),
    Run("Llama, tied, chunked loss", "fsdp2", 2, accumulation=2),
    Run("Llama, tied, chunked loss", "fsdp2", 4, masters=True),
    Run("Qwen3-MoE", "fsdp2", 4, accumulation=2, masters=True),
    Run("Qwen3-MoE", "fsdp2-no-reshard", 2),
]


def laid_out(run: Run, rank: int) -> Events:
    trained = STEPS[run.step]
    form = trained.form()
    alone = compose(form, trained.shape, run.accumulation, trained.shape)
    return shard(alone, form.parameters, run.choice(), FsdpSettings(rank % (run.gpus // run.nodes)))


# Comparing.

Changes = dict[str, list[int]]
"""Sizes of births and, negative, of deaths in each segment."""


def changes(events: Events) -> Changes:
    """Of the layout, without what the copy into a reduction's input needs on a GPU alone."""
    found: Changes = {}
    for segment in events.segments:
        sizes = found.setdefault(segment.name, [])
        for entry in list(segment.timeline) * segment.repeat:
            storage = entry if entry >= 0 else ~entry
            if events.kinds[storage].op != "fsdp2.chunk_cat":
                sizes.append(events.sizes[storage] if entry >= 0 else -events.sizes[storage])
    return found


def peaks(found: Changes) -> dict[str, list[int]]:
    """The most that was alive in each segment, and what is at its end."""
    live, result = 0, {}
    for name, sizes in found.items():
        totals = list(accumulate(sizes, initial=live))
        live = totals[-1]
        result[name] = [max(totals), live]
    return result


def orders(found: Changes) -> dict[str, int]:
    """A check sum of each segment's births and deaths; the order of deaths between two births does not matter.

    An evaluation's deaths are left out: the layout frees what is gathered at its end.
    """
    result = {}
    for name, sizes in found.items():
        seen: list[int] = []
        dead: list[int] = []
        for size in sizes:
            if size <= -SMALLEST and name != "evaluate":
                dead.append(size)
            elif size >= SMALLEST:
                seen += [*sorted(dead), size]
                dead = []
        result[name] = zlib.crc32(",".join(map(str, seen + sorted(dead))).encode())
    return result


ROWS = json.loads(DATA.read_text(encoding="utf-8"))["rows"] if DATA.exists() else []


def label(row: dict[str, Any]) -> str:
    return f"{row['run']['step']}, {row['run']['sharding']}, rank {row['rank']} of {row['run']['gpus']}"


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_one_rank_needs_what_torchs_fsdp2_needs(row: dict[str, Any]) -> None:
    found = changes(laid_out(Run(**row["run"]), row["rank"]))
    ours, real = peaks(found), row["bytes"]
    assert list(ours) == list(real)
    assert ours["load"][1] == real["load"][1]
    assert ours["evaluate"][0] == real["evaluate"][0]
    for name in ours.keys() - {"load", "evaluate"}:
        assert ours[name] == real[name], name
    assert {name: code for name, code in orders(found).items() if name != "load"} == row["order"]


def test_all_runs_are_there() -> None:
    assert {json.dumps(vars(run)) for run in RUNS} == {json.dumps(row["run"]) for row in ROWS}


def test_the_page_says_how_many(root: Path) -> None:
    assert f"In {len(ROWS)} layouts, of the first and the last rank" in (root / "docs" / "sharding.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("row", ROWS[:1], ids=label)
def test_a_change_of_the_layout_is_seen(row: dict[str, Any]) -> None:
    found = changes(laid_out(Run(**row["run"]), row["rank"]))
    sizes = found["step/next"]
    at = next(at for at, size in enumerate(sizes) if size > SMALLEST)
    found["step/next"] = [*sizes[:at], sizes[at] + 1, *sizes[at + 1 :]]
    assert orders(found)["step/next"] != row["order"]["step/next"]
    assert peaks(found)["step/next"] != row["bytes"]["step/next"]


# Measuring.

LATE = 0.02
"""Seconds in which gloo's threads let go of the tensor of a collective that has ended."""


class Watch(TorchDispatchMode):
    """Notes births and deaths of storages, with segments as they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Changes = {"load": []}
        self._sizes = self.found["load"]
        self._live: dict[int, tuple[list[int], weakref.ref[Any]]] = {}

    def begin(self, name: str) -> None:
        gc.collect()
        self._sizes = self.found.setdefault(name, [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch calls operators on local tensors, which come here
        func, args = as_unwatched(func, args, kwargs or {})
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional":
            time.sleep(LATE)
        # What `split` is the first to show is gloo's own copy.
        if func is not torch.ops.aten.split.Tensor:
            for tensor in tensors_in(outputs):
                if type(tensor) in (torch.Tensor, nn.Parameter):
                    self._born(tensor.untyped_storage())
        return outputs

    def _born(self, storage: Any) -> None:
        if storage._cdata not in self._live:
            size = [storage.nbytes()]
            self._live[storage._cdata] = size, weakref.ref(storage, functools.partial(self._died, storage._cdata))
            self._note(size[0])

    def _died(self, key: int, _: object) -> None:
        self._note(-self._live.pop(key)[0][0])

    def resized(self, storage: Any) -> None:
        """FSDP2 frees and allocates gathered parameters by resizing their storages, which no operator does."""
        size = self._live[storage._cdata][0]
        self._note(storage.nbytes() - size[0])
        size[0] = storage.nbytes()

    def _note(self, change: int) -> None:
        if change:
            self._sizes.append(change)


def watch_fsdp(watch: Watch) -> Callable[[], None]:
    """Lets the watch see resized storages, and gloo let go of tensors at once; returns what undoes that."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def noting(resize: Any) -> Any:
        def call(tensor: Any) -> None:
            resize(tensor)
            watch.resized(tensor.untyped_storage())

        return call

    def exclusive(function: Any) -> Any:
        def call(comm: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            storages = [tensor.untyped_storage()._cdata for tensor in tensors]
            owners = [torch._C._storage_Use_Count(storage) for storage in storages]
            result = function(comm, *args, **kwargs)
            while any(torch._C._storage_Use_Count(s) > before for s, before in zip(storages, owners, strict=True)):
                time.sleep(LATE / 100)
            return result

        return call

    patched = [(_fsdp_param, name, noting) for name in ("alloc_storage", "free_storage")]
    patched += [(kind, "__call__", exclusive) for kind in (collectives.DefaultAllGather, collectives.DefaultReduceScatter)]
    before = [(where, name, getattr(where, name)) for where, name, _ in patched]
    for where, name, wrap in patched:
        setattr(where, name, wrap(getattr(where, name)))
    return lambda: [setattr(*item) for item in before] and None  # type: ignore[func-returns-value]


def sharded_model(run: Run) -> PreTrainedModel:
    """On the ``meta`` device: ``fully_shard`` on every layer of every stack, then on the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = STEPS[run.step].model()
    names, sizes = ("replicate", "shard"), (run.nodes, run.gpus // run.nodes)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names) if run.nodes > 1 else init_device_mesh("cpu", (run.gpus,))
    policy = MixedPrecisionPolicy(HALF, SINGLE) if run.masters else MixedPrecisionPolicy()
    for parameter in model.parameters():
        if run.masters and parameter.requires_grad:
            parameter.data = parameter.data.float()
    again = run.sharding != "fsdp2-no-reshard"
    for layer in (layer for _, layers in find_stacks(model) for layer in layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if again else False, mp_policy=policy)
    return model


def loss_of(model: PreTrainedModel, name: str) -> Any:
    """A loss that calls the layers without the model becomes a forward of the model, for FSDP2's hooks."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if name != "chunked":
        return LOSSES[name]
    model.whole_loss = types.MethodType(LOSSES[name], model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "whole_loss")
    return lambda model, batch, count: model.whole_loss(batch, count)


def measured(run: Run) -> Changes:
    trained, images = STEPS[run.step], STEPS[run.step].images()
    samples, tokens, count = trained.shape
    last = trained.config().get_text_config().vocab_size - 1

    def collate() -> dict[str, torch.Tensor]:
        batch = {name: torch.empty((samples, tokens), dtype=torch.long).random_(0, last) for name in ("input_ids", "labels")}
        if images is not None:
            batch["input_ids"][:, : images.tokens * count // samples] = last
            batch |= images.inputs(count, trained.dtype)
            batch["pixel_values"].normal_()
        return batch

    model, watch = sharded_model(run), Watch()
    undo = watch_fsdp(watch)
    with watch:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().normal_(std=0.02)
            for buffer in model.buffers():
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
        apply_checkpointing(model, trained.checkpointing, trained.checkpointing)
        loss, optimizer = loss_of(model, trained.loss), make_optimizer(model, trained.optimizer)
        for step in ("warmup", "step"):
            parts = {"forward": lambda index: "next" if index else "first", "optimizer": lambda _: "optimizer"}

            def on(phase: str, index: int, step: str = step, parts: Any = parts) -> None:
                if phase in parts:
                    watch.begin(f"{step}/{parts[phase](index)}")

            train_step(model, optimizer, [collate] * run.accumulation, loss, samples * tokens, on=on)
        watch.begin("evaluate")
        model.eval()
        with torch.no_grad():
            loss(model, collate(), samples * tokens)
    undo()
    return watch.found


def rank_of_all(rank: int, gpus: int, queue: Any) -> None:
    """Every run on that number of ranks, in one process for each rank."""
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    dist.init_process_group("gloo", rank=rank, world_size=gpus)
    for number, run in enumerate(RUNS):
        if run.gpus == gpus:
            found = measured(run)
            dist.barrier()
            if rank in (0, gpus - 1):
                order = {name: code for name, code in orders(found).items() if name != "load"}
                queue.put((number, {"run": vars(run), "rank": rank, "bytes": peaks(found), "order": order}))
    dist.destroy_process_group()


def rows() -> Iterator[tuple[int, dict[str, Any]]]:
    context = torch.multiprocessing.get_context("spawn")
    for gpus in sorted({run.gpus for run in RUNS}):
        queue = context.SimpleQueue()
        processes = [context.Process(target=rank_of_all, args=(rank, gpus, queue)) for rank in range(gpus)]
        for process in processes:
            process.start()
        yield from itertools.islice(iter(queue.get, None), 2 * sum(run.gpus == gpus for run in RUNS))
        for process in processes:
            process.join()


def main() -> None:
    import transformers

    found = sorted(rows(), key=lambda row: (row[0], row[1]["rank"]))
    data = {
        "made_with": f"torch {torch.__version__} (fully_shard over gloo, on the CPU), transformers {transformers.__version__}",
        "counted": "tensor storages, by a dispatch mode and by FSDP2's resizing of storages; [peak, end] of each segment; "
        f"order is the CRC-32 of the sizes of births and, negative, of deaths, of {SMALLEST} bytes or more, deaths between "
        "two births in ascending order, those of an evaluation left out",
        "rows": [row for _, row in found],
    }
    text = json.dumps(data, indent=1)
    DATA.write_text(re.sub(r"\n {4,}|\n {3}(?=\})", " ", text) + "\n", encoding="utf-8")
    print(f"{len(found)} rows in {DATA.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
