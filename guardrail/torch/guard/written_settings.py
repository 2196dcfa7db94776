"""Settings that were written for this start, held against those that a checkpoint brings back.

`load_state_dict` brings back settings together with state: learning rate, weight decay, betas,
T_max. Where the user has written something else since the checkpoint was saved, what is written now
is used, and every difference is named.

A setting counts as changed when the value at the start of the run that saved differs from the value
at this start. So one that moves while a run goes on, such as the momentum of a one-cycle schedule,
is restored as it was saved.
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

# Keys of a parameter group that a schedule begins with.
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
# Keys of a scheduler's state that count, or remember: no settings.
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
MOST_STEPS = 1_000_000  # of a schedule that is counted through again: 10 to 20 s


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting whose saved value is not the one written now; `used` is the one that holds from
    here on.
    """

    key: str
    saved: Any
    configured: Any
    used: Any

    def sentence(self) -> str:
        choice = (
            "the configured value is used"
            if self.used == self.configured
            else f"{shown(self.used)} is used"
        )
        return (
            f"{self.key}: saved {shown(self.saved)}, configured {shown(self.configured)}; {choice}"
        )


class WrittenSettings:
    """What optimizers and schedulers are set to before a checkpoint is loaded.

    Args:
        state: at the start of this process, nothing loaded yet.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        scalars = state.scalars()
        self._groups: list[list[dict[str, Any]]] = [
            [g["values"] for g in groups] for groups in scalars["groups"]
        ]
        self._schedulers: list[Any] = scalars["schedulers"]

    def facts(self) -> dict[str, Any]:
        """JSON-able, to be saved with a checkpoint."""
        return {"groups": self._groups, "schedulers": self._schedulers}

    def take(self, saved: Mapping[str, Any] | None, *, step: int) -> list[Difference]:
        """Call it when a checkpoint has been loaded: use what was written for this start where that
        was changed.

        Args:
            saved: `facts()` of the run that saved; None where an older version did. Then
            differences are only named.
            step: applied updates so far, after each of which the scheduler was stepped.

        Returns:
            What differs; empty where nothing does, and then nothing was touched.
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
                found.append(
                    Difference(
                        key="learning rate of the next step", saved=old, configured=new, used=new
                    )
                )
        return _distinct(found)

    # -- parameter groups --------------------------------------------------------------------------

    def _groups_with(
        self, saved: Mapping[str, Any] | None
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]]:
        """(live group, its values as written now, as written then or None), over all optimizers."""
        then = [values for groups in saved["groups"] for values in groups] if saved else []
        number = 0
        for optimizer, groups in zip(self._state.optimizers, self._groups, strict=True):
            for group, now in zip(optimizer.param_groups, groups, strict=True):
                yield group, now, then[number] if number < len(then) else None
                number += 1

    def _take_group_settings(self, saved: Mapping[str, Any] | None) -> list[Difference]:
        """All but the rates, which a schedule decides."""
        found = []
        for group, now, then in self._groups_with(saved):
            for key in sorted(now.keys() - set(RATES)):
                live, configured = plain.encode(group.get(key)), now[key]
                if live == configured or (then is not None and then.get(key) == configured):
                    continue
                if then is not None:
                    set_group_value(group, key, plain.decode(configured))
                used = live if then is None else configured
                found.append(Difference(key=key, saved=live, configured=configured, used=used))
        return found

    def _rates_changed(self, saved: Mapping[str, Any] | None) -> bool:
        return any(
            then is not None and any(then.get(key) != now.get(key) for key in RATES)
            for _, now, then in self._groups_with(saved)
        )

    # -- schedules ---------------------------------------------------------------------------------

    def _scheduler_differences(self, saved: Mapping[str, Any] | None) -> list[Difference]:
        """Settings inside of a scheduler's state: T_max, gamma, milestones."""
        found = []
        before = saved["schedulers"] if saved else []
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
        """Set the rates to those of the schedules as they are written now.

        Args:
            changed: whether rates or settings of a schedule are known to be others.
        """
        schedulers = self._state.schedulers
        if not schedulers and changed:
            self._set_written_rates()
        for scheduler in schedulers:
            if not isinstance(scheduler, LRScheduler):
                # Parameter groups were loaded last. An object that sets rates when it loads has the
                # last word here.
                scheduler.load_state_dict(plain.decode(plain.encode(scheduler.state_dict())))
        counted = [
            (s, now)
            for s, now in zip(schedulers, self._schedulers, strict=True)
            if isinstance(s, LRScheduler)
        ]
        if (
            counted
            and step <= MOST_STEPS
            and (changed or any(_holds_function(one) for one, _ in counted))
        ):
            self._set_written_rates()
            _count_through(counted, step)

    def _set_written_rates(self) -> None:
        for group, now, _ in self._groups_with(None):
            for key in RATES:
                if key in now:
                    set_group_value(group, key, plain.decode(now[key]))


def _count_through(schedulers: list[tuple[LRScheduler, Any]], steps: int) -> None:
    """Bring torch's schedulers from their beginning to a step: a rate may follow from the rate
    before it.
    """
    with warnings.catch_warnings():
        # torch expects a step of the optimizer before each of these
        warnings.simplefilter("ignore")
        for scheduler, beginning in schedulers:
            scheduler.load_state_dict(plain.decode(beginning))
        for _ in range(steps):
            for scheduler, _beginning in schedulers:
                scheduler.step()


def _holds_function(scheduler: Any) -> bool:
    """Whether its rates come from a function, which its state does not hold."""
    if isinstance(scheduler, LambdaLR | MultiplicativeLR):
        return True
    return any(_holds_function(inner) for inner in getattr(scheduler, "_schedulers", ()))


def _distinct(differences: list[Difference]) -> list[Difference]:
    """Each once, however many parameter groups have it."""
    found: list[Difference] = []
    for difference in differences:
        if difference not in found:
            found.append(difference)
    return found


def shown(value: Any) -> str:
    """A saved value as a user has written it."""
    plainly = plain.decode(value)
    if isinstance(plainly, Tensor):
        plainly = plainly.item()
    return f"{plainly:.6g}" if isinstance(plainly, float) else str(plainly)
