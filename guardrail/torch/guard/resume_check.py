"""Check a resumed run against facts that its checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from guardrail.core.errors import UsageError
from guardrail.core.events.run_state import Note
from guardrail.core.records.spans import MAX_NAMED
from guardrail.torch.guard.context import RunContext
from guardrail.torch.measure.reduction import StepReduction
from guardrail.torch.state.rank_agreement import require_equal

AHEAD = 8  # samples after the cursor that a checkpoint holds


class ResumeCheck:
    """Compares a resumed run with what its checkpoint says.

    Args:
        reduction: knows which parameters are trained.
        fixed_batch_loss: loss on one fixed batch, same on every rank; None: it is not compared.
        scheduled_lr: the scheduled learning rate as a function of the step; None: it is not
            compared.
        fingerprints: a resume with another "data" is refused; any other change is noted.
    """

    def __init__(
        self,
        ctx: RunContext,
        *,
        reduction: StepReduction,
        fixed_batch_loss: Callable[[], float] | None = None,
        scheduled_lr: Callable[[int], float] | None = None,
        fingerprints: Mapping[str, Any] | None = None,
    ) -> None:
        self._ctx = ctx
        self._reduction = reduction
        self._fixed_batch_loss, self._scheduled_lr = fixed_batch_loss, scheduled_lr
        self.fingerprints = dict(fingerprints or {})

    def require_same_data(self) -> None:
        """Check that all ranks have the same sample order and fingerprints. A collective.

        Raises:
            UsageError: they differ; raised on every rank.
        """
        order = self._ctx.order.order
        facts: dict[str, Any] = {
            "the number of samples": order.n_samples,
            "the seed of the sample order": order.seed,
            "the sample order": "as stored",
        }
        if order.shuffled:
            facts["the sample order"] = "shuffled"
        for name, value in self.fingerprints.items():
            facts[f"the fingerprint of {name}"] = value
        require_equal(facts, self._ctx.ranks.gather)

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for the check; the fixed batch is run for it."""
        ctx = self._ctx
        journal = {}
        if not ctx.recorder.has_waiting:  # else the last lines are not on disk yet
            journal["journal_seq"] = ctx.history.seq
        facts: dict[str, Any] = {
            "world": ctx.ranks.world,
            "order": self._order_facts(),
            "order_ahead": ctx.order.order.samples(ctx.order.cursor, ctx.order.cursor + AHEAD),
            "identity": {**self.fingerprints, "run_id": ctx.history.run_id, **journal},
            "frozen": self._reduction.frozen_names(),
            "without_gradient": self._reduction.names_without_gradient(),
        }
        if self._fixed_batch_loss is not None:
            facts["fixed_loss"] = self._fixed_batch_loss()
        return facts

    def check(self, extra: dict[str, Any], saved_rate: float) -> dict[str, str]:
        """Return for schedule, data order, trained parameters and loss "ok" or what differs.

        Weights are compared by `TrainingState`.

        Args:
            extra: what was saved with the checkpoint besides tensors.
            saved_rate: learning rate that was loaded with it.

        Raises:
            UsageError: the fingerprint of the data has changed.
        """
        check = {}
        if self._scheduled_lr is not None:
            expected = self._scheduled_lr(self._ctx.progress.step + 1)
            check["schedule"] = "ok"
            if not math.isclose(saved_rate, expected, rel_tol=0.01):
                check["schedule"] = (
                    f"learning rate {saved_rate:.4g}, the schedule has {expected:.4g}"
                )
        check["data"] = "ok"
        if "frozen" in extra:
            check["trained"] = self._check_trained(extra)
        same = self._is_same_setup(extra)
        stored = extra.get("fixed_loss")
        if stored is not None and self._fixed_batch_loss is not None:
            now = self._fixed_batch_loss()
            tolerance = 1e-3
            if same:
                tolerance = 0.0
            check["loss"] = "ok"
            if not math.isclose(now, stored, rel_tol=tolerance):
                check["loss"] = f"fixed batch gives {now!r}, was {stored!r}"
        return check

    def _is_same_setup(self, extra: dict[str, Any]) -> bool:
        """Return whether ranks and fingerprints are the same: then arithmetic is, to the bit."""
        same = bool(extra.get("world") == self._ctx.ranks.world)
        for key, value in self.fingerprints.items():
            saved = extra.get("identity", {}).get(key, value)
            if saved == value:
                continue
            if key == "data":
                raise UsageError(
                    f"the fingerprint of the data was {saved} when this run was saved and is "
                    f"{value} now: resuming would train on other data"
                )
            same = False
            message = f"{key} has changed since step {extra['step']} was saved"
            self._ctx.recorder.write(Note(message=message))
        return same

    def refuse_other_order(self, extra: dict[str, Any]) -> None:
        """Raise UsageError where positions that the run has read would hold other samples now."""
        ctx = self._ctx
        order, cursor = ctx.order.order, int(extra["cursor"])
        was = extra.get("order") or {}
        if not was and (started := ctx.history.started) is not None:
            was = {"samples": started.samples, "seed": started.order_seed}
        if not cursor and not ctx.history.spans:
            return
        ahead = order.samples(cursor, cursor + AHEAD)
        changed = [
            f"{name} is {now} and was {was[name]} when step {extra['step']} was saved"
            for name, now in self._order_facts().items()
            if was.get(name) is not None and was[name] != now
        ]
        if not changed and extra.get("order_ahead", ahead) != ahead:
            changed = [
                f"the samples from position {cursor} on are {ahead} and were {extra['order_ahead']}"
            ]
        if changed:
            raise UsageError(
                f"the sample order has changed: {'; '.join(changed)}. The rest of the epoch would "
                "repeat some samples and miss others. Resume with the saved order (data.seed, "
                "data.order, the same data), or begin a new run"
            )

    def _order_facts(self) -> dict[str, Any]:
        order = self._ctx.order.order
        return {"samples": order.n_samples, "seed": order.seed, "shuffled": order.shuffled}

    def _check_trained(self, extra: dict[str, Any]) -> str:
        """Compare which parameters are trained. From now on missing gradients are noted."""
        reduction = self._reduction
        reduction.expect_gradients(without=extra["without_gradient"])
        saved, now = set(extra["frozen"]) & reduction.all_names, set(reduction.frozen_names())
        differ = [f"{name} was trained and is frozen now" for name in sorted(now - saved)]
        differ += [f"{name} was frozen and is trained now" for name in sorted(saved - now)]
        if not differ:
            return "ok"
        rest = ""
        if len(differ) > MAX_NAMED:
            rest = f", and {len(differ) - MAX_NAMED} more"
        return ", ".join(differ[:MAX_NAMED]) + rest
