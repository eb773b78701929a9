import copy
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.core.events import Events, Kind, Segment
from oomph.core.sharding import DdpSettings, Parameter, ZeroSettings, shard, static_bytes
from oomph.core.zero3 import visits
from oomph.records import Choice

VARIANTS = ("ddp", "zero1", "zero2", "zero3")
ROLES = ("weight", "gradient", "optimizer", "communication")
H = 8


def choice(sharding, gpus=4, accumulation=1, optimizer="adamw-foreach"):
    return Choice(1, accumulation, gpus * accumulation, gpus, sharding=sharding, optimizer=optimizer)


def settings_of(sharding, **values):
    small = {"reduce_bucket_elements": 80, "prefetch_elements": 70, "persistence_elements": 8}
    return DdpSettings(300, 50) if sharding == "ddp" else ZeroSettings(**{**small, **values})


def model(layers=3, frozen=1, dtype="bfloat16"):
    parameters = [Parameter("embed.weight", (40, H), dtype, True)]
    for layer in range(layers):
        trained = layer >= frozen
        parameters += [
            Parameter(f"layers.{layer}.norm.weight", (H,), dtype, trained),
            Parameter(f"layers.{layer}.fc.weight", (3 * H + 1, H), dtype, trained),
            Parameter(f"layers.{layer}.fc.bias", (3 * H + 1,), dtype, trained),
        ]
    return [*parameters, Parameter("head.weight", (40, H), dtype, True)]


class Toy:
    """A step made by hand: one activation per module in the forward, gradients of input, weight, bias in the backward."""

    def __init__(self, parameters, accumulation=1, checkpointing=False, inputs_need_gradient=True):
        self.events, self.parameters, self.inputs_need_gradient = Events(), parameters, inputs_need_gradient
        self.modules = list(dict.fromkeys(parameter.module for parameter in parameters))
        self.checkpointing = checkpointing
        load = [self.new(p.nbytes, p.module, "load", "weight", n, "load") for n, p in enumerate(parameters)]
        load.append(self.new(48, "rotary", "load", "weight", op="load"))
        self.weights = load
        self.segment("load", load, [])
        for step in ("warmup", "step"):
            self.step(step, accumulation)

    def new(self, nbytes, module, phase, role, parameter=-1, op="aten.op"):
        dtype = "bfloat16" if parameter < 0 else self.parameters[parameter].dtype
        return self.events.add(nbytes, (nbytes,), Kind(op, module, phase, role, dtype), -1, parameter)

    def segment(self, name, timeline, marks, repeat=1):
        self.events.segments.append(Segment(name, timeline, tuple(marks), repeat))

    def step(self, name, accumulation):
        self.alive = {}
        self.micro_batch(f"{name}/first", True, 1, name == "warmup")
        if accumulation > 1:
            self.micro_batch(f"{name}/next", False, accumulation - 1, False)
        timeline = []
        for index in self.alive:
            if name == "warmup":
                timeline += [self.new(self.parameters[index].nbytes, "", "optimizer", "optimizer", index) for _ in range(2)]
            root = self.new(self.parameters[index].nbytes, "", "optimizer", "temporary")
            timeline += [root, ~root]
        timeline += [~storage for storage in self.alive.values()]
        self.segment(f"{name}/optimizer", timeline, [(0, "optimizer")])

    def micro_batch(self, name, first, repeat, workspace):
        batch = self.new(100, "", "forward", "input")
        timeline, saved = [batch], {}
        marks = [(0, "forward")]
        if workspace:
            timeline.append(self.new(999, "", "forward", "workspace"))
        for module in self.modules:
            saved[module] = self.new(64, module, "forward", "activation")
            timeline.append(saved[module])
            if self.checkpointing:
                timeline.append(~saved.pop(module))
        marks.append((len(timeline), "backward"))
        upstream = [self.new(64, "", "backward", "temporary")]
        timeline += upstream
        for module in reversed(self.modules):
            if self.checkpointing:
                saved[module] = self.new(64, module, "recompute", "activation")
                timeline.append(saved[module])
            below = []
            if self.inputs_need_gradient or module != self.modules[0]:
                below = [self.new(64, module, "backward", "temporary")]
            timeline += [*below, *self.gradients(module, first), *(~storage for storage in upstream), ~saved.pop(module)]
            upstream = below
        self.segment(name, [*timeline, *(~storage for storage in upstream), ~batch], marks, repeat)

    def gradients(self, module, first):
        entries = []
        for index, parameter in enumerate(self.parameters):
            if parameter.module != module or not parameter.trainable:
                continue
            storage = self.new(parameter.nbytes, module, "backward", "gradient", index)
            entries.append(storage)
            if first:
                self.alive[index] = storage
        return entries if first else entries + [~storage for storage in entries]


class Walk:
    """The live set along a timeline; fails on a storage that is born twice or freed unborn."""

    def __init__(self, events):
        self.events, self.live, self.bytes, self.peak = events, set(), 0, 0
        self.by_role = Counter()

    def entry(self, entry):
        storage = entry if entry >= 0 else ~entry
        assert 0 <= storage < len(self.events.sizes)
        assert (storage in self.live) == (entry < 0), (self.events.kinds[storage], entry)
        sign = 1 if entry >= 0 else -1
        (self.live.add if entry >= 0 else self.live.remove)(storage)
        self.bytes += sign * self.events.sizes[storage]
        self.by_role[self.events.kinds[storage].role] += sign * self.events.sizes[storage]
        self.peak = max(self.peak, self.bytes)

    def run(self, *names):
        """Runs the segments of these names, all of them without names."""
        for segment in self.events.segments:
            if not names or segment.name in names:
                for _ in range(segment.repeat):
                    for entry in segment.timeline:
                        self.entry(entry)
        return self

    def bytes_of(self, op):
        return sum(self.events.sizes[storage] for storage in self.live if self.events.kinds[storage].op == op)


STEP = ("step/first", "step/next", "step/optimizer")


def resident(events):
    """By role, when the steady step's optimizer begins; without the model's buffers."""
    walk = Walk(events).run("load", "warmup/first", "warmup/next", "warmup/optimizer", "step/first", "step/next")
    buffers = sum(events.sizes[s] for s in walk.live if events.kinds[s].op == "load" and events.parameters[s] < 0)
    return {role: walk.by_role[role] - (buffers if role == "weight" else 0) for role in ROLES}


def check_consistent(source, sharded):
    columns = (sharded.sizes, sharded.shapes, sharded.kinds, sharded.layers, sharded.parameters)
    assert len({len(column) for column in columns}) == 1
    assert all(nbytes >= 0 for nbytes in sharded.sizes)
    assert list(dict.fromkeys(s.name for s in sharded.segments)) == [s.name for s in source.segments]
    for old in source.segments:
        new = [segment for segment in sharded.segments if segment.name == old.name]
        assert sum(segment.repeat for segment in new) == old.repeat
        for segment in new:
            assert [phase for _, phase in segment.marks] == [phase for _, phase in old.marks]
            assert all(0 <= position <= len(segment.timeline) for position, _ in segment.marks)
    walk = Walk(sharded).run()
    after = set(walk.live)
    assert walk.run(*STEP).live == after
    warmed = Walk(sharded).run("load", "warmup/first", "warmup/next", "warmup/optimizer")
    assert warmed.live == after


@pytest.mark.parametrize("sharding", VARIANTS)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach", "adamw-loop"])
def test_storages_are_conserved_and_a_step_repeats(sharding, accumulation, checkpointing, optimizer):
    toy = Toy(model(), accumulation, checkpointing, inputs_need_gradient=optimizer != "adamw-loop")
    before = copy.deepcopy(toy.events)
    out = shard(toy.events, toy.parameters, choice(sharding, 4, accumulation, optimizer), settings_of(sharding))
    assert toy.events == before
    check_consistent(toy.events, out)


@pytest.mark.parametrize("sharding", VARIANTS)
@pytest.mark.parametrize("gpus", [2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_resident_bytes_are_those_of_the_closed_arithmetic(sharding, gpus, accumulation, dtype):
    toy = Toy(model(dtype=dtype), accumulation)
    asked = choice(sharding, gpus, accumulation)
    out = shard(toy.events, toy.parameters, asked, settings_of(sharding))
    assert resident(out) == static_bytes(toy.parameters, asked, settings_of(sharding))


def test_without_sharding_the_input_comes_back_and_agrees_with_the_closed_arithmetic():
    toy = Toy(model())
    assert shard(toy.events, toy.parameters, choice("none", 1)) is toy.events
    assert resident(toy.events) == static_bytes(toy.parameters, choice("none", 1))


shapes = st.one_of(
    st.tuples(st.integers(1, 30)), st.tuples(st.integers(1, 30), st.integers(1, 9)), st.tuples(*[st.integers(1, 4)] * 3)
)
lists = st.lists(st.tuples(shapes, st.booleans()), min_size=1, max_size=9).filter(lambda items: any(t for _, t in items))


@settings(max_examples=150, deadline=None)
@given(
    items=lists,
    sharding=st.sampled_from(VARIANTS),
    gpus=st.integers(2, 9),
    accumulation=st.integers(1, 3),
    checkpointing=st.booleans(),
    sizes=st.tuples(*[st.integers(0, 200)] * 6),
    flags=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
def test_any_parameter_list(items, sharding, gpus, accumulation, checkpointing, sizes, flags, data):
    parameters = [Parameter(f"m{n // 2}.p{n}", shape, "bfloat16", trained) for n, (shape, trained) in enumerate(items)]
    toy = Toy(parameters, accumulation, checkpointing)
    asked = choice(sharding, gpus, accumulation)
    zero = ZeroSettings(
        sizes[0],
        2 * sizes[1] + 2,
        flags[0],
        flags[1],
        data.draw(st.integers(0, gpus - 1)),
        *sizes[2:6],
        sub_group_elements=sizes[1] + 1,
    )
    chosen = DdpSettings(sizes[0] + 1, sizes[1] + 1, *flags) if sharding == "ddp" else zero
    out = shard(toy.events, parameters, asked, chosen)
    check_consistent(toy.events, out)
    assert resident(out) == static_bytes(parameters, asked, chosen)


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_stage_keeps_no_more_than_the_one_before(gpus, accumulation):
    toy = Toy(model(6, 0), accumulation)
    kept = [
        sum(resident(shard(toy.events, toy.parameters, choice(s, gpus, accumulation), settings_of(s))).values())
        for s in reversed(VARIANTS)
    ]
    assert kept == sorted(kept)
    assert len(set(kept)) == len(kept)


def trajectory(events, name, op):
    """Bytes of the storages of one op along a segment of the steady step, and the position of the backward in it."""
    walk = Walk(events).run("load", "warmup/first", "warmup/next", "warmup/optimizer")
    for segment in events.segments:
        if segment.name.startswith("step/"):
            values = []
            for _ in range(segment.repeat):
                for entry in segment.timeline:
                    values.append(walk.bytes_of(op))
                    walk.entry(entry)
            if segment.name == name:
                return values, dict((phase, at) for at, phase in segment.marks)["backward"]
    raise AssertionError(name)


def test_zero2_has_its_gradient_partition_from_the_first_reduction_it_owns():
    toy = Toy(model(4, 0), 2)
    first = {}
    for rank in range(4):
        out = shard(toy.events, toy.parameters, choice("zero2", 4, 2), settings_of("zero2", rank=rank))
        asked = settings_of("zero2", rank=rank)
        partition = static_bytes(toy.parameters, choice("zero2", 4, 2), asked)["gradient"]
        values, backward = trajectory(out, "step/first", "zero.gradient_partition")
        assert set(values) == {0, max(values)}
        assert partition - 2 * 8 <= max(values) <= partition
        assert values[backward] == 0
        first[rank] = values.index(max(values))
        values, _ = trajectory(out, "step/next", "zero.gradient_partition")
        assert set(values) == {max(values)}
        fresh, backward = trajectory(out, "step/next", "zero.new_gradient_partition")
        assert set(fresh) == {0, max(values)}
        assert fresh[backward] == 0
    assert all(later > earlier for later, earlier in pairwise(first[rank] for rank in range(4)))


@pytest.mark.parametrize("overlap", [False, True])
def test_zero2_has_its_reduction_buffers_in_the_backward_only(overlap):
    toy = Toy(model(), 2, checkpointing=True)
    out = shard(toy.events, toy.parameters, choice("zero2", 4, 2), settings_of("zero2", overlap_comm=overlap))
    for name in ("step/first", "step/next"):
        values, backward = trajectory(out, name, "zero.ipg_bucket")
        assert set(values[: backward + 1]) == {0}
        assert max(values) == (2 if overlap else 1) * 80 * 2
        assert values[backward + 2] == max(values)


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_gradients_larger_than_the_bucket_wait_for_the_next_hook(sharding):
    toy = Toy([Parameter(f"m{n}.weight", (10, 10), "bfloat16", True) for n in range(6)], 2)
    peaks = {}
    for bucket in (99, 100, 101):
        asked = settings_of(sharding, reduce_bucket_elements=bucket, rank=0)
        out = shard(toy.events, toy.parameters, choice(sharding, 5, 2), asked)
        for segment in out.segments:
            whole, most = 0, 0
            for entry in segment.timeline:
                storage = entry if entry >= 0 else ~entry
                if out.kinds[storage].role == "gradient" and out.parameters[storage] >= 0:
                    whole += 1 if entry >= 0 else -1
                    most = max(most, whole)
            assert whole == 0
            peaks[segment.name, bucket] = most
    exact = 1 if sharding == "zero2" else 2
    for name in ("step/first", "step/next"):
        assert [peaks[name, bucket] for bucket in (99, 100, 101)] == [2, exact, 1]


def step_peak(out):
    """Bytes above what was alive when the steady optimizer step began."""
    walk = Walk(out).run("load", "warmup/first", "warmup/next", "warmup/optimizer", "step/first", "step/next")
    walk.peak = start = walk.bytes
    return walk.run("step/optimizer").peak - start


@pytest.mark.parametrize(("optimizer", "temporaries"), [("adamw-fused", 0), ("adamw-foreach", 1), ("adamw-loop", 2)])
def test_zero2_transients_of_the_step(optimizer, temporaries):
    parameters = [Parameter(f"m{n}.weight", (16, 10), "bfloat16", True) for n in range(16)]
    toy = Toy(parameters)
    n = 160 * 16 // 8
    flatten = 2 * n + 4 * n
    updating = 4 * n + 4 * n * temporaries - 2 * n
    for pieces in (1, 4):
        asked = settings_of("zero2", allgather_bucket_elements=8 * n // pieces)
        out = shard(toy.events, parameters, choice("zero2", 8, 1, optimizer), asked)
        assert step_peak(out) == max(4 * 160, flatten, updating, 2 * n * 8 // pieces - 2 * n)


def test_zero3_reduces_a_single_gradient_in_place_where_the_ranks_divide_it():
    toy = Toy([Parameter(f"m{n}.weight", (10, 10), "bfloat16", True) for n in range(3)])
    for gpus, copies in ((5, 0), (3, 3)):
        out = shard(toy.events, toy.parameters, choice("zero3", gpus), settings_of("zero3", reduce_bucket_elements=99))
        first = next(segment for segment in out.segments if segment.name == "step/first")
        assert sum(out.kinds[entry].op == "zero.reduce_scatter" for entry in first.timeline if entry >= 0) == copies


def test_zero1_frees_the_gradients_of_other_ranks_when_they_are_reduced():
    parameters = [Parameter(f"m{n}.weight", (16, 10), "bfloat16", True) for n in range(8)]
    toy = Toy(parameters, 3)
    n = 160 * 8 // 4
    chosen = ZeroSettings(reduce_bucket_elements=320, allgather_bucket_elements=n)
    out = shard(toy.events, parameters, choice("zero1", 4, 3, "adamw-fused"), chosen)
    others = 2 * 160 * 6
    assert step_peak(out) == max(2 * 320, 6 * n - others)
    first = shard(toy.events, parameters, choice("zero1", 4, 3), chosen).segments[1:3]
    assert [list(segment.timeline) for segment in first] == [list(segment.timeline) for segment in toy.events.segments[1:3]]


def test_zero3_transients_of_the_step():
    parameters = [Parameter(f"m{n}.weight", (16, 10), "bfloat16", True) for n in range(8)]
    toy = Toy(parameters)
    n = 160 * 8 // 4
    out = shard(toy.events, parameters, choice("zero3", 4), settings_of("zero3"))
    assert step_peak(out) == max(2 * n + n, 8 * 40, 2 * n + 4 * n, 8 * n)
    halves = settings_of("zero3", sub_group_elements=n // 2)
    out = shard(toy.events, parameters, choice("zero3", 4), halves)
    assert step_peak(out) == max(2 * n + n, 8 * 40, 3 * n, 4 * n)


@pytest.mark.parametrize("reuse", [0, 300, 10**9])
@pytest.mark.parametrize("prefetch", [0, 70, 500])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_zero3_has_weights_gathered_wherever_their_module_computes(reuse, prefetch, checkpointing):
    toy = Toy(model(4, 2), 2, checkpointing)
    needed = Counter()
    for parameter in toy.parameters:
        needed[parameter.module] += parameter.nbytes
    asked = settings_of("zero3", max_reuse_elements=reuse, prefetch_elements=prefetch)
    out = shard(toy.events, toy.parameters, choice("zero3", 4, 2), asked)
    walk, seen = Walk(out), set()
    for segment in out.segments:
        for entry in segment.timeline:
            kind = out.kinds[entry if entry >= 0 else ~entry]
            if entry >= 0 and kind.op == "aten.op" and kind.module in needed:
                there = sum(out.sizes[s] for s in walk.live if out.kinds[s][:2] == ("zero.gathered_parameter", kind.module))
                assert there >= needed[kind.module]
                seen.add((kind.module, kind.phase))
            walk.entry(entry)
        if segment.name not in ("load", "warmup/first"):
            padded = sum(-(-p.numel // 4) * 4 * 2 for p in toy.parameters if p.numel <= 8)
            assert walk.bytes_of("zero.gathered_parameter") == padded
            assert walk.bytes_of("zero.all_gather") == 0
    phases = ("forward", "recompute", "backward") if checkpointing else ("forward", "backward")
    assert seen == {(module, phase) for module in needed for phase in phases}


def gathered_peak(toy, **values):
    out = shard(toy.events, toy.parameters, choice("zero3", 4), settings_of("zero3", persistence_elements=0, **values))
    walk, peak = Walk(out).run("load", "warmup/first", "warmup/optimizer"), 0
    for segment in out.segments:
        if segment.name == "step/first":
            for entry in segment.timeline:
                walk.entry(entry)
                peak = max(peak, walk.bytes_of("zero.gathered_parameter") + walk.bytes_of("zero.all_gather"))
    return peak


def test_zero3_reuse_distance_prefetch_and_live_limit():
    toy = Toy([Parameter(f"m{n}.weight", (16, 10), "bfloat16", True) for n in range(8)])
    one = 2 * 160
    assert gathered_peak(toy, prefetch_elements=0, max_reuse_elements=0) == one
    # One ahead at every call, the model's own included. At the turn the queue skips the last module, which is there.
    assert gathered_peak(toy, prefetch_elements=1, max_reuse_elements=0) == 4 * one
    # Two parameters ahead: their flat tensor and both copies while the first of them waits for the second.
    assert gathered_peak(toy, prefetch_elements=161, max_reuse_elements=0) > 3 * one
    assert gathered_peak(toy, prefetch_elements=161, max_reuse_elements=0, max_live_elements=0) == one
    # Between the two uses of the module k before the last lie 2 k parameters.
    assert gathered_peak(toy, prefetch_elements=0, max_reuse_elements=160 * 6) == 3 * one
    assert gathered_peak(toy, prefetch_elements=0, max_reuse_elements=160 * 6 + 1) == 4 * one
    assert gathered_peak(toy, prefetch_elements=0, max_reuse_elements=10**9) == 8 * one


def test_zero3_releases_a_module_without_input_gradients_only_at_its_next_use_or_the_step():
    toy = Toy(model(2, 0), 2, inputs_need_gradient=False)
    out = shard(
        toy.events, toy.parameters, choice("zero3", 4, 2), settings_of("zero3", prefetch_elements=0, max_reuse_elements=0)
    )
    check_consistent(toy.events, out)
    walk, embed = Walk(out), 2 * 40 * H
    persistent = sum(-(-p.numel // 4) * 4 * 2 for p in toy.parameters if p.numel <= 8)
    expected = {"load": 0, "warmup/first": embed, "warmup/optimizer": persistent, "step/optimizer": persistent}
    for segment in out.segments:
        held = walk.run(segment.name).bytes_of("zero.gathered_parameter")
        assert held == expected.get(segment.name, persistent + embed), segment.name


def test_zero3_prefetches_at_calls_of_modules_without_parameters():
    names = [f"model.layers.{n}.mlp.fc.weight" for n in range(6)]
    toy = Toy([Parameter(name, (16, 10), "bfloat16", True) for name in names], checkpointing=True)
    found = visits(toy.events, toy.events.segments[1].timeline, {name.rpartition(".")[0]: (0,) for name in names})
    # The root and the model, then a layer, its MLP and the linear layer each time; the list of layers is never called.
    called = {phase: [bool(v.members) for v in found if v.phase == phase] for phase in ("forward", "recompute", "backward")}
    assert called["forward"] == [False, False] + [False, False, True] * 6
    assert called["recompute"] == [False, False, True] * 6
    assert called["backward"] == [False] + [False, False, True] * 6


def test_zero3_gathers_in_an_evaluation_too():
    toy = Toy(model())
    activations = [toy.new(64, module, "evaluate", "activation") for module in toy.modules]
    entries = [entry for storage in activations for entry in (storage, ~storage)]
    toy.segment("evaluate", entries, [(0, "evaluate")])
    out = shard(toy.events, toy.parameters, choice("zero3"), settings_of("zero3"))
    gathered = [s for s in out.segments[-1].timeline if s >= 0 and out.kinds[s].op == "zero.gathered_parameter"]
    assert {out.kinds[storage].module for storage in gathered} == {m for m in toy.modules if not m.endswith("norm")}
    before = Walk(out).run(*[segment.name for segment in out.segments[:-1]]).live
    assert Walk(out).run().live == before


def bucket_sizes(events, name):
    walk = Walk(events)
    for segment in events.segments:
        walk.run(segment.name)
        if segment.name == name:
            return [events.sizes[s] for s in sorted(walk.live) if events.kinds[s].op == "ddp.bucket"]
    raise AssertionError(name)


def test_ddp_buckets_are_rebuilt_after_the_first_iteration():
    toy = Toy(model(2, 1), 2)
    out = shard(toy.events, toy.parameters, choice("ddp", 4, 2), settings_of("ddp"))
    head, fc, bias, norm, embed = 2 * 40 * H, 2 * 25 * H, 2 * 25, 2 * H, 2 * 40 * H
    assert bucket_sizes(out, "load") == [head + fc + bias + norm + embed]
    assert bucket_sizes(out, "warmup/next") == [head + fc + bias + norm + embed]
    assert bucket_sizes(out, "warmup/optimizer") == [head, fc, bias + norm + embed]
    out = shard(toy.events, toy.parameters, choice("ddp", 4, 2), DdpSettings(300, 50, find_unused_parameters=True))
    assert bucket_sizes(out, "load") == bucket_sizes(out, "step/optimizer") == [bias + head, norm + fc, embed]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_ddp_gradients_can_live_in_the_buckets(accumulation):
    toy = Toy(model(), accumulation)
    asked = choice("ddp", 4, accumulation)
    views = DdpSettings(300, 50, gradient_as_bucket_view=True)
    out = shard(toy.events, toy.parameters, asked, views)
    check_consistent(toy.events, out)
    trained = sum(p.nbytes for p in toy.parameters if p.trainable)
    assert resident(out)["gradient"] == 0
    assert resident(out)["communication"] == trained
    assert resident(shard(toy.events, toy.parameters, asked, settings_of("ddp")))["gradient"] == trained
    last, walk = next(segment for segment in reversed(out.segments) if segment.name in STEP[:2]), Walk(out)
    before = [entry for segment in out.segments if segment is not last for entry in list(segment.timeline) * segment.repeat]
    for entry in [*before[: -len(out.segments[-1].timeline)], *last.timeline[:-6]]:
        walk.entry(entry)
    assert walk.by_role["gradient"] <= 2 * (2 * 40 * H) < trained
    repeats = [segment.repeat for segment in out.segments if segment.name == "step/next"]
    assert repeats == {1: [], 2: [1], 4: [2, 1]}[accumulation]
