"""What a user reads after a mistake: every problem at once, then the way out."""

from __future__ import annotations

import pytest

from oomph.errors import UntraceableError, UserError


def test_every_problem_has_its_line_and_the_hint_stands_apart() -> None:
    error = UserError(["stage 'align' has no batch", "unknown key 'lerning_rate'"], hint="did you mean 'learning_rate'?")
    assert error.render() == (
        "error: stage 'align' has no batch\nerror: unknown key 'lerning_rate'\n\nhint: did you mean 'learning_rate'?"
    )


def test_without_a_hint_nothing_follows_the_error() -> None:
    assert UserError("the file is empty").render() == "error: the file is empty"


def test_one_sentence_is_a_list_of_one() -> None:
    assert UserError("the file is empty").problems == ["the file is empty"]


def test_the_list_of_the_caller_is_not_kept() -> None:
    problems = ["first"]
    error = UserError(problems)
    problems.append("second")
    assert error.problems == ["first"]


def test_a_log_shows_all_problems() -> None:
    assert str(UserError(["first", "second"], hint="third")) == "first\nsecond"


def test_untraceable_models_are_reported_like_any_mistake() -> None:
    with pytest.raises(UserError, match="data-dependent"):
        raise UntraceableError("the router's shapes are data-dependent")
