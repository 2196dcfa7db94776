"""Compare the configured settings of this start with those that a checkpoint restores.

`load_state_dict` restores settings together with state: learning rate, weight decay, betas, T_max.
Where the user has changed a setting since the checkpoint was saved, the present value is used, and
the difference is noted.

A setting counts as changed when its value at the start of the run that saved differs from its value
at this start. So one that changes during a run, such as the momentum of a one-cycle schedule, is
restored as it was saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiplicativeLR

from guardrail.torch.state import json_codec as plain
from guardrail.torch.state.state_numbers import set_group_value
from guardrail.torch.state.training_state import TrainingState

NEXT_RATE = "learning rate of the next step"  # key of a difference
# Keys of a parameter group that a schedule begins with.
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
# Keys of a scheduler's state that are counters or memory, not settings.
PROGRESS = frozenset(
    {
        "last_epoch",
        "_step_count",
        "_last_lr",
        "_get_lr_called_within_step",
        "_is_initial",
        "T_cur",
        "next_step",
        "zclip",
    }
)
MOST_STEPS = 1_000_000  # of a schedule that is stepped again from its beginning: 10 to 20 s


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting whose saved value differs from the configured one.

    Attributes:
        used: the value that holds from now on.
    """

    key: str
    saved: Any
    configured: Any
    used: Any

    def sentence(self) -> str:
        """Return the difference in words."""
        choice = f"{format_value(self.used)} is used"
        if self.used == self.configured:
            choice = "the configured value is used"
        saved, configured = format_value(self.saved), format_value(self.configured)
        return f"{self.key}: saved {saved}, configured {configured}; {choice}"


class WrittenSettings:
    """The settings of optimizers and schedulers before a checkpoint is loaded.

    Args:
        state: at the start of this process, nothing loaded yet.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        scalars = state.scalars()
        self._groups: list[list[dict[str, Any]]] = []
        for groups in scalars["groups"]:
            self._groups.append([group["values"] for group in groups])
        self._schedulers: list[Any] = scalars["schedulers"]

    def facts(self) -> dict[str, Any]:
        """Return the settings as plain values, to be saved with a checkpoint."""
        return {"groups": self._groups, "schedulers": self._schedulers}

    def take(self, saved: Mapping[str, Any] | None, *, step: int) -> list[Difference]:
        """Use the settings of this start that have changed. Call it after a checkpoint was loaded.

        Args:
            saved: `facts()` of the run that saved; None where an older version saved. Then
                differences are only returned.
            step: applied updates so far; the scheduler was stepped after each of them.

        Returns:
            The differences; empty where nothing differs, and then nothing was changed.
        """
        rates = [float(group["lr"]) for group, _, _ in self._groups_with(saved)]
        found = self._take_group_settings(saved)
        found += self._scheduler_differences(saved)
        self._reschedule(
            step, changed=self._rates_changed(saved) or any("." in d.key for d in found)
        )
        for old, (group, _, _) in zip(rates, self._groups_with(saved), strict=True):
            new = float(group["lr"])
            if new != old:
                found.append(Difference(key=NEXT_RATE, saved=old, configured=new, used=new))
        return _distinct(found)

    # -- parameter groups --------------------------------------------------------------------------

    def _groups_with(
        self, saved: Mapping[str, Any] | None
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]]:
        """Yield each parameter group: (live group, its values now, its values then or None)."""
        then: list[dict[str, Any] | None] = []
        if saved:
            then = [values for groups in saved["groups"] for values in groups]
        number = 0
        for optimizer, groups in zip(self._state.optimizers, self._groups, strict=True):
            then += [None] * len(groups)  # for groups that the run that saved did not have
            for group, now in zip(optimizer.param_groups, groups, strict=True):
                yield group, now, then[number]
                number += 1

    def _take_group_settings(self, saved: Mapping[str, Any] | None) -> list[Difference]:
        """Use all changed settings but the rates, which a schedule decides."""
        found = []
        for group, now, then in self._groups_with(saved):
            for key in sorted(now.keys() - set(RATES)):
                live, configured = plain.encode(group.get(key)), now[key]
                if live == configured or (then is not None and then.get(key) == configured):
                    continue
                used = live
                if then is not None:
                    set_group_value(group, key, plain.decode(configured))
                    used = configured
                found.append(Difference(key=key, saved=live, configured=configured, used=used))
        return found

    def _rates_changed(self, saved: Mapping[str, Any] | None) -> bool:
        for _, now, then in self._groups_with(saved):
            if then is not None and any(then.get(key) != now.get(key) for key in RATES):
                return True
        return False

    # -- schedules ---------------------------------------------------------------------------------

    def _scheduler_differences(self, saved: Mapping[str, Any] | None) -> list[Difference]:
        """Return changed settings in the state of schedulers: T_max, gamma, milestones."""
        found: list[Difference] = []
        before: list[Any] = []
        if saved:
            before = saved["schedulers"]
        for scheduler, now, then in zip(
            self._state.schedulers, self._schedulers, before, strict=False
        ):
            if isinstance(now, Mapping) and isinstance(then, Mapping):
                for key in sorted(now.keys() - PROGRESS):
                    if then.get(key) != now[key]:
                        name = f"{type(scheduler).__name__}.{key}"
                        found.append(
                            Difference(
                                key=name, saved=then.get(key), configured=now[key], used=now[key]
                            )
                        )
        return found

    def _reschedule(self, step: int, *, changed: bool) -> None:
        """Set the rates to those of the schedules as they are configured now.

        Args:
            changed: whether rates or settings of a schedule are known to differ.
        """
        schedulers = self._state.schedulers
        if not schedulers and changed:
            self._set_written_rates()
        for scheduler in schedulers:
            if not isinstance(scheduler, LRScheduler):
                # Parameter groups were loaded last. The rates of an object that sets rates when it
                # loads must count, so it is loaded again.
                scheduler.load_state_dict(plain.decode(plain.encode(scheduler.state_dict())))
        counted: list[tuple[LRScheduler, Any]] = []
        for scheduler, now in zip(schedulers, self._schedulers, strict=True):
            if isinstance(scheduler, LRScheduler):
                counted.append((scheduler, now))
        if not counted or step > MOST_STEPS:
            return
        if changed or any(_holds_function(one) for one, _ in counted):
            self._set_written_rates()
            _step_again(counted, step)

    def _set_written_rates(self) -> None:
        for group, now, _ in self._groups_with(None):
            for key in RATES:
                if key in now:
                    set_group_value(group, key, plain.decode(now[key]))


def _step_again(schedulers: list[tuple[LRScheduler, Any]], steps: int) -> None:
    """Step schedulers of torch from their beginning: a rate may follow from the rate before it."""
    with warnings.catch_warnings():
        # torch warns where the optimizer was not stepped before.
        warnings.simplefilter("ignore")
        for scheduler, beginning in schedulers:
            scheduler.load_state_dict(plain.decode(beginning))
        for _ in range(steps):
            for scheduler, _beginning in schedulers:
                scheduler.step()


def _holds_function(scheduler: Any) -> bool:
    """Return whether the rates come from a function, which the state does not hold."""
    if isinstance(scheduler, LambdaLR | MultiplicativeLR):
        return True
    return any(_holds_function(inner) for inner in getattr(scheduler, "_schedulers", ()))


def _distinct(differences: list[Difference]) -> list[Difference]:
    """Return each difference once, although several parameter groups may have it."""
    found: list[Difference] = []
    for difference in differences:
        if difference not in found:
            found.append(difference)
    return found


def format_value(value: Any) -> str:
    """Return a saved value as a user writes it."""
    decoded = plain.decode(value)
    if isinstance(decoded, Tensor):
        decoded = decoded.item()
    if isinstance(decoded, float):
        return f"{decoded:.6g}"
    return str(decoded)
