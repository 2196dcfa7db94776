"""How a command writes its argument, and what it says about a wrong one."""

from __future__ import annotations

import pytest

from guardrail.core.errors import UsageError
from guardrail.decide.control_commands.rollback import Rollback
from guardrail.decide.control_commands.skip import Skip
from guardrail.decide.control_commands.undo import Undo


@pytest.mark.parametrize("given", ["1e9", "9999999", "0", "2.5", "-1"])
def test_a_refused_number_is_shown_as_it_was_given(given: str) -> None:
    with pytest.raises(UsageError) as error:
        Skip.argument.parse("skip", given)
    assert str(error.value).endswith(f", not {given}")


def test_a_large_number_is_written_without_an_exponent() -> None:
    assert Skip.argument.check("skip", 9999999.0).endswith(", not 9999999")
    assert Rollback(1234567.0).write() == "rollback 1234567"
    assert Rollback(1234567.0).describe().endswith(" 1234567")
    assert Undo(1234567.0).describe().endswith(" 1234567")


@pytest.mark.parametrize("kind", [Rollback, Undo])
def test_nobody_is_told_to_write_nan_for_the_newest(kind: type[Rollback | Undo]) -> None:
    with pytest.raises(UsageError) as error:
        kind.argument.parse(kind.name, "abc")
    assert "nan" not in str(error.value) and "nothing" in str(error.value)
