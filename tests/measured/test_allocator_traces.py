"""Real runs, request by request: the simulated allocator makes the same segments and returns the same addresses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from oomph.core.allocator import AddressPolicy, Allocator, AllocatorSettings, DriverAddresses
from oomph.units import GIB, MIB

FOLDER = Path(__file__).parent / "allocator-traces"
TRACES = ["lm_ctx128_fullstep", "lm_ctx256_forward_mixed", "lm_med128_training"]


@dataclass
class Outcome:
    """What a simulated trace did: segments made and given back, and how many addresses it had in common with the trace."""

    allocator: Allocator
    segments: list[int] = field(default_factory=list)
    released: list[set[int]] = field(default_factory=list)
    same: int = 0
    other: int = 0


def load(name: str) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    base = trace["base"]
    for key in ("start_segments", "start_blocks"):
        trace[key] = [(address + base, *rest) for address, *rest in trace[key]]
    trace["events"] = [(action, address + base, nbytes) for action, address, nbytes, _ in trace["events"]]
    return trace


def driver_releases(events: list[tuple[str, int, int]]) -> Iterator[tuple[int, set[int]]]:
    """(position, addresses) of each uninterrupted row of segments that went back to the driver."""
    row: set[int] = set()
    for position, (action, address, _) in enumerate([*events, ("", 0, 0)]):
        if action == "s":
            row.add(address)
        elif row:
            yield position - len(row), row
            row = set()


def simulate(trace: dict[str, Any], settings: AllocatorSettings, driver_addresses: AddressPolicy | None = None) -> Outcome:
    """Runs the trace's requests. Segment addresses come from the trace unless given, and so do calls of `empty_cache`."""
    made = iter([(address, nbytes) for action, address, nbytes in trace["events"] if action == "S"])
    beyond = max(address for _, address, _ in trace["events"]) + 64 * GIB

    def driver(nbytes: int) -> int:
        outcome.segments.append(nbytes)
        address, made_bytes = next(made, (0, 0)) if driver_addresses is None else (driver_addresses(nbytes), nbytes)
        return address if nbytes == made_bytes else beyond + len(outcome.segments) * 64 * GIB

    outcome = Outcome(Allocator(settings=settings, address_policy=driver))
    allocator = outcome.allocator
    allocator.adopt(trace["start_segments"], trace["start_blocks"])
    placed = {address: address for address, _, _ in trace["start_blocks"]}
    emptied = {position for position, _ in driver_releases(trace["events"])}
    for position, (action, address, nbytes) in enumerate(trace["events"]):
        if position in emptied:
            before = set(allocator.segments)
            allocator.empty_cache()
            outcome.released.append(before - set(allocator.segments))
        elif action == "a":
            placed[address] = allocator.malloc(nbytes)
            outcome.same += placed[address] == address
            outcome.other += placed[address] != address
        elif action == "f":
            allocator.free(placed.pop(address))
    return outcome


def reserved_peak(trace: dict[str, Any]) -> int:
    reserved: int = sum(nbytes for _, nbytes in trace["start_segments"])
    peak = reserved
    for action, _, nbytes in trace["events"]:
        reserved += {"S": nbytes, "s": -nbytes}.get(action, 0)
        peak = max(peak, reserved)
    return peak


@pytest.mark.parametrize("name", TRACES)
def test_a_real_run_is_reproduced(name: str) -> None:
    trace = load(name)
    outcome = simulate(trace, AllocatorSettings())
    allocator, end = outcome.allocator, trace["end"]
    assert outcome.segments == [nbytes for action, _, nbytes in trace["events"] if action == "S"]
    assert outcome.released == [row for _, row in driver_releases(trace["events"])]
    assert allocator.reserved == end["reserved_bytes"]
    assert allocator.peak_reserved == reserved_peak(trace)
    assert (allocator.allocated, allocator.requested) == (end["allocated_bytes"], end["requested_bytes"])
    assert outcome.other == 0, f"{outcome.other} of {outcome.same + outcome.other} blocks are at another address"


@pytest.mark.parametrize("name", TRACES)
def test_reserved_bytes_come_out_right_without_knowing_the_addresses(name: str) -> None:
    trace = load(name)
    outcome = simulate(trace, AllocatorSettings(), DriverAddresses())
    assert outcome.segments == [nbytes for action, _, nbytes in trace["events"] if action == "S"]
    assert outcome.allocator.reserved == trace["end"]["reserved_bytes"]
    assert outcome.allocator.peak_reserved == reserved_peak(trace)


def test_the_traces_are_long_enough_to_tell() -> None:
    actions = [action for name in TRACES for action, _, _ in load(name)["events"]]
    assert actions.count("a") > 15_000
    assert actions.count("S") > 1_000
    assert actions.count("s") > 400


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(AllocatorSettings(max_split_size_bytes=20 * MIB), id="split limit"),
        pytest.param(AllocatorSettings(roundup_power2_divisions=2), id="powers of two"),
    ],
)
def test_other_rules_do_not_reproduce_it(name: str, settings: AllocatorSettings) -> None:
    assert simulate(load(name), settings).other > 0
