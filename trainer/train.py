"""The training loop. It uses guardrail as a custom loop would."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from guardrail import Guard, LoopHooks, RankLayout, RunDirectory, SampleOrder, Step
from guardrail.core.config import check_settings
from guardrail.core.errors import DataError, Interrupted, RunDirectoryError
from guardrail.core.events.run_state import Note
from guardrail.core.records.status import Phase
from guardrail.core.toml_file import dump_toml
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.run_lock import RunLock
from guardrail.rundir.stop_signals import StopSignals
from guardrail.torch.state.collectives import gather_objects
from guardrail.torch.state.rank_agreement import require_equal
from trainer.build import attach_stabilisers, build_clip, build_model, build_objective
from trainer.config.config import Config
from trainer.data.corpus import Corpus
from trainer.data.loader import Loader
from trainer.faults.fault_injection import Faults
from trainer.loop.batch_source import BatchSource
from trainer.loop.corpus_setup import CorpusSetup
from trainer.loop.evaluation import Evaluation
from trainer.loop.passes import AccumulatedPasses, RankPasses
from trainer.loop.pipeline_passes import PipelinePasses
from trainer.loop.replays import BatchReplays
from trainer.loop.sample_texts import SampleTexts
from trainer.optim.registry import build_optimizers
from trainer.parallel.data_parallel import (
    distribute_model,
    find_stage_position,
    make_accelerator,
    make_scaler,
)
from trainer.stabilisers.scheduler import Scheduler
from trainer.stabilisers.zclip import ZClip

LOCK_SECONDS = 60.0  # the ranks of an earlier start may need this long to end


class Trainer:
    """One rank of a run.

    Args:
        config: the configuration. One that was built in Python is converted and checked like a
            file.
        run: the run directory; None trains in memory, for tests and benchmarks.
        signals, heartbeat: of this process, installed by the entry point.

    Raises:
        ConfigError: the configuration is not valid.
        DataError: there is no usable text.
        Interrupted: asked to stop during set-up.
    """

    def __init__(
        self,
        config: Config,
        *,
        run: RunDirectory | None = None,
        signals: StopSignals | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.config = config = checked_config(config)
        self.run_directory = run
        self.signals = signals or StopSignals()
        self.heartbeat = heartbeat
        self.rank = int(os.environ.get("RANK", "0"))
        self._lock: RunLock | None = None
        if run is not None and self.rank == 0:
            self._lock = lock_run(run)
        setup = CorpusSetup(config, run=run, signals=self.signals, heartbeat=heartbeat)
        self.corpus = Corpus.open(setup.prepare())
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        self._stop_if_asked()
        # Before the model is built: another corpus may have another vocabulary.
        if config.world > 1:
            require_equal({"the fingerprint of data": self.corpus.fingerprint}, gather)
        self.data_rank = config.layout.data_rank(self.rank)
        self._build_data()
        self._build_model()
        self._build_passes()
        self._build_guard()

    # -- training ----------------------------------------------------------------------------------

    def train(self) -> Phase:
        """Train until the run ends; return how it ended."""
        self._note_data_problems()
        try:
            for step in self.guard:
                self.train_step(step)
                is_going_on = step.applied and self.guard.phase is None
                if is_going_on and self.evaluation.is_due(step.number):
                    self.evaluation.run(self.guard)
        finally:
            self.loader.close()
            if self._lock is not None:
                self._lock.release()
        assert self.guard.phase is not None
        return self.guard.phase

    def train_step(self, step: Step) -> None:
        """Run forward and backward over this rank's share of the batch; the guard does the rest."""
        following = self.guard.peek(step.batch)
        self.passes.micro_batches = self.batches.load(step, following)
        if self.faults:
            self.faults.damage_state(self.model, self.optimizers)
        if self.qk_clip is not None:
            self.qk_clip.forget_scores()
        result = self.passes.run(stoppable=True)
        if self.faults:
            self.faults.damage_gradients(self.model)
        step.finish(
            result.loss_sum,
            tokens=result.tokens,
            nominal_tokens=self.passes.nominal,
            incomplete=result.incomplete,
            # An evaluation must see weights that the guard has decided on.
            wait=self.evaluation.is_due(step.number),
        )

    def _note_data_problems(self) -> None:
        """Write bad records, or a rebuilt cache, to the journal."""
        report = self.corpus.report
        if self.run_directory is None or self.rank != 0:
            return
        if report.bad or report.rebuilt:
            for line in report.lines():
                self.run_directory.write_event(Note(message=line))

    # -- set-up ------------------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        """Raise Interrupted on all ranks if any of them was asked to stop. Collective.

        A rank that left alone would leave the others waiting for it.
        """
        asked = torch.tensor(float(self.signals.requested), device=self.device)
        if self.config.world > 1:
            dist.all_reduce(asked)
        if asked.item():
            raise Interrupted("asked to stop during set-up; nothing was trained that is not saved")

    def _build_data(self) -> None:
        """Build the sample order, the objective and the loader."""
        config, split = self.config, self.corpus.train
        if not len(split):
            raise DataError(
                "the training split holds no complete sample: give more text or a shorter sequence"
            )
        self.order = SampleOrder(
            samples=len(split),
            seed=config.data.seed,
            shuffled=config.data.order == "shuffled",
        )
        # Positions after which the data ends; None: endless.
        self.limit: int | None = None
        if config.train.epochs:
            self.limit = config.train.epochs * self.order.n_samples
        self.total_steps = config.train.steps or config.batch_plan.steps_for(self.limit or 0)
        self.objective = build_objective(config, vocabulary=self.corpus.vocabulary)
        # Token ids of the model: those of the tokenizer, then those of the objective.
        self.vocabulary = self.corpus.vocabulary + self.objective.extra_ids
        self.loader = Loader(
            split,
            world=config.layout.data_ranks,
            rank=self.data_rank,
            pad=self.corpus.tokenizer.pad,
            micro_batches=config.micro_batches,
            micro_batch_size=config.micro_batch_size,
            objective=self.objective,
            growing=bool(config.train.batch_ramp.start),
        )
        self.faults = Faults(config.faults, rank=self.rank)
        self.batches = BatchSource(self.loader, self.faults, vocabulary=self.corpus.vocabulary)

    def _build_model(self) -> None:
        """Build the model, the optimizers and the stabilisers."""
        config = self.config
        torch.manual_seed(config.train.seed)
        model = build_model(config, vocabulary=self.vocabulary)
        self._stop_if_asked()
        self.model: nn.Module = distribute_model(model.to(self.device), config, self.accelerator)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.qk_clip = attach_stabilisers(self.model, self.optimizers, config)
        self.scaler = make_scaler(config, self.device)
        self.faults.attach(self.model, self.optimizers)

    def _build_passes(self) -> None:
        """Build what runs batches: for training, for evaluation and for replays."""
        config = self.config
        counts_loss = config.layout.counts_loss(self.rank)
        self.passes = self._choose_passes()
        self.evaluation = Evaluation(
            self.passes,
            self.corpus,
            self.objective,
            config,
            data_rank=self.data_rank,
            counts_loss=counts_loss,
            total_steps=self.total_steps,
        )
        self.replays = BatchReplays(
            self.passes, self.batches, qk_clip=self.qk_clip, counts_loss=counts_loss
        )

    def _choose_passes(self) -> RankPasses:
        common: dict[str, Any] = {
            "accelerator": self.accelerator,
            "scaler": self.scaler,
            "faults": self.faults,
            "rank": self.rank,
            "settle": lambda: self.guard.state.reshard(),
        }
        place = find_stage_position(self.model)
        if place is None:
            return AccumulatedPasses(self.model, self.config, signals=self.signals, **common)
        return PipelinePasses(
            self.model, self.config, place=place, vocabulary=self.vocabulary, **common
        )

    def _build_guard(self) -> None:
        config, schedule = self.config, self.config.schedule(steps=self.total_steps)
        clip = build_clip(config)
        zclip = clip if isinstance(clip, ZClip) else None
        batch_size: Any = config.train.batch_size
        if config.train.batch_ramp.start:
            batch_size = config.batch_plan
        texts = SampleTexts(self.corpus)
        self.guard = Guard(
            self.model,
            self.optimizers,
            config=config,
            data=self.order,
            batch_size=batch_size,
            scheduler=Scheduler(self.optimizers, schedule, zclip=zclip),
            scaler=self.scaler,
            total_steps=config.train.steps,
            limit=self.limit,
            clip=clip,
            run=self.run_directory,
            hooks=LoopHooks(
                replay=self.replays.replay,
                label_order_gain=self.replays.label_order_gain,
                rerun_forward=self.replays.rerun_forward,
                describe_samples=texts.describe_samples,
                sample_texts=texts.sample_texts,
                describe_tokens=texts.describe_tokens,
                fixed_batch_loss=self.evaluation.fixed_batch_loss,
                scheduled_lr=schedule,
                fingerprints={
                    "data": self.corpus.fingerprint,
                    "config": hashlib.sha256(dump_toml(config).encode()).hexdigest(),
                },
            ),
            ranks=RankLayout(
                device=self.device,
                counts_loss=config.layout.counts_loss(self.rank),
                shard_ranks=config.layout.shard_ranks(self.rank),
            ),
            signals=self.signals,
            heartbeat=self.heartbeat,
        )
        if config.data.quarantine:
            path = config.data.quarantine
            self.guard.cursor.quarantine.read(
                read_lines(path), source=path, samples=self.order.n_samples
            )


def train(config: Config, **parts: Any) -> Phase:
    """Build a `Trainer` with these arguments and train to the end; return how the run ended."""
    return Trainer(config, **parts).train()


def checked_config(config: Config | Mapping[str, Any]) -> Config:
    """Return a configuration that was built in Python, converted and checked like a file.

    Raises ConfigError.
    """
    result = check_settings(config, Config)
    base = Path.cwd()
    result.check(base=base)
    return result.resolved(base=base)


def lock_run(run: RunDirectory) -> RunLock:
    """Take the trainer's lock of a run; wait up to `LOCK_SECONDS` for an earlier start to end."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return run.lock("trainer")
        except RunDirectoryError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def gather(value: Any) -> list[Any]:
    """Return the value of every rank, by rank. Collective."""
    return gather_objects(value, dist.get_world_size())


def read_lines(path: str) -> list[str]:
    """Return the lines of the file that data.quarantine names. Raises DataError."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"data.quarantine = {path!r}: expected a readable file of sample ids ({reason})"
        ) from error
