"""A checkpoint is whole or not there, whatever happens to the process or the disk while it is written."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oomph.errors import RunError
from oomph.live.checkpoint import MANIFEST, Checkpoints, damage, step_of

FILES = {"model.safetensors": b"weights" * 3000, "optimizer/state.bin": b"moments" * 2000, "trainer.json": b"{}"}


def writer(content: bytes = b"") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, data in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data + content)

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_found_and_as_many_as_asked_for_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() is None
    for step in (5, 10, 15):
        saved = checkpoints.save(step, writer(str(step).encode()))
        assert checkpoints.newest() == saved
        assert step_of(saved) == step
    assert names(tmp_path / "checkpoints") == ["step-00000010", "step-00000015"]
    assert (saved / "trainer.json").read_bytes() == b"{}15"
    assert damage(saved) == ""


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("harm", ["gone", "short", "changed"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path: Path, name: str, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    before, after = checkpoints.save(1, writer()), checkpoints.save(2, writer())
    path = after / name
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-2] if harm == "short" else bytes([data[0] ^ 1]) + data[1:])
    told: list[str] = []
    assert checkpoints.newest(told.append) == before
    assert len(told) == 1
    assert after.name in told[0]
    assert (name if name != MANIFEST else "manifest") in told[0]


def test_a_step_that_is_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(7, writer(b"old"))
    saved = checkpoints.save(7, writer(b"new"))
    assert (saved / "trainer.json").read_bytes() == b"{}new"
    assert names(tmp_path) == ["step-00000007"]


def test_one_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    saved = checkpoints.save(7, writer())
    saved.rename(tmp_path / f".replaced-{saved.name}")
    (tmp_path / f".unfinished-{saved.name}").mkdir()
    assert checkpoints.newest() == saved
    assert names(tmp_path) == [saved.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failing_disk_is_said_and_earlier_ones_stay(tmp_path: Path, code: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    before = checkpoints.save(1, writer())

    def failing(folder: Path) -> None:
        writer()(folder)
        raise OSError(code, os.strerror(code))

    with pytest.raises(RunError, match=r"step 2 cannot be written") as raised:
        checkpoints.save(2, failing)
    assert os.strerror(code) in str(raised.value)
    assert "--resume" in raised.value.hint
    assert checkpoints.newest() == before
    assert names(tmp_path) == [before.name]


def test_what_reads_back_otherwise_costs_no_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    before = checkpoints.save(1, writer())
    monkeypatch.setattr("oomph.live.checkpoint.damage", lambda path: "" if path == before else "a bit has flipped")
    with pytest.raises(RunError, match="a bit has flipped"):
        checkpoints.save(2, writer())
    assert checkpoints.newest() == before


def test_another_versions_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, keep=1).save(1, writer())
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps(manifest | {"schema": 99}))
    assert "another version, schema 99" in damage(saved)


SAVES_FOR_EVER = """
import itertools, sys
from pathlib import Path
from oomph.live.checkpoint import Checkpoints

def write(folder):
    for number in range(6):
        (folder / f"{number}.bin").write_bytes(bytes([step % 251]) * 200_000)

checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
for step in itertools.count(1):
    checkpoints.save(step % 5 + 1 if step > 5 else step, write)
    print(step, flush=True)
"""


def test_a_run_that_is_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    drawn = random.Random(0)
    for kill in range(50):
        process = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(drawn.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        found = Checkpoints(tmp_path, keep=2).newest()
        assert found is not None, f"nothing is left after kill {kill}"
        contents = {path.read_bytes()[:1] for path in found.glob("*.bin")}
        assert len(contents) == 1
        assert len(list(found.glob("*.bin"))) == 6
