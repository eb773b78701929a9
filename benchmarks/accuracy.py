"""Writes docs/accuracy.md: predictions beside what was measured.

``accuracy.json`` keeps the predictions of the rows in tests/measured; ``--write`` makes them anew, which takes some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any, NamedTuple

from oomph.core.kept import read_rows

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "tests" / "measured"
PAGE = ROOT / "docs" / "accuracy.md"
RESULTS = Path(__file__).with_suffix(".json")
TEMPLATE = Path(__file__).with_suffix(".txt")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
NUMBERS = ("loaded", "forward", "backward", "optimizer", "allocated", "reserved")
LARGE = 0.001


class Row(NamedTuple):
    """A measured row: its key, group, the numbers of both sides, and why they differ."""

    key: str
    attention: str
    weights: str
    predicted: dict[str, int]
    measured: dict[str, int]
    cause: str = ""

    def error(self, number: str) -> float:
        """Predicted minus measured, as a fraction of measured."""
        return self.predicted[number] / self.measured[number] - 1

    @property
    def exact(self) -> bool:
        """Whether all numbers are equal."""
        return self.predicted == self.measured


def by_path(name: str) -> ModuleType:
    """A module of tests/measured by its file, the same one for everybody."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, MEASURED / f"{name.removeprefix('measured_')}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def predict() -> dict[str, Any]:
    """What ``accuracy.json`` holds: the versions, and the predictions by the row's key."""
    rows, quantised = by_path("measured_rows"), by_path("quantized_rows")
    return {
        "versions": {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES},
        "none": {key: dataclasses.asdict(rows.predicted(key)) for key in rows.UNQUANTISED},
        "nf4": {key: dataclasses.asdict(quantised.predicted(key)) for key in quantised.QUANTISED},
    }


def measured_rows(results: dict[str, Any], weights: str) -> list[Row]:
    """The published rows with these weights, each with its prediction."""
    rows = by_path("measured_rows")
    cause = getattr(by_path("quantized_rows"), "cause", None) if weights == "nf4" else None
    found = []
    for row in rows.ROWS:
        key, run = rows.name(row), row["run"]
        if run["quantization"] != weights:
            continue
        kept = results[weights][key]
        predicted = kept["point"] if weights == "nf4" else kept
        truth = dataclasses.asdict(rows.Peaks.of(row["measured"]))
        found.append(Row(key, run["attn_impl"], weights, predicted, truth, cause(key) if cause else ""))
    return found


def page(results: dict[str, Any]) -> str:
    """The text of docs/accuracy.md."""
    plain, nf4 = measured_rows(results, "none"), measured_rows(results, "nf4")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        results["versions"],
        exact=sum(row.exact for row in plain),
        plain=len(plain),
        unquantised=_table(plain),
        quantised=_table(nf4) + "\n\n" + _intervals(nf4, results["nf4"]),
        summary=_summary([*plain, *nf4]),
        causes=_causes([*plain, *nf4]),
        contributed=_contributed(sorted((MEASURED / "gpu").glob("*.jsonl"))),
    )


def _distinct(rows: Iterable[Row]) -> list[Row]:
    """The rows without equal repetitions."""
    return list({(row.key, *row.measured.values()): row for row in rows}.values())


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first `text` columns are words."""
    ruler = ["---" if number < text else "---:" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows))


def _table(rows: Iterable[Row]) -> str:
    """Both peaks in bytes, and the differences of all numbers."""

    def cells(row: Row) -> list[str]:
        differences = [f"{row.predicted[number] - row.measured[number]:+,}" for number in NUMBERS]
        return [row.key, f"{row.predicted['allocated']:,}", f"{row.predicted['reserved']:,}", *differences]

    head = ["step", "allocated", "reserved", *(f"{number} ±" for number in NUMBERS)]
    return _lines(head, map(cells, _distinct(rows)))


def _intervals(rows: Iterable[Row], results: dict[str, Any]) -> str:
    def cells(row: Row) -> list[str]:
        low, high = results[row.key]["low"]["reserved"], results[row.key]["high"]["reserved"]
        truth = row.measured["reserved"]
        return [row.key, f"{low:,}", f"{truth:,}", f"{high:,}", "yes" if low <= truth <= high else "no"]

    return _lines(["step", "reserved, low", "measured", "high", "inside"], map(cells, _distinct(rows)))


def _summary(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.attention, row.weights), []).append(row)
    lines = []
    for (attention, weights), members in groups.items():
        for number in ("allocated", "reserved"):
            errors = [row.error(number) for row in members]
            numbers = statistics.median(map(abs, errors)), statistics.mean(errors), max(errors, key=abs)
            median, mean, worst = (f"{100 * value:.3f}" for value in numbers)
            kind = "16 bits" if weights == "none" else weights
            lines.append([attention, kind, number, str(len(members)), median, f"{float(mean):+.3f}", f"{float(worst):+.3f}"])
    return _lines(["attention", "weights", "bytes", "rows", "median", "mean", "worst"], lines, 3)


def _causes(rows: Sequence[Row]) -> str:
    lines = []
    for row in _distinct(rows):
        large = [number for number in NUMBERS if abs(row.error(number)) > LARGE]
        if large:
            which = ", ".join(f"{number} {100 * row.error(number):+.2f} %" for number in large)
            lines.append([row.key, row.weights, which, row.cause])
    return _lines(["step", "weights", "difference", "cause"], lines, 4) if lines else "None."


def _contributed(files: Iterable[Path]) -> str:
    lines = []
    for measurement in (row.measurement for file in files for row in read_rows(file)):
        if measurement.device != "cuda":
            continue
        rung = measurement.stages[0].rungs[0]
        if rung.measured is None:
            continue
        cells = [measurement.recipe, measurement.stages[0].name, str(rung.choice.micro_batch), measurement.gpu]
        for number in ("allocated_peak_bytes", "reserved_peak_bytes"):
            predicted, truth = getattr(rung.predicted, number), getattr(rung.measured, number)
            cells += [f"{predicted:,}", f"{truth:,}", f"{predicted - truth:+,}"]
        versions = ", ".join(f"{name} {version}" for name, version in measurement.versions.items())
        lines.append([*cells, f"{versions}, driver {measurement.driver}"])
    if not lines:
        return "None yet."
    head = ["recipe", "stage", "micro-batch", "GPU", "allocated, predicted", "measured", "±"]
    return _lines([*head, "reserved, predicted", "measured", "±", "versions"], lines, 2)


def main() -> None:
    """Writes the page, with ``--write`` from new predictions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the predictions anew")
    if parser.parse_args().write:
        RESULTS.write_text(json.dumps(predict(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
