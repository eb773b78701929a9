"""Runs jobs over several ranks: imports once, then forks the ranks of each job.

    python zygote.py

reads one JSON object a line, ``{"ranks": 2, "job": name, "arguments": {}, "seconds": 60, "deadline": 300}``, and writes one a
line: what each rank gave, ``{"results": [...]}``, or ``{"error": text}``.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from oomph.live.ranks.group import Ranks


def _jobs() -> Any:
    spec = importlib.util.spec_from_file_location("ranks_jobs", Path(__file__).with_name("jobs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks_jobs"] = module
    spec.loader.exec_module(module)
    return module


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _rank(rank: int, request: dict[str, Any], port: int, pipe: int, jobs: Any) -> None:
    """One rank: runs the job and writes what it gave."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        ranks = Ranks.join("cpu", timedelta(seconds=request["seconds"]))
        found: dict[str, Any] = {"result": getattr(jobs, request["job"])(ranks, **request["arguments"])}
        if ranks.size > 1:
            dist.barrier()
        ranks.leave()
    except BaseException:
        found = {"error": f"rank {rank}: {traceback.format_exc()}"}
    with os.fdopen(pipe, "w") as stream:
        stream.write(json.dumps(found))
    os._exit(0)


def _run(request: dict[str, Any], jobs: Any) -> dict[str, Any]:
    port, children = _free_port(), []
    for rank in range(request["ranks"]):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            _rank(rank, request, port, write, jobs)
        os.close(write)
        children.append((pid, read))
    texts, deadline = {read: b"" for _, read in children}, time.monotonic() + request["deadline"]
    open_pipes = set(texts)
    while open_pipes and time.monotonic() < deadline:
        ready, _, _ = select.select(list(open_pipes), [], [], 0.5)
        for read in ready:
            piece = os.read(read, 1 << 16)
            texts[read] += piece
            if not piece:
                open_pipes.discard(read)
        if any(b'"error"' in texts[read][:10] for read in set(texts) - open_pipes):
            deadline = min(deadline, time.monotonic() + 5)
    for pid, read in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
    found = [json.loads(text) if text else {"error": "it hung or died"} for text in texts.values()]
    errors = [one["error"] for one in found if "error" in one]
    return {"error": "\n".join(errors)} if errors else {"results": [one["result"] for one in found]}


def main() -> None:
    """Serves until there are no more requests."""
    torch.set_num_threads(1)
    answers = os.dup(1)
    os.dup2(2, 1)
    jobs = _jobs()
    gc.freeze()
    with os.fdopen(answers, "w") as stream:
        for line in sys.stdin:
            stream.write(json.dumps(_run(json.loads(line), jobs)) + "\n")
            stream.flush()


if __name__ == "__main__":
    main()
