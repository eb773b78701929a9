"""From a choice's sharding to the model as it trains.

The order in which a model is made what trains, on every rank:

1. the model, its experts and its adapters, with real weights on the rank's device or empty ones on ``meta``;
2. the dtypes of what trains (`Arithmetic.lift`), and which parameters require a gradient;
3. `share`: with FSDP2 and master weights what trains becomes float32, then ``fully_shard`` on every layer of every stack, then
   on the model; otherwise the weights of rank 0 go to all ranks;
4. from ``meta``: ``to_empty``, then the weights and the buffers that are not saved;
5. the optimizer, over the parameters as they are now, with master weights of its own where there are no float32 shards;
6. the `Engine`, which applies checkpointing (again at every change of it) and makes the optimizer's states.
"""

from __future__ import annotations

import itertools

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from oomph.errors import UserError
from oomph.live.layers import find_stacks
from oomph.live.precision import arithmetic_of
from oomph.live.ranks import torch_private
from oomph.live.ranks.group import Ranks
from oomph.live.ranks.parallel import Alone, Parallel
from oomph.live.ranks.replicas import Replicas
from oomph.live.ranks.shards import Shards
from oomph.records import Choice


def check(choice: Choice, ranks: Ranks) -> None:
    """Whether a choice can train on these ranks.

    Raises:
        UserError: it cannot.
    """
    problems, hints = [], []
    name = choice.sharding
    if name.startswith("zero"):
        problems.append(f"sharding {name} can be planned, but not trained: it is DeepSpeed's, and Oomph trains without it")
        hints.append("train with sharding fsdp2, which divides the same, or ddp")
    if choice.gpus != ranks.size:
        problems.append(f"the choice is for {choice.gpus} GPUs, and {ranks.size} processes run")
        hints.append(f"start {choice.gpus} processes, or ask for hardware.gpus={ranks.size}")
    if name == "none" and ranks.size > 1:
        problems.append(f"sharding none trains in one process, and {ranks.size} run")
        hints.append("choose ddp or fsdp2")
    if name == "fsdp2-hybrid" and (choice.nodes < 2 or choice.gpus % choice.nodes or choice.gpus == choice.nodes):
        problems.append(f"sharding {name} takes several nodes of equally many GPUs, and {choice.gpus} run on {choice.nodes}")
        hints.append("choose fsdp2, which divides over all GPUs wherever they are")
    if name.startswith("fsdp2") and not torch_private.supported():
        lacks = ", ".join(torch_private.missing()) or f"it was checked with torch {torch_private.VERSION} alone"
        problems.append(f"sharding {name} does not run on torch {torch.__version__}: {lacks}")
        hints.append(f"install torch {torch_private.VERSION}, or choose ddp")
    if problems:
        raise UserError(problems, "; ".join(hints))


def share(model: PreTrainedModel, choice: Choice, ranks: Ranks) -> Parallel:
    """Makes a model, in place, what trains on each of the ranks. Collective.

    Args:
        model: the same on all ranks, or, with FSDP2, the same structure on ``meta``.
        choice: its sharding, nodes and master weights.
        ranks: the processes.

    Raises:
        UserError: the choice cannot train on these ranks.
    """
    check(choice, ranks)
    if ranks.size == 1:
        return Alone()
    if choice.sharding == "ddp":
        return Replicas(model, ranks)
    policy, trained = MixedPrecisionPolicy(), {p.dtype for p in model.parameters() if p.requires_grad}
    if choice.master_weights:
        policy = MixedPrecisionPolicy(arithmetic_of(choice.precision).trained, torch.float32)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    elif len(trained) > 1:
        raise UserError(
            f"sharding {choice.sharding} reduces what trains together, and there is {', '.join(sorted(map(str, trained)))}",
            "train all parameters in one dtype, or choose ddp",
        )
    hybrid, again = choice.sharding == "fsdp2-hybrid", choice.sharding != "fsdp2-no-reshard"
    sizes = (choice.nodes, ranks.size // choice.nodes) if hybrid else (ranks.size,)
    mesh = init_device_mesh(ranks.device.type, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    for layer in itertools.chain.from_iterable(layers for _, layers in find_stacks(model)):
        fully_shard(layer, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if again else False, mp_policy=policy)
    return Shards(model, ranks, choice.nodes if hybrid else 1, mesh.get_group("replicate") if hybrid else None)
