"""Several ranks at once, over gloo: processes that are forked from one that has imported all there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

OnRanks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def on_ranks() -> Iterator[OnRanks]:
    """Runs a job of ``jobs.py`` on a number of ranks, and gives what it gave on each.

    A collective that waits for 60 seconds is a hang, and fails.
    """
    served = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zygote.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert served.stdin is not None
    assert served.stdout is not None
    requests, answers = served.stdin, served.stdout

    def run(ranks: int, job: str, deadline: float = 300, **arguments: Any) -> list[Any]:
        request = {"ranks": ranks, "job": job, "seconds": 60, "deadline": deadline, "arguments": arguments}
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        answer = json.loads(answers.readline())
        assert "error" not in answer, answer["error"]
        results: list[Any] = answer["results"]
        return results

    yield run
    requests.close()
    answers.close()
    served.wait(60)
