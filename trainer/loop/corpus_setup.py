"""The corpus of a run, before its ranks meet: one rank of each node builds it, the others wait."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from guardrail.core.errors import DataError, Interrupted
from guardrail.core.records.status import Status
from guardrail.rundir.heartbeat import Heartbeat, this_start
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import StopSignals
from trainer.config.config import Config
from trainer.data.nodes import NodesReady, node_of_this_rank
from trainer.data.prepare import prepare_corpus, wait_for_corpus


class CorpusSetup:
    """Prepares the corpus of one rank.

    Args:
        run: the run directory; None: a run in memory, of one process.
        signals: stop requests to this process.
        heartbeat: is given the progress, so that this rank does not count as hung; None: none.
    """

    def __init__(
        self,
        config: Config,
        *,
        run: RunDirectory | None,
        signals: StopSignals,
        heartbeat: Heartbeat | None,
    ) -> None:
        self._config, self._run = config, run
        self._signals, self._heartbeat = signals, heartbeat

    def prepare(self) -> Path:
        """Return the folder of the corpus.

        The first rank of each node builds the shards. The others wait without a collective, since a
        collective would time out. With several nodes, all ranks also wait for the other nodes: they
        meet only when every corpus is there.

        Raises:
            DataError: there is no usable text.
            Interrupted: asked to stop.
        """
        launch = self._config.launch
        is_builder = os.environ.get("LOCAL_RANK", "0") == "0"
        if launch.nodes == 1 or self._run is None:
            if is_builder:
                return self._build(report=lambda text: None)
            return self._wait_for_builder(self._progress_of_rank_0)
        nodes = NodesReady(self._run, nodes=launch.nodes, node=node_of_this_rank())
        try:
            if is_builder:
                folder = self._build(report=nodes.report_progress)
            else:
                folder = self._wait_for_builder(nodes.read_progress)
        except (Interrupted, DataError) as error:
            if is_builder:
                nodes.set_failed(error)
            raise
        if is_builder:
            nodes.set_ready()
        nodes.wait_for_all(
            stop=self._builder_has_ended, seconds=launch.setup_timeout, alive=self._say
        )
        return folder

    def _build(self, *, report: Callable[[str], None]) -> Path:
        """Build the corpus of this node, or find it in the cache."""

        def progress(text: str, share: float) -> None:
            self._say(f"{text} {share:.0%}")
            report(f"{text} {share:.0%}")

        data = self._config.data
        try:
            return prepare_corpus(data, progress=progress, stop=lambda: self._signals.requested)
        except Interrupted:
            # If the corpus is in the cache, the other ranks go on. They wait for this one where all
            # ranks agree on the stop, so it goes on too.
            with contextlib.suppress(DataError):
                return wait_for_corpus(data, stop=lambda: False, seconds=0.0)
            raise

    def _wait_for_builder(self, read_progress: Callable[[], str]) -> Path:
        """Wait for the corpus as long as the builder's progress changes."""
        known = ""

        def progress_of_builder() -> str:
            nonlocal known
            text = read_progress()
            if text != known:
                known = text
                self._say(f"waiting for the corpus: {text}")
            return known

        return wait_for_corpus(
            self._config.data,
            stop=self._builder_has_ended,
            seconds=self._config.launch.setup_timeout,
            builder=progress_of_builder,
        )

    def _builder_has_ended(self) -> bool:
        """Return whether no corpus will come: the builder of this start was stopped or failed.

        A waiting rank that is itself asked to stop goes on waiting until all ranks can agree.
        """
        status = self._status()
        return status is not None and status.phase.ended and status.start == this_start()

    def _progress_of_rank_0(self) -> str:
        status = self._status()
        return "" if status is None else status.progress

    def _status(self) -> Status | None:
        return None if self._run is None else self._run.read_status()

    def _say(self, text: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.say(text)
