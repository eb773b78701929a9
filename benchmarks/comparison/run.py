"""Asks Oomph and three other estimators about the same training steps, and writes docs/comparison.md.

The other programs run in an environment of their own, `build/comparison`, which is made from requirements.txt where it is
missing, so that the project does not depend on them. Making it takes pip and whatever index it is set up for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from configurations import Row, lora_steps, planned, versions
from page import page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIREMENTS, RESULTS, PAGE = HERE / "requirements.txt", HERE / "results.json", ROOT / "docs" / "comparison.md"
ENVIRONMENT = ROOT / "build" / "comparison"


def main() -> None:
    """Collects the figures, from programs or from results.json, and prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_mutually_exclusive_group()
    figures.add_argument("--oomph-only", action="store_true", help="ask Oomph alone; the others' figures stay as recorded")
    figures.add_argument("--as-recorded", action="store_true", help="ask nobody: the page of the recorded figures")
    parser.add_argument("--write", action="store_true", help="write results.json and docs/comparison.md; else print the page")
    arguments = parser.parse_args()
    if arguments.as_recorded:
        results = recorded()
    else:
        rows = {"recipes": planned(), "lora": lora_steps()}
        results = kept(rows) if arguments.oomph_only else asked(rows)
    if arguments.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")
    else:
        print(page(results))


def recorded() -> dict[str, Any]:
    """The figures of the last run that was written."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


def kept(rows: dict[str, list[Row]]) -> dict[str, Any]:
    """New figures of Oomph beside the recorded ones of the others.

    Raises:
        SystemExit: the others were asked something else.
    """
    before = recorded()
    results: dict[str, Any] = {"versions": {**before["versions"], "oomph": versions()}}
    for table, now in rows.items():
        answers = {row["name"]: (row["given"], row["others"]) for row in before[table]}
        changed = [row.record["name"] for row in now if answers.get(row.record["name"], ({}, None))[0] != row.record["given"]]
        if changed:
            raise SystemExit(f"the other programs have to be asked again about: {', '.join(changed)}")
        results[table] = [{**row.record, "others": answers[row.record["name"]][1]} for row in now]
    return results


def asked(rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Oomph's figures and new ones of the others."""
    questions = [row.question for now in rows.values() for row in now]
    said = ask(questions)
    answers = iter(said["answers"])
    results: dict[str, Any] = {"versions": {"oomph": versions(), "others": said["versions"]}}
    return results | {table: [{**row.record, "others": next(answers)} for row in now] for table, now in rows.items()}


def ask(questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Has `tools.py` answer the questions in the other programs' environment, without the network."""
    python = environment()
    with tempfile.TemporaryDirectory() as folder:
        asking, answering = Path(folder, "questions.json"), Path(folder, "answers.json")
        asking.write_text(json.dumps(questions), encoding="utf-8")
        settings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([python, HERE / "tools.py", asking, answering], env=settings, stdout=sys.stderr, check=True)
        answers: dict[str, Any] = json.loads(answering.read_text(encoding="utf-8"))
    return answers


def environment() -> Path:
    """The interpreter of the other programs, made anew where their requirements have changed since."""
    python, made_from = ENVIRONMENT / "bin" / "python", ENVIRONMENT / REQUIREMENTS.name
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if not made_from.is_file() or made_from.read_text(encoding="utf-8") != wanted:
        print(f"installing into {ENVIRONMENT.relative_to(ROOT)} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        # DeepSpeed's kernels are not needed, and would ask for a CUDA compiler.
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS]
        subprocess.run(install, env={**os.environ, "DS_BUILD_OPS": "0"}, stdout=sys.stderr, check=True)
        made_from.write_text(wanted, encoding="utf-8")
    return python


if __name__ == "__main__":
    main()
