"""Loading ahead: the plan's order whatever the workers, mistakes at the step that they belong to, limits of the machine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oomph.errors import UserError
from oomph.live.data.collating import Prepared
from oomph.live.data.encoding import Cost
from oomph.live.data.loading import Limits, Loaded, Loader, Setting, advise, machine_limits
from oomph.live.data.resources import free_bytes, usable_cores

TOKENS = torch.zeros(8, dtype=torch.long)


def sample(index: int) -> Prepared:
    return Prepared(index, str(index), TOKENS, TOKENS, (), Cost(8, 0, 8, 0, 0, 8))


def plan(step: int) -> list[int]:
    return [step * 10 + slot for slot in range(step % 4 + 1)]


@given(changes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=6), first=st.integers(0, 5))
@settings(max_examples=25)
def test_the_order_is_the_plans_whatever_the_workers_are(changes: list[tuple[int, int]], first: int) -> None:
    loader = Loader(sample, plan, first, 12, Setting(*changes[0]))
    seen = []
    for loaded in loader:
        seen.append((loaded.step, [item.index for item in loaded.samples]))
        loader.change(Setting(*changes[loaded.step % len(changes)]))
    loader.close()
    assert seen == [(step, plan(step)) for step in range(first, 12)]


def test_samples_are_prepared_ahead_by_as_many_workers_as_are_set() -> None:
    running, most, prepared = 0, 0, []
    lock, go_on = threading.Lock(), threading.Event()

    def prepare(index: int) -> Prepared:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        go_on.wait(5)
        with lock:
            running -= 1
            prepared.append(index)
        return sample(index)

    loader = Loader(prepare, lambda step: [2 * step, 2 * step + 1], 0, 50, Setting(3, 8))

    def release() -> None:
        give_up = time.monotonic() + 5
        while most < 3 and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(0.05)
        go_on.set()

    threading.Thread(target=release).start()
    first = loader.next()
    assert most == 3
    assert first.decode_seconds >= first.wait_seconds > 0.05
    while len(prepared) < 10:
        time.sleep(0.01)
    assert sorted(prepared) == list(range(10))
    assert [item.index for item in loader.next().samples] == [2, 3]
    loader.close()
    assert len(prepared) < 100


def test_a_bad_sample_is_said_at_its_own_step() -> None:
    def prepare(index: int) -> Prepared:
        if index == 30:
            raise UserError("data.json[30]: the image is gone")
        return sample(index)

    loader = Loader(prepare, plan, 0, 6, Setting(2, 50))
    assert [loader.next().step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"data.json\[30\]"):
        loader.next()
    loader.close()


def test_a_data_set_is_loaded_by_threads_as_by_hand(workshop: Any, open_data: Callable[..., Any], talk: Any) -> None:
    records = [
        talk("<image>", "A dog." * number, image=workshop.noise(f"{number}.png", (40, 30), number)) for number in range(1, 7)
    ]
    data = open_data(workshop.recipe(workshop.write("a.json", records)))
    order = data.order(seed=3)
    loader = Loader(data.prepare, lambda step: order.step(step, 4, 2.0), 0, order.steps(2.0, 4), Setting(4, 12))
    steps = list(loader)
    loader.close()
    assert [len(step.samples) for step in steps] == [4, 4, 4]
    for step in steps:
        for loaded, index in zip(step.samples, order.step(step.step, 4, 2.0), strict=True):
            own = data.prepare(index)
            assert (loaded.index, loaded.name) == (index, own.name)
            assert torch.equal(loaded.ids, own.ids)
            assert torch.equal(loaded.images[0]["pixel_values"], own.images[0]["pixel_values"])
    os.unlink(workshop.pictures / "3.png")
    with pytest.raises(UserError, match=r"a.json\[2\]: the image '3.png' is not in the folder"):
        data.prepare(2)


LIMITS = Limits(workers=8, bytes=None)
EIGHT = [sample(0)] * 8


def test_workers_follow_what_decoding_needs() -> None:
    one = Setting(1, 16)
    assert advise(one, Loaded(0, EIGHT, 0.0, 0.5), 1.0, LIMITS) == one
    assert advise(one, Loaded(0, EIGHT, 0.5, 2.4), 1.0, LIMITS).workers == 3
    assert advise(one, Loaded(0, EIGHT, 5.0, 100.0), 1.0, LIMITS).workers == 8
    assert advise(Setting(4, 16), Loaded(0, EIGHT, 0.2, 1.0), 1.0, LIMITS).workers == 5
    assert advise(Setting(4, 16), Loaded(0, EIGHT, 0.0, 1.7), 1.0, LIMITS).workers == 4
    assert advise(Setting(8, 16), Loaded(0, EIGHT, 0.0, 0.5), 1.0, LIMITS).workers == 1
    assert advise(one, Loaded(0, EIGHT, 0.1, 0.0), 0.0, LIMITS).workers == 8


def test_prepared_samples_stay_within_the_memory() -> None:
    loaded = Loaded(0, EIGHT, 0.0, 0.5)
    size = EIGHT[0].nbytes
    assert advise(Setting(1, 4), loaded, 1.0, LIMITS).ahead == 16
    assert advise(Setting(1, 4), loaded, 1.0, Limits(8, 12 * size)).ahead == 12
    assert advise(Setting(1, 4), loaded, 1.0, Limits(8, 2 * size)).ahead == 8


def test_a_loader_that_waits_gets_more_workers() -> None:
    def prepare(index: int) -> Prepared:
        time.sleep(0.01)
        return sample(index)

    loader = Loader(prepare, lambda step: range(8 * step, 8 * step + 8), 0, 5, Setting(1, 8))
    changed = [loader.adapt(loaded, 0.03, Limits(8, None)) for loaded in loader]
    loader.close()
    assert changed[0]
    assert loader.setting.workers >= 3
    assert loader.setting.ahead == 16


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


def test_cores_are_those_of_the_container(tmp_path: Path) -> None:
    own = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == own
    assert usable_cores(write(tmp_path / "a", cpu_dot_max="150000 100000\n")) == min(own, 2)
    assert usable_cores(write(tmp_path / "b", cpu_dot_max="50000 100000\n")) == 1
    assert usable_cores(write(tmp_path / "c", cpu_dot_max="max 100000\n")) == own
    old = {"cpu__cpu_dot_cfs_quota_us": "-1\n", "cpu__cpu_dot_cfs_period_us": "100000\n"}
    assert usable_cores(write(tmp_path / "d", **old)) == own
    assert usable_cores(write(tmp_path / "d", **old | {"cpu__cpu_dot_cfs_quota_us": "100000\n"})) == 1


def test_memory_is_that_of_the_container(tmp_path: Path) -> None:
    machine = tmp_path / "meminfo"
    machine.write_text("MemTotal: 100 kB\nMemAvailable:     90 kB\n", encoding="ascii")
    assert free_bytes(tmp_path, machine) == 90 << 10
    assert free_bytes(tmp_path, tmp_path / "gone") is None
    assert free_bytes(write(tmp_path / "a", memory_dot_max="5000", memory_dot_current="3000"), machine) == 2000
    assert free_bytes(write(tmp_path / "b", memory_dot_max="max", memory_dot_current="3000"), machine) == 90 << 10
    old = {"memory__memory_dot_limit_in_bytes": "9223372036854771712", "memory__memory_dot_usage_in_bytes": "3000"}
    assert free_bytes(write(tmp_path / "c", **old), machine) == 90 << 10
    assert machine_limits().workers >= 1
