"""FSDP2 on steps made by hand: what is alive when, on which stream, and what the closed arithmetic says of it."""

import copy
import re
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty, _get_dim0_padded_size
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_managed_modules, _get_managed_states

from oomph.core.events import Events, Kind, Segment
from oomph.core.fsdp import GATHER_STREAM, REDUCE_STREAM, chunk, padded
from oomph.core.fsdp_hooks import find_groups
from oomph.core.sharding import DdpSettings, FsdpSettings, Parameter, ZeroSettings, shard, static_bytes
from oomph.errors import UserError
from oomph.records import Choice
from oomph.units import gib

FSDP = ("fsdp2", "fsdp2-no-reshard", "fsdp2-hybrid")
OTHERS = ("ddp", "zero1", "zero2", "zero3")
ROLES = ("weight", "gradient", "optimizer", "communication")
STEP = ("step/first", "step/next", "step/optimizer")
WARMED = ("load", "warmup/first", "warmup/next", "warmup/optimizer")


def choice(sharding="fsdp2", gpus=4, accumulation=1, **knobs):
    nodes = 2 if sharding == "fsdp2-hybrid" else 1
    return Choice(
        1, accumulation, gpus * accumulation, gpus, nodes, sharding=sharding, **{"optimizer": "adamw-foreach", **knobs}
    )


def model(layers=3, trained=r".", width=6, dtype="bfloat16"):
    """Embedding, blocks of a norm and a linear layer, head; what matches `trained` trains."""
    shapes = {"embed.weight": (41, width)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.norm.weight": (width,), f"layers.{layer}.fc.weight": (3 * width + 1, width)}
    shapes["head.weight"] = (41, width)
    return [Parameter(name, shape, dtype, bool(re.search(trained, name))) for name, shape in shapes.items()]


@dataclass
class Toy:
    """A step made by hand: one activation for each module in the forward, gradients of input and weights in the backward."""

    parameters: list
    accumulation: int = 1
    checkpointing: bool = False
    unused: frozenset = frozenset()
    evaluates: bool = False
    events: Events = field(default_factory=Events)

    def __post_init__(self):
        self.modules = list(dict.fromkeys(parameter.module for parameter in self.parameters))
        trained = [n for n, p in enumerate(self.parameters) if p.trainable]
        self.reached = [n for n in trained if n not in self.unused]
        self.first = min((self.modules.index(self.parameters[n].module) for n in trained), default=len(self.modules))
        load = [self.new(p.shape, p.dtype, p.module, "load", "weight", n) for n, p in enumerate(self.parameters)]
        load.append(self.new((12,), "float32", "rotary", "load", "weight"))
        self.segment("load", load, [])
        for step in ("warmup", "step"):
            self.micro_batch(f"{step}/first", True, 1)
            if self.accumulation > 1:
                self.micro_batch(f"{step}/next", False, self.accumulation - 1)
            self.optimizer(f"{step}/optimizer", step == "warmup")
        if self.evaluates:
            made = [self.new((64,), "bfloat16", module, "evaluate", "activation") for module in self.modules]
            self.segment("evaluate", [*made, *(~storage for storage in made)], [(0, "evaluate")])

    def new(self, shape, dtype, module, phase, role, parameter=-1, op="aten.op"):
        found = re.match(r"layers\.(\d+)", module)
        template = f"layers.{{}}{module[found.end() :]}" if found else module
        nbytes = torch.Size(shape).numel() * {"bfloat16": 2, "float32": 4}[dtype]
        kind = Kind(op, template, phase, role, dtype)
        return self.events.add(nbytes, tuple(shape), kind, int(found[1]) if found else -1, parameter)

    def segment(self, name, timeline, marks, repeat=1):
        self.events.segments.append(Segment(name, timeline, tuple(marks), repeat))

    def micro_batch(self, name, first, repeat):
        batch, saved = self.new((50,), "bfloat16", "", "forward", "input"), {}
        timeline, marks = [batch], [(0, "forward")]
        for module in self.modules:
            saved[module] = self.new((64,), "bfloat16", module, "forward", "activation")
            timeline.append(saved[module])
            if self.checkpointing and module.startswith("layers"):
                timeline.append(~saved.pop(module))
        marks.append((len(timeline), "backward"))
        upstream = self.new((), "float32", "", "backward", "temporary")
        timeline.append(upstream)
        self.alive = {} if first else self.alive
        for number, module in reversed(list(enumerate(self.modules))):
            if number < self.first:
                break
            layer = module.rpartition(".")[0]
            if self.checkpointing and layer.startswith("layers") and module not in saved:
                for again in [other for other in self.modules if other.startswith(f"{layer}.")]:
                    saved[again] = self.new((64,), "bfloat16", again, "recompute", "activation")
                    timeline.append(saved[again])
            below = self.new((64,), "bfloat16", module, "backward", "temporary")
            timeline += [below, *self.gradients(module, first), ~upstream, ~saved.pop(module)]
            upstream = below
        timeline += [~upstream, *(~storage for storage in saved.values()), ~batch]
        self.segment(name, timeline, marks, repeat)

    def gradients(self, module, first):
        made = {
            n: self.new(p.shape, p.dtype, module, "backward", "gradient", n)
            for n, p in enumerate(self.parameters)
            if p.module == module and n in self.reached
        }
        if first:
            self.alive |= made
            return list(made.values())
        return [entry for storage in made.values() for entry in (storage, ~storage)]

    def optimizer(self, name, warmup):
        dtype = self.parameters[self.reached[0]].dtype if self.reached else "bfloat16"
        norms = [self.new((), dtype, "", "optimizer", "temporary", op="aten._foreach_norm.Scalar") for _ in self.reached]
        vector = self.new((len(norms),), dtype, "", "optimizer", "temporary", op="aten.stack.default")
        timeline = [*norms, vector, ~vector, *(~norm for norm in norms)]
        trained = [(n, self.parameters[n]) for n in self.reached]
        if warmup:
            moments = [self.new(p.shape, p.dtype, p.module, "optimizer", "optimizer", n) for n, p in trained for _ in range(2)]
            timeline += moments
        roots = [self.new(p.shape, p.dtype, "", "optimizer", "temporary", op="aten._foreach_sqrt.default") for _, p in trained]
        timeline += [*roots, *(~root for root in roots), *(~storage for storage in self.alive.values())]
        self.segment(name, timeline, [(0, "optimizer")])


class Walk:
    """The live set along a timeline; fails on a storage that is born twice or freed unborn."""

    def __init__(self, events):
        self.events, self.live, self.peak, self.bytes = events, {}, 0, 0

    def run(self, *names):
        for segment in self.events.segments:
            if segment.name in names:
                for _ in range(segment.repeat):
                    for entry in segment.timeline:
                        self.step(entry)
        return self

    def step(self, entry):
        storage = entry if entry >= 0 else ~entry
        assert (storage in self.live) == (entry < 0), (self.events.kinds[storage], entry)
        if entry >= 0:
            self.live[storage] = self.events.sizes[storage]
        else:
            del self.live[storage]
        self.bytes += self.events.sizes[storage] * (1 if entry >= 0 else -1)
        self.peak = max(self.peak, self.bytes)

    def by_role(self):
        found = Counter()
        for storage, nbytes in self.live.items():
            buffer = self.events.parameters[storage] < 0 and self.events.kinds[storage].op == "aten.op"
            found[self.events.kinds[storage].role] += 0 if buffer else nbytes
        return {role: found[role] for role in ROLES}


def resident(events):
    """By role, when the steady step's optimizer begins; without the model's buffers."""
    return Walk(events).run(*WARMED, "step/first", "step/next").by_role()


def ops(events, name, of="fsdp2"):
    """The births (and ~deaths) that sharding adds to a segment, in order, by what they are and for which layer."""
    found = []
    segment = next(segment for segment in events.segments if segment.name == name)
    for entry in segment.timeline:
        storage = entry if entry >= 0 else ~entry
        kind = events.kinds[storage]
        if kind.op.startswith(of):
            where = events.layers[storage] if events.layers[storage] >= 0 else "root"
            found.append(f"{'~' if entry < 0 else ''}{kind.op.removeprefix('fsdp2.')} {where}")
    return found


@pytest.mark.parametrize("sharding", FSDP)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("trained", [".", "norm|head", "embed", "layers.2"])
def test_storages_are_conserved_and_a_step_repeats(sharding, accumulation, checkpointing, masters, trained):
    toy = Toy(model(trained=trained), accumulation, checkpointing, evaluates=True)
    before = copy.deepcopy(toy.events)
    asked = choice(sharding, 4, accumulation, master_weights=masters)
    out = shard(toy.events, toy.parameters, asked)
    assert toy.events == before
    assert [segment.name for segment in out.segments] == [segment.name for segment in before.segments]
    for old, new in zip(before.segments, out.segments, strict=True):
        assert [phase for _, phase in new.marks] == [phase for _, phase in old.marks]
        assert new.repeat == old.repeat
    walk = Walk(out).run(*WARMED)
    after = dict(walk.live)
    assert walk.run(*STEP).live == after
    assert walk.run("evaluate").live == after
    assert resident(out) == static_bytes(toy.parameters, asked)


def groups_of(toy):
    groups = find_groups(toy.events.kinds, toy.parameters)
    return {tuple(toy.parameters[index].name for index in group.members) for group in groups}


def test_every_layer_is_a_group_and_the_root_has_the_rest():
    toy = Toy(model(2))
    assert groups_of(toy) == {
        ("embed.weight", "head.weight"),
        ("layers.0.norm.weight", "layers.0.fc.weight"),
        ("layers.1.norm.weight", "layers.1.fc.weight"),
    }


def test_groups_and_their_order_are_torchs():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(3))
            self.inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
            self.last = torch.nn.Parameter(torch.zeros(3))

    root = torch.nn.Module()
    root.position = torch.nn.Parameter(torch.zeros(3))
    root.layers = torch.nn.ModuleList([Block(), Block()])
    root.embed = torch.nn.Embedding(4, 2)
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    for module, modules in ((root, [root]), (root.layers[1], [root.layers[1]])):
        wrapped = () if module is not root else tuple(root.layers)
        managed = _get_managed_modules((module,), set(), get_state_fn=lambda m, w=wrapped: True if m in w else None)
        expected = tuple(names[id(parameter)] for parameter in _get_managed_states(managed)[0])
        parameters = [Parameter(name, tuple(p.shape), "float32", True) for name, p in root.named_parameters()]
        events = Events(kinds=[Kind("load", "layers.{}.inner", "load", "weight", "float32")])
        found = [tuple(parameters[index].name for index in group.members) for group in find_groups(events.kinds, parameters)]
        assert expected in found, modules


shapes = st.one_of(
    st.tuples(st.integers(1, 30)), st.tuples(st.integers(1, 30), st.integers(1, 9)), st.tuples(*[st.integers(1, 5)] * 3)
)


@given(shape=shapes, world=st.integers(2, 9), data=st.data())
def test_chunks_are_torchs(shape, world, data):
    rank = data.draw(st.integers(0, world - 1))
    whole = torch.empty(shape, device="meta")
    pieces = _chunk_with_empty(whole, world, dim=0)
    mine = pieces[rank] if pieces[rank].numel() else whole[:0]
    assert chunk(shape, world, rank) == tuple(mine.shape)
    parameter = Parameter("a.weight", shape, "float32", True)
    assert padded(parameter, world) == pieces[0].numel()
    assert padded(parameter, world) * world == _get_dim0_padded_size(whole.size(), world).numel()


@st.composite
def toys(draw):
    """Steps of random models: layers that train or not, parameters that train and get no gradient."""
    layers, listed = draw(st.integers(1, 3)), []
    modules = ["embed", *(f"layers.{n}.{name}" for n in range(layers) for name in ("a", "b")), "head"]
    for module in modules:
        for number in range(draw(st.integers(1, 2))):
            listed.append(Parameter(f"{module}.p{number}", draw(shapes), "bfloat16", draw(st.booleans())))
    trained = [n for n, parameter in enumerate(listed) if parameter.trainable]
    unused = draw(st.sets(st.sampled_from(trained))) if trained else set()
    if len(unused) == len(trained):
        listed[-1] = listed[-1]._replace(trainable=True)
        unused -= {len(listed) - 1}
    return Toy(listed, draw(st.integers(1, 3)), draw(st.booleans()), frozenset(unused))


@settings(max_examples=120)
@given(toy=toys(), sharding=st.sampled_from(FSDP), ranks=st.integers(2, 5), masters=st.booleans(), data=st.data())
def test_any_model_keeps_what_the_closed_arithmetic_says(toy, sharding, ranks, masters, data):
    asked = choice(sharding, ranks * (2 if sharding == "fsdp2-hybrid" else 1), toy.accumulation, master_weights=masters)
    rank = FsdpSettings(data.draw(st.integers(0, ranks - 1)))
    out = shard(toy.events, toy.parameters, asked, rank)
    walk = Walk(out).run(*WARMED)
    after = dict(walk.live)
    assert walk.run(*STEP).live == after
    kept = resident(out)
    assert kept == static_bytes(toy.parameters, asked, rank, toy.reached)
    first = resident(shard(toy.events, toy.parameters, asked))
    assert all(kept[role] <= first[role] for role in ROLES)


@settings(max_examples=120)
@given(
    toy=toys(),
    sharding=st.sampled_from((*OTHERS, *FSDP, "none")),
    ranks=st.integers(2, 5),
    optimizer=st.sampled_from(("adamw-fused", "adamw-foreach")),
    unknown=st.booleans(),
)
def test_no_layout_keeps_less_than_the_static_bytes(toy, sharding, ranks, optimizer, unknown):
    gpus = {"none": 1, "fsdp2-hybrid": 2 * ranks}.get(sharding, ranks)
    small = ZeroSettings(80, 90, prefetch_elements=70, persistence_elements=8) if sharding.startswith("zero") else None
    chosen = DdpSettings(300, 50) if sharding == "ddp" else small
    asked = choice(sharding, gpus, toy.accumulation, optimizer="adamw-foreach")
    kept = resident(shard(toy.events, toy.parameters, asked, chosen))
    reached = None if unknown and not toy.unused else toy.reached
    bound = static_bytes(toy.parameters, asked, chosen, reached)
    assert all(bound[role] <= kept[role] for role in ROLES)
    fused = static_bytes(toy.parameters, choice(sharding, gpus, optimizer=optimizer), chosen, reached)
    assert 0 <= fused["optimizer"] - bound["optimizer"] <= 4 * len(toy.parameters)
    without = static_bytes(toy.parameters, choice(sharding, gpus, optimizer_offload=True), chosen, reached)
    assert sharding.startswith("zero") or without == bound | {"optimizer": 0}


def test_buffers_of_a_micro_batch():
    toy = Toy(model(2))
    out = shard(toy.events, toy.parameters, choice())
    seen = [name for name in ops(out, "step/first") if not name.strip("~").startswith(("unsharded", "chunk_cat"))]
    forward = ["all_gather root", "all_gather 0", "~all_gather root", "all_gather 1", "~all_gather 0", "~all_gather 1"]
    last = ["all_gather 1", "~all_gather 1", "all_gather 0", "reduce_scatter 1", "sharded_gradient 1"]
    before = ["~all_gather 0", "~reduce_scatter 1", "reduce_scatter 0", "sharded_gradient 0"]
    end = ["~reduce_scatter 0", "reduce_scatter root", "sharded_gradient root", "~reduce_scatter root"]
    assert seen == [*forward, *last, *before, *end]
    assert sorted(ops(out, "step/optimizer", "fsdp2.sharded")) == [f"~sharded_gradient {layer}" for layer in (0, 1, "root")]


def test_whole_parameters_live_through_their_layer_and_those_of_the_root_through_the_micro_batch():
    toy = Toy(model(2))
    out = shard(toy.events, toy.parameters, choice())
    layers = [f"{free}unsharded_parameter {n}" for n in (0, 1, 1, 0) for free in ("", "~")]
    order = ["unsharded_parameter root", *layers, "~unsharded_parameter root"]
    assert ops(out, "step/first", "fsdp2.unsharded") == [name for name in order for _ in range(2)]
    kept = shard(toy.events, toy.parameters, choice("fsdp2-no-reshard"))
    order = [*(f"unsharded_parameter {n}" for n in ("root", 0, 1)), *(f"~unsharded_parameter {n}" for n in (1, 0, "root"))]
    assert ops(kept, "step/first", "fsdp2.unsharded") == [name for name in order for _ in range(2)]


def test_a_frozen_tower_is_gathered_ahead_in_vain_and_held_to_the_end():
    tower, language = "tower.layers.{}.fc", "language.layers.{}.fc"
    events, timeline = Events(), []
    parameters = [Parameter(f"{stack.replace('{}', str(n))}.weight", (4, 4), "bfloat16", stack is language, part)
                  for stack, part in ((tower, "vision"), (language, "language")) for n in range(2)]  # fmt: skip

    def new(module, layer, phase, role, parameter=-1):
        timeline.append(events.add(32, (4, 4), Kind("aten.op", module, phase, role, "bfloat16"), layer, parameter))

    for number in range(4):
        new((tower, language)[number // 2], number % 2, "forward", "activation")
    new("", -1, "backward", "temporary")
    for layer in (1, 0):
        new(language, layer, "backward", "temporary")
        new(language, layer, "backward", "gradient", 2 + layer)
    events.segments.append(Segment("step/first", timeline, ((0, "forward"), (4, "backward"))))
    out = shard(events, parameters, choice())
    named = [
        f"{'~' if entry < 0 else ''}{out.kinds[max(entry, ~entry)].op} {out.module(max(entry, ~entry))}"
        for entry in out.segments[0].timeline
    ]
    gathers = [name for name in named if "all_gather" in name][-6:]
    order = [
        "language.layers.1",
        "~language.layers.1",
        "language.layers.0",
        "~language.layers.0",
        "tower.layers.1",
        "~tower.layers.1",
    ]
    assert gathers == [f"{'~' * (name[0] == '~')}fsdp2.all_gather {name.strip('~')}" for name in order]
    # The first layer's inputs need no gradient: it is reduced at the end, after what is held for the tower is let go.
    reduced = [named.index(f"fsdp2.reduce_scatter language.layers.{layer}") for layer in (1, 0)]
    assert reduced[0] < named.index("~fsdp2.all_gather tower.layers.1", reduced[0]) < reduced[1]


def test_reductions_of_later_micro_batches_are_added_and_those_of_a_hybrid_held():
    toy = Toy(model(2), accumulation=2)
    plain = ops(shard(toy.events, toy.parameters, choice(accumulation=2)), "step/next", "fsdp2.new")
    assert plain == [f"{free}new_sharded_gradient {n}" for n in (1, 0, "root") for free in ("", "~")]
    hybrid = ops(shard(toy.events, toy.parameters, choice("fsdp2-hybrid", accumulation=2)), "step/next", "fsdp2.new")
    made, held = [f"new_sharded_gradient {n}" for n in (1, 0, "root")], [f"~new_sharded_gradient {n}" for n in ("root", 0, 1)]
    assert hybrid == [*made, *held]


def bytes_of(events, op):
    return Counter({(events.module(s), events.sizes[s]): 1 for s, kind in enumerate(events.kinds) if kind.op == op})


def test_sizes_of_one_layer_with_master_weights():
    # (6,) and (19, 6) over 4 ranks: chunks of 2 and 5 * 6 elements.
    toy = Toy(model(1))
    out = shard(toy.events, toy.parameters, choice(master_weights=True))
    assert bytes_of(out, "fsdp2.cast")["layers.0", 2 * (2 + 30)]
    assert bytes_of(out, "fsdp2.all_gather")["layers.0", 4 * 2 * (2 + 30)]
    assert bytes_of(out, "fsdp2.reduce_scatter")["layers.0", 4 * 4 * (2 + 30)]
    assert bytes_of(out, "fsdp2.sharded_gradient")["layers.0", 4 * (2 + 30)]
    assert bytes_of(out, "fsdp2.unsharded_parameter")["layers.0.fc", 4 * 2 * 30]
    assert bytes_of(out, "fsdp2.chunk_cat")["layers.0", 8 * (6 * 2 + 2 + 2)]
    weights = {out.sizes[s] for s, kind in enumerate(out.kinds) if kind.role == "weight" and out.module(s) == "layers.0.fc"}
    assert weights == {4 * 30}
    roots = [out.sizes[s] for s, kind in enumerate(out.kinds) if kind.op == "aten._foreach_sqrt.default"]
    assert roots == [4 * n for n in (11 * 6, 2, 30, 11 * 6)] * 2


def test_frozen_weights_stay_as_they_are_and_are_gathered_without_a_cast():
    toy = Toy(model(2, trained="layers.1"))
    out = shard(toy.events, toy.parameters, choice(master_weights=True))
    assert set(bytes_of(out, "fsdp2.cast")) == {("layers.1", 2 * (2 + 30))}
    kept = static_bytes(toy.parameters, choice(master_weights=True))
    assert kept["weight"] == 2 * (2 * 11 * 6 + 2 + 30) + 4 * (2 + 30)


def test_a_group_of_two_dtypes_is_gathered_as_bytes():
    parameters = [p._replace(dtype="float32", trainable=False) if "norm" in p.name else p for p in model(1)]
    out = shard(Toy(parameters).events, parameters, choice())
    assert bytes_of(out, "fsdp2.all_gather")["layers.0", 4 * (4 * 2 + 2 * 30)]
    assert "uint8" in {kind.dtype for kind in out.kinds if kind.op == "fsdp2.all_gather"}


def test_partial_norms_follow_the_largest_chunk():
    events = Events()
    parameters = [Parameter("a.weight", (4096, 64), "bfloat16", True), Parameter("b.weight", (8,), "bfloat16", True)]
    kind = Kind("aten._foreach_norm.Scalar:output_per_tensor", "", "optimizer", "temporary", "float32")
    storage = events.add(4 * 2 * 4, (2 * 4,), kind)
    events.segments.append(Segment("step/optimizer", [storage, ~storage]))
    assert shard(events, parameters, choice(gpus=2)).sizes[storage] == 4 * 2 * 2


def test_buffers_are_on_streams_of_their_own():
    toy = Toy(model(2), accumulation=2)
    out = shard(toy.events, toy.parameters, choice(master_weights=True, accumulation=2))
    own = {"cast": GATHER_STREAM, "all_gather": GATHER_STREAM}
    own |= {"sharded_gradient": REDUCE_STREAM, "new_sharded_gradient": REDUCE_STREAM}
    for storage, kind in enumerate(out.kinds):
        assert out.streams.get(storage, 0) == own.get(kind.op.removeprefix("fsdp2."), 0)


@pytest.mark.parametrize("masters", [False, True])
def test_the_page_has_the_numbers_of_phi2(root, masters):
    parameters = [Parameter("all.weight", (2_779_683_840 // 64, 64), "bfloat16", True)]
    kept = static_bytes(parameters, choice(gpus=8, master_weights=masters))
    name = "`fsdp2` with `master_weights`" if masters else "`fsdp2`"
    numbers = " | ".join(gib(kept[role]) for role in ("weight", "gradient", "optimizer"))
    assert f"| {name} | {numbers} | |" in (root / "docs" / "sharding.md").read_text(encoding="utf-8")


# What is refused.


@pytest.mark.parametrize("sharding", FSDP)
def test_one_gpu_is_refused(sharding):
    with pytest.raises(UserError, match="gpus is 1"):
        static_bytes(model(), choice(sharding, 1))


@pytest.mark.parametrize(("gpus", "nodes"), [(4, 1), (4, 4), (6, 4)])
def test_a_hybrid_takes_nodes_of_several_gpus(gpus, nodes):
    with pytest.raises(UserError, match="several nodes of several GPUs") as caught:
        static_bytes(model(), Choice(1, 1, gpus, gpus, nodes, sharding="fsdp2-hybrid"))
    assert "fsdp2" in caught.value.hint


def test_a_hybrid_divides_within_a_node_and_fsdp2_over_all():
    over_all = static_bytes(model(width=8), Choice(1, 1, 8, 8, 2, sharding="fsdp2"))
    assert over_all == static_bytes(model(width=8), Choice(1, 1, 8, 8, 1, sharding="fsdp2"))
    hybrid = static_bytes(model(width=8), Choice(1, 1, 8, 8, 2, sharding="fsdp2-hybrid"))
    assert hybrid == static_bytes(model(width=8), Choice(1, 1, 4, 4, 1, sharding="fsdp2"))


def test_scalars_mixed_dtypes_and_ranks_are_refused_together():
    parameters = [*model(1), Parameter("temperature", (), "float32", True)]
    with pytest.raises(UserError) as caught:
        static_bytes(parameters, choice("fsdp2-hybrid"), FsdpSettings(2))
    assert len(caught.value.problems) == 3
    assert "temperature" in str(caught.value)


WRONG = [("fsdp2", ZeroSettings()), ("fsdp2", DdpSettings()), ("zero2", FsdpSettings()), ("ddp", FsdpSettings())]


@pytest.mark.parametrize(("sharding", "wrong"), WRONG)
def test_settings_of_another_variant_are_refused(sharding, wrong):
    with pytest.raises(TypeError):
        static_bytes(model(), choice(sharding), wrong)
