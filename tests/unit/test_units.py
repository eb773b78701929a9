"""Sizes are exact integers of bytes, and every printed number carries a binary unit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph import units

SCALES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (8 * units.MIB + units.MIB // 8, "8.1 MiB"),
        (units.GIB // 2, "0.50 GiB"),
        (8 * 32 * 2623 * 2623 * 4, "6.56 GiB"),
        (-512, "-512 B"),
        (-units.GIB, "-1.00 GiB"),
        (2048 * units.GIB, "2,048.00 GiB"),
    ],
)
def test_size_picks_the_unit_a_person_would(nbytes: int, text: str) -> None:
    assert units.size(nbytes) == text


@given(st.integers(-(2**50), 2**50))
def test_size_is_right_to_the_last_digit_shown(nbytes: int) -> None:
    number, unit = units.size(nbytes).split()
    digits = len(number.partition(".")[2])
    assert abs(float(number.replace(",", "")) * SCALES[unit] - nbytes) <= 0.5001 * SCALES[unit] / 10**digits


@given(st.integers(0, 2**60))
def test_size_keeps_the_order_of_sizes(nbytes: int) -> None:
    larger = nbytes + nbytes // 4 + 2
    assert units.parse_size(units.size(nbytes).replace(",", "")) <= units.parse_size(units.size(larger).replace(",", ""))


def test_gib_has_two_decimals_and_no_unit() -> None:
    assert units.gib(7_045_146_112) == "6.56"
    assert units.gib(0) == "0.00"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (640, "640"), (999_999, "999,999"), (9_200_000, "9.2 M"), (2_779_683_840, "2.78 B"), (1_026 * 10**9, "1.03 T")],
)
def test_count(number: int, text: str) -> None:
    assert units.count(number) == text


@given(st.integers(0, 2**70), st.sampled_from(sorted(SCALES)), st.sampled_from(["", " ", "  "]))
def test_parse_size_is_exact_for_whole_numbers(number: int, unit: str, space: str) -> None:
    assert units.parse_size(f" {number}{space}{unit} ") == number * SCALES[unit]


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1048576", 2**20), ("0.5GiB", 2**29), ("8.125 MiB", 8_519_680), ("0.1 KiB", 102), ("1.9B", 1)]
)
def test_parse_size_cuts_off_fractions_of_a_byte(text: str, nbytes: int) -> None:
    assert units.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "2 GB", "2gib", "-1 GiB", "1,000 B", "1e9", "nan", "2 GiB!", "1.B"])
def test_parse_size_says_what_it_wants(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: write a number and B, KiB, MiB, GiB or TiB"):
        units.parse_size(text)
