import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.core.events import Events, Kind, Segment
from oomph.core.ranks import arrivals, hidden_size
from oomph.core.sharding import DdpSettings, Parameter, ZeroSettings, ddp_buckets, shard, static_bytes
from oomph.errors import UserError
from oomph.records import Choice
from oomph.units import gib

MATRIX = Parameter("a.weight", (4, 4), "bfloat16", True)
shapes = st.one_of(
    st.tuples(st.integers(1, 30)), st.tuples(st.integers(1, 30), st.integers(1, 9)), st.tuples(*[st.integers(1, 4)] * 3)
)
lists = st.lists(st.tuples(shapes, st.booleans()), min_size=1, max_size=9).filter(lambda items: any(t for _, t in items))


def choice(sharding, gpus):
    return Choice(1, 1, gpus, gpus, sharding=sharding, optimizer="adamw-foreach")


def phi2():
    parameters = [Parameter("model.embed_tokens.weight", (51200, 2560), "bfloat16", True)]
    for layer in range(32):
        path = f"model.layers.{layer}"
        linears = [(f"self_attn.{name}", 2560, 2560) for name in ("q_proj", "k_proj", "v_proj", "dense")]
        for name, rows, columns in [*linears, ("mlp.fc1", 10240, 2560), ("mlp.fc2", 2560, 10240)]:
            parameters.append(Parameter(f"{path}.{name}.weight", (rows, columns), "bfloat16", True))
            parameters.append(Parameter(f"{path}.{name}.bias", (rows,), "bfloat16", True))
        parameters += [Parameter(f"{path}.input_layernorm.{name}", (2560,), "bfloat16", True) for name in ("weight", "bias")]
    parameters += [Parameter(f"model.final_layernorm.{name}", (2560,), "bfloat16", True) for name in ("weight", "bias")]
    parameters.append(Parameter("lm_head.weight", (51200, 2560), "bfloat16", True))
    return [*parameters, Parameter("lm_head.bias", (51200,), "bfloat16", True)]


def projector():
    shapes = {"0.weight": (2560, 1024), "0.bias": (2560,), "2.weight": (2560, 2560), "2.bias": (2560,)}
    return [Parameter(f"model.mm_projector.{name}", shape, "bfloat16", True) for name, shape in shapes.items()]


def test_phi2_under_zero2_on_eight_ranks():
    language = phi2()
    assert sum(parameter.numel for parameter in language) == 2_779_683_840
    assert sum(parameter.numel for parameter in projector()) == 9_180_160
    kept = static_bytes(language, choice("zero2", 8))
    assert [gib(kept[role]) for role in ("weight", "optimizer", "gradient")] == ["5.18", "3.88", "0.65"]
    kept = static_bytes(language[:-2] + projector() + language[-2:], choice("zero2", 8))
    total = 2_779_683_840 + 9_180_160
    padding = 2 * 2 * 8
    assert 0 <= kept["weight"] - 2 * total <= 2 * padding
    assert 0 <= kept["optimizer"] - 12 * total // 8 <= 12 * padding // 8
    partly_owned = 2 * 10240 * 2560
    assert 0 <= kept["gradient"] - 2 * total // 8 <= 2 * partly_owned
    assert gib(kept["gradient"]) == "0.65"


def test_phi2_under_the_other_variants():
    total, language = 2_779_683_840, phi2()
    assert sum(static_bytes(language, choice("ddp", 8)).values()) == total * (2 + 2 + 4 + 2)
    zero1 = static_bytes(language, choice("zero1", 8))
    assert zero1["gradient"] == 2 * total
    zero3 = static_bytes(language, choice("zero3", 8))
    small = [p.numel for p in language if p.numel <= 25600]
    assert zero3 == {
        "weight": 2 * total // 8,
        "gradient": 2 * total // 8,
        "optimizer": 12 * total // 8,
        "communication": 2 * 2560**2 + 2 * sum(small),
    }


@settings(max_examples=60, deadline=None)
@given(items=lists, gpus=st.integers(2, 9), groups=st.booleans(), data=st.data())
def test_the_gradient_partition_holds_every_parameter_with_an_element_in_it(items, gpus, groups, data):
    parameters = [Parameter(f"m.p{n}", shape, "bfloat16", trained) for n, (shape, trained) in enumerate(items)]
    rank = data.draw(st.integers(0, gpus - 1))
    expected = 0
    for matrices in (True, False) if groups else (None,):
        trained = [n for n, p in enumerate(parameters) if p.trainable and matrices in (None, len(p.shape) >= 2)]
        owners = [n for n in trained for _ in range(parameters[n].numel)]
        owners += [None] * (-len(owners) % (2 * gpus))
        size = len(owners) // gpus
        mine = owners[rank * size : (rank + 1) * size]
        expected += mine.count(None) + sum(parameters[n].numel for n in set(mine) - {None})
    chosen = ZeroSettings(reduce_bucket_elements=10, weight_decay_groups=groups, rank=rank)
    assert static_bytes(parameters, choice("zero2", gpus), chosen)["gradient"] == 2 * expected


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.sampled_from(["float32", "bfloat16"])), min_size=1, max_size=20),
    limits=st.lists(st.integers(1, 300), min_size=1, max_size=2),
)
def test_ddp_buckets_are_torchs(sizes, limits):
    parameters = [Parameter(f"p{n}", (numel,), dtype, True) for n, (numel, dtype) in enumerate(sizes)]
    tensors = [torch.empty(p.shape, dtype=getattr(torch, p.dtype)) for p in parameters]
    expected, _ = torch._C._distributed_c10d._compute_bucket_assignment_by_size(tensors, limits)
    ours = ddp_buckets(parameters, range(len(parameters)), limits)
    assert sorted(ours, key=min) == expected


def test_a_gradient_is_complete_after_the_last_backward_of_its_module():
    events = Events()

    def new(module, phase, role, parameter=-1):
        return events.add(8, (4,), Kind("aten.op", module, phase, role, "bfloat16"), -1, parameter)

    tied = Parameter("embed.weight", (2, 2), "bfloat16", True)
    other = Parameter("fc.weight", (2, 2), "bfloat16", True)
    from_head, hidden = new("embed", "backward", "gradient", 0), new("fc", "backward", "temporary")
    of_fc, lookup = new("fc", "backward", "gradient", 1), new("embed", "backward", "temporary")
    after = new("", "backward", "temporary")
    timeline = [from_head, hidden, of_fc, ~hidden, lookup, ~lookup, after, ~after]
    found = [(arrival.parameter, arrival.position, arrival.storages) for arrival in arrivals(events, timeline, [tied, other])]
    assert found == [(1, 4, (of_fc,)), (0, 6, (from_head,))]


def test_the_hidden_size_is_the_width_of_the_embedding():
    assert hidden_size(phi2()) == 2560
    assert ZeroSettings().reduce_bucket(phi2()) == 6_553_600
    assert ZeroSettings().prefetch(phi2()) == 5_898_240
    assert ZeroSettings().persistence(phi2()) == 25_600
    with pytest.raises(UserError, match="no matrix"):
        hidden_size([Parameter("bias", (3,), "bfloat16", True)])


def test_all_problems_are_named_at_once():
    parameters = [
        Parameter("a.weight", (4, 4), "bfloat16", True),
        Parameter("b.weight", (4, 4), "float32", True),
        Parameter("c.weight", (4, 4), "nf4", False),
    ]
    with pytest.raises(UserError) as caught:
        static_bytes(parameters, choice("zero2", 1), ZeroSettings(rank=3))
    assert len(caught.value.problems) == 4
    with pytest.raises(UserError, match="nothing to reduce"):
        static_bytes([parameters[0]._replace(trainable=False)], choice("ddp", 4))


def loaded(parameters, asked, chosen=None):
    """What sharding allocates and frees while the model is loaded."""
    out = shard(Events(segments=[Segment("load", [])]), parameters, asked, chosen)
    return [out.kinds[entry].op if entry >= 0 else f"~{out.kinds[~entry].op}" for entry in out.segments[0].timeline]


def test_zero2_at_construction():
    made = ["zero.flat_parameters", "zero.clone", "zero.fp32_master", "~zero.clone", "zero.fp32_gradient", "zero.exp_avg"]
    stepped = ["zero.exp_avg_sq", "zero.adamw_sqrt", "~zero.adamw_sqrt", "~zero.fp32_gradient"]
    assert loaded([MATRIX], choice("zero2", 4)) == made + stepped


def test_ddp_broadcasts_through_two_flat_copies_at_a_time():
    parameters = [Parameter(f"m{n}.weight", (1024, 1024, 50), "bfloat16", True) for n in range(10)]
    flat, freed = "ddp.broadcast", "~ddp.broadcast"
    # 100 MiB each: three to a copy, and the last one alone needs none.
    assert loaded(parameters, choice("ddp", 4)) == [flat, flat, freed, flat, freed, freed, "ddp.bucket"]


@pytest.mark.parametrize("sharding", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("work", [loaded, static_bytes])
def test_one_gpu_is_refused(sharding, work):
    with pytest.raises(UserError, match="gpus is 1") as caught:
        work([MATRIX], choice(sharding, 1))
    assert caught.value.hint


@pytest.mark.parametrize(("sharding", "wrong"), [("ddp", ZeroSettings()), ("zero2", DdpSettings()), ("zero3", DdpSettings())])
@pytest.mark.parametrize("work", [loaded, static_bytes])
def test_settings_of_another_variant_are_refused(sharding, wrong, work):
    with pytest.raises(TypeError):
        work([MATRIX], choice(sharding, 4), wrong)


@pytest.mark.parametrize("sharding", ["zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("beside", [("q.lora_A.weight", "float32", True, "lora"), ("q.weight", "uint8", False, "language")])
def test_adapters_and_quantized_weights_are_not_divided(sharding, beside):
    name, dtype, trains, part = beside
    parameters = [MATRIX, Parameter(name, (4, 4), dtype, trains, part)]
    with pytest.raises(UserError, match="adapters or quantized weights") as caught:
        static_bytes(parameters, choice(sharding, 2))
    assert "ddp" in caught.value.hint
    assert static_bytes(parameters, choice("ddp", 2))["weight"] == sum(parameter.nbytes for parameter in parameters)
