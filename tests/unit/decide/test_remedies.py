"""What holds for every remedy in `guardrail.decide.remedies.registry`, and how one is added."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from guardrail.core.guard_options import EFFECTS, ESCALATION, EscalationStep, GuardOptions
from guardrail.core.records.verdicts import Cause, Remedy
from guardrail.decide.remedies.base import EscalationRemedy
from guardrail.decide.remedies.effects import compute_factor, format_effect, resets_moments
from guardrail.decide.remedies.registry import (
    BY_ACTION,
    REMEDIES,
    SCREEN_NAMES,
    find_effect,
    index_remedies,
)
from tests.support.places import ROOT, TESTS
from tests.support.texts import numbers_in

CAUSES = [None, *Cause]


@pytest.fixture(params=REMEDIES, ids=lambda cls: cls.action)
def cls(request: pytest.FixtureRequest) -> type[EscalationRemedy]:
    """Each remedy."""
    remedy: type[EscalationRemedy] = request.param
    return remedy


def entry(cls: type[EscalationRemedy], **changes: Any) -> EscalationStep:
    return EscalationStep(action=cls.action, **changes)


def test_it_says_what_it_is(cls: type[EscalationRemedy]) -> None:
    assert cls.action and cls.help.endswith(".") and cls.__doc__
    assert set(cls.keys) <= set(EscalationStep.__struct_fields__) - {"action"}
    assert not (cls.ends_run and cls.effect), "the run is over: no step would have the effect"


def test_names_are_unique_and_those_of_the_configuration() -> None:
    assert len(BY_ACTION) == len(REMEDIES)
    assert get_args(get_type_hints(EscalationStep)["action"]) == tuple(BY_ACTION)
    assert {step.action for step in ESCALATION} <= set(BY_ACTION)
    assert set(EFFECTS) == {cls.effect for cls in REMEDIES if cls.effect}


@pytest.mark.parametrize("attribute", ["action", "effect"])
def test_a_subclass_cannot_replace_its_base(attribute: str) -> None:
    class Lower(BY_ACTION["lower_lr"]):  # type: ignore[misc]
        pass

    with pytest.raises(TypeError, match=f"Lower and LowerLr both have {attribute} = "):
        index_remedies([*REMEDIES, Lower], attribute)


@pytest.mark.parametrize("uses", [0, 1, 3])
def test_effects_are_factors_that_return_to_one(cls: type[EscalationRemedy], uses: int) -> None:
    effects = cls(entry(cls, factor=0.5, hold_steps=4, ramp_steps=6), uses=uses).effects(11)
    for effect in effects:
        remedy = find_effect(effect.kind)
        factors = [remedy.factor_at(effect, step) for step in range(1, 200)]
        assert factors[:10] == [1.0] * 10 and factors[-1] == 1.0
        assert all(0.0 < factor <= 1.0 for factor in factors)
        assert factors[10:] == sorted(factors[10:]), "it only returns"
        if effect.hold_steps:
            assert factors[10] == 0.5**2**uses and effect.hold_steps == 4 * 2**uses
        assert msgspec.json.decode(msgspec.json.encode(effect), type=Remedy) == effect
        assert str(effect.from_step) in format_effect(effect)
    assert bool(effects) == bool(cls.effect)


def test_an_effect_has_its_names_in_the_report_and_on_the_screen(
    cls: type[EscalationRemedy],
) -> None:
    effect = Remedy(kind=cls.effect, value=0.5, from_step=1234, hold_steps=2000, ramp_steps=3)
    if cls.effect and cls is not BY_ACTION["reset_moments"]:
        assert cls.report_line(effect) == (
            f"{cls.report_name} x 0.5 from step 1,234, hold 2,000 steps, ramp 3 steps"
        )
        assert cls.report_name and SCREEN_NAMES[cls.effect] == cls.screen_name != ""
    else:
        assert cls.effect not in SCREEN_NAMES and cls.report_name == ""


def test_the_reset_of_moments_has_its_own_line_in_the_report() -> None:
    effect = Remedy(kind="moments", value=1.0, from_step=1234)
    assert numbers_in(find_effect("moments").report_line(effect)) == [1234]


def test_effects_of_a_kind_multiply_down_to_a_floor() -> None:
    lower = BY_ACTION["lower_lr"](EscalationStep(action="lower_lr", factor=0.5))
    effects = [*lower.effects(3), *lower.effects(3)]
    assert compute_factor(effects, "lr", 3) == 0.25
    assert compute_factor(effects, "lr", 3, floor=0.4) == 0.4
    assert compute_factor(effects, "clip", 3) == 1.0
    assert not resets_moments(effects, 3)


def test_the_window_and_the_restored_state(cls: type[EscalationRemedy]) -> None:
    for uses in range(4):
        remedy = cls(entry(cls, steps=50), uses=uses)
        assert remedy.window_factor() == (2 ** (1 + uses) if cls.widens_window else 1)
        for before in (1, 30, 500):
            target = remedy.move_target(before)
            assert 1 <= target <= before
            assert (target == before) is (not cls.restores_older_state or before == 1)


def test_it_fits_some_cause(cls: type[EscalationRemedy]) -> None:
    fits = [cls.fits(cause, embedding_leads=leads) for cause in CAUSES for leads in (False, True)]
    assert any(fits)


def test_an_effect_of_another_version_has_a_sentence_and_no_factor_of_its_kind() -> None:
    effect = Remedy(kind="of_another_version", value=0.5, from_step=7, hold_steps=3)
    assert format_effect(effect).startswith("of_another_version x 0.5 from step 7")
    line = find_effect(effect.kind).report_line(effect)
    assert line == "of_another_version x 0.5 from step 7, hold 3 steps, ramp 0 steps"
    assert compute_factor([effect], "lr", 7) == 1.0


def test_the_embedding_is_not_shrunk_with_a_factor_of_one() -> None:
    shrink = BY_ACTION["shrink_embedding"]
    assert shrink.first_effects(GuardOptions(), 5)[0].from_step == 5  # type: ignore[attr-defined]
    assert shrink.first_effects(GuardOptions(embed_factor=1.0), 5) == ()  # type: ignore[attr-defined, call-arg]


# -- one that is added

USE = """
import json
from guardrail.core.config import load_guard_options
from guardrail.decide.controller import Controller
from guardrail.decide.remedies.effects import format_effect
from guardrail.decide.remedies.registry import BY_ACTION
from tests.support.class_docs import fill_remedies
from tests.support.feed import BATCH, obs, warmed

controller = Controller(load_guard_options("guard.toml"))
step = warmed(controller)
for streak in range(3):
    verdict = controller.observe(
        obs(step, 9.0, 0.5, first=(step - 1 + streak) * BATCH, streak=streak)
    )
print(json.dumps({
    "escalation": verdict.escalation,
    "effects": [[effect.kind, effect.value, effect.hold_steps] for effect in verdict.remedies],
    "sentences": [format_effect(effect) for effect in verdict.remedies],
    "help": BY_ACTION["calm_down"].help,
    "reason": verdict.reason,
    "page": fill_remedies(open("remedies.md").read()),
}))
"""


def test_a_remedy_is_added_by_one_file_and_its_line(tmp_path: Any) -> None:
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "guardrail", tmp_path / "guardrail", ignore=no_caches)
    remedies = tmp_path / "guardrail" / "decide" / "remedies"
    shutil.copy(TESTS / "support" / "examples" / "calm_down.py", remedies)
    registry = (remedies / "registry.py").read_text()
    first = "from guardrail.decide.remedies.halt import Halt\n"
    line = "from guardrail.decide.remedies.calm_down import CalmDown\n"
    registry = registry.replace(first, line + first).replace(
        "    Halt,\n)", "    Halt,\n    CalmDown,\n)"
    )
    (remedies / "registry.py").write_text(registry)
    shutil.copy(ROOT / "docs" / "remedies.md", tmp_path)
    (tmp_path / "guard.toml").write_text(
        '[guard]\nescalation = [{ action = "skip" }, { action = "calm_down", factor = 0.25, hold_steps = 9 }]\n'
    )
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["escalation"] == "calm_down"
    assert found["effects"] == [["lr", 0.25, 9], ["clip", 0.25, 9]]
    assert found["reason"].endswith("; ".join(["", *found["sentences"]]))
    assert [numbers_in(sentence)[0] for sentence in found["sentences"]] == [0.25, 0.25]
    assert f"| `calm_down` | {found['help']} |" in found["page"]
