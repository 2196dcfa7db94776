"""The training loop: guardrail.torch used as any loop of one's own would use it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from guardrail.core.config import checked, dump
from guardrail.core.errors import DataError, Interrupted, RunDirectoryError
from guardrail.core.records import Phase
from guardrail.core.text import visible
from guardrail.decide.sample_order import Batch, SampleOrder
from guardrail.rundir.heartbeat import Heartbeat, this_start
from guardrail.rundir.run_directory import RunDirectory, RunLock
from guardrail.rundir.stop_signals import StopSignals
from guardrail.torch.diagnose.per_sample import Rows
from guardrail.torch.guard.guard import Guard, Step
from guardrail.torch.state.rank_agreement import require_equal
from trainer.build import build_model, build_objective, clipping, stabilise
from trainer.config.config import Config
from trainer.data.corpus import Corpus
from trainer.data.loader import Loader, MicroBatch
from trainer.data.nodes import NodesReady, node_of_this_rank
from trainer.data.prepare import prepare, wait_prepared
from trainer.faults.fault_injection import Faults
from trainer.objectives.loss import IGNORED, reordered, z_penalty
from trainer.optim.optimizers import Scheduler, build_optimizers
from trainer.optim.stabilisers import ZClip
from trainer.parallel.data_parallel import (
    accumulating,
    distribute,
    is_sharded,
    loss_of,
    make_accelerator,
    make_scaler,
    place_of,
    seed_micro_batch,
    unwrapped,
)
from trainer.parallel.pipeline import Pipeline
from trainer.parallel.tensor_parallel import columns

LOCK_SECONDS = 60.0  # the ranks of an earlier start may need this long to die
FIXED_SAMPLES = 8  # whose loss a resumed model must reproduce, whatever the batch is now
MAX_DESCRIBED = 20_000  # samples whose documents are looked up for one journal line


def checked_config(config: Config | Mapping[str, Any]) -> Config:
    """A configuration built in Python, converted and checked as a file would be. Raises
    ConfigError.
    """
    result = checked(config, Config)
    base = Path.cwd()
    result.check(base=base)
    return result.resolved(base=base)


class Trainer:
    """One rank of a run.

    Args:
        config: the configuration; one that was built in Python is converted and checked like a
        file.
        run: the run directory; None trains in memory, for tests and benchmarks.
        signals, heartbeat: of this process, installed by the entry point.
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
        self._lock = self._take_lock() if run is not None and self.rank == 0 else None
        self.corpus = Corpus.open(self._prepare_data())
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        self._stop_if_asked()
        # before the model is built: another corpus may have another vocabulary
        if config.world > 1:
            require_equal({"the fingerprint of data": self.corpus.fingerprint}, gathered)
        self._build()

    def _build(self) -> None:
        config, corpus = self.config, self.corpus
        if not len(corpus.train):
            raise DataError(
                "the training split holds no complete sample: give more text or a shorter sequence"
            )
        order = SampleOrder(
            samples=len(corpus.train),
            seed=config.data.seed,
            shuffled=config.data.order == "shuffled",
        )
        self.data_rank = config.layout.data_rank(self.rank)
        limit = config.train.epochs * order.n_samples if config.train.epochs else None
        plan = config.batch_plan
        self.total_steps = config.train.steps or plan.steps(limit or 0)
        self.objective = build_objective(config, vocabulary=corpus.vocabulary)
        self.loader = Loader(
            corpus.train,
            world=config.layout.data_ranks,
            rank=self.data_rank,
            pad=corpus.tokenizer.pad,
            micro_batches=config.micro_batches,
            micro_batch_size=config.micro_batch_size,
            objective=self.objective,
            growing=bool(config.train.batch_ramp.start),
        )
        self.micro_batches: list[MicroBatch] = []  # of the last step
        # of a replay that asks for each row's loss
        self._rows: list[tuple[Tensor, Tensor]] | None = None
        # label tokens of a full batch
        self.nominal = config.train.batch_size * config.data.sequence_length
        torch.manual_seed(config.train.seed)
        model = build_model(config, vocabulary=corpus.vocabulary + self.objective.extra_ids)
        self._stop_if_asked()
        self.model = distribute(model.to(self.device), config, self.accelerator)
        self.loss_sum = loss_of(self.model)
        self.pipeline = self._pipeline()
        self.optimizers = build_optimizers(self.model, config.optim)
        self.qk_clip = stabilise(self.model, self.optimizers, config)
        self.scaler = make_scaler(config, self.device)
        schedule, clip = config.schedule(steps=self.total_steps), clipping(config)
        self.faults = Faults(config.faults, rank=self.rank)
        self.faults.attach(self.model, self.optimizers)
        self.guard = Guard.from_config(
            config,
            data=order,
            model=self.model,
            optimizer=self.optimizers,
            scheduler=Scheduler(
                self.optimizers, schedule, zclip=clip if isinstance(clip, ZClip) else None
            ),
            scaler=self.scaler,
            batch_size=plan if config.train.batch_ramp.start else config.train.batch_size,
            total_steps=config.train.steps,
            limit=limit,
            clip=clip,
            run=self.run_directory,
            device=self.device,
            counting=config.layout.counts(self.rank),
            holders=config.layout.holders(self.rank),
            signals=self.signals,
            heartbeat=self.heartbeat,
            describe=self._describe,
            texts=self._texts,
            tokens=self._tokens,
            rerun=self._rerun,
            replay=self._replay,
            structure=self._structure,
            fixed_loss=self._fixed_loss,
            lr_at=schedule,
            identity={
                "data": corpus.fingerprint,
                "config": hashlib.sha256(dump(config).encode()).hexdigest(),
            },
        )
        if config.data.quarantine:
            lines = _read_lines(config.data.quarantine)
            self.guard.cursor.quarantine.read(
                lines, source=config.data.quarantine, samples=order.n_samples
            )

    # -- training ----------------------------------------------------------------------------------

    def train(self) -> Phase:
        """Train until the run ends; returns how it ended."""
        if (
            self.run_directory is not None
            and self.rank == 0
            and (self.corpus.report.bad or self.corpus.report.rebuilt)
        ):
            for line in self.corpus.report.lines():
                self.run_directory.append("note", line)
        try:
            for step in self.guard:
                self.train_step(step)
                if step.applied and self.guard.phase is None and self._evaluation_due(step.number):
                    self._evaluate()
        finally:
            self.loader.close()
            if self._lock is not None:
                self._lock.release()
        assert self.guard.phase is not None
        return self.guard.phase

    def train_step(self, step: Step) -> None:
        """Forward and backward over this rank's share of the batch, then the verdict."""
        self.micro_batches = self.loader.load(step.batch)
        ahead = self.guard.ahead(step.batch)
        if ahead is not None:
            self.loader.prefetch(ahead)
        if self.faults:
            self.faults.batch(
                step=step.number, positions=step.batch.positions, repeated=step.repeated
            )
            self.faults.state(self.model, self.optimizers)
            self.micro_batches = self._spoiled(step.batch, self.micro_batches)
        if self.qk_clip is not None:
            self.qk_clip.begin()
        total, tokens, incomplete = (
            self._accumulated() if self.pipeline is None else self._pipelined(self.pipeline)
        )
        if self.faults:
            self.faults.gradients(self.model)
        # What an evaluation meets has been judged.
        due = self._evaluation_due(step.number)
        step.finish(
            total, tokens=tokens, nominal_tokens=self.nominal, incomplete=incomplete, wait=due
        )

    def _accumulated(self, *, stoppable: bool = True) -> tuple[Tensor, Tensor, bool]:
        """Micro-batch after micro-batch: (sum of losses, label tokens, whether a stop has left some
        out).
        """
        config = self.config
        total = torch.zeros((), device=self.device)
        tokens = torch.zeros((), device=self.device, dtype=torch.int64)
        incomplete = False
        for index, micro in enumerate(self.micro_batches):
            last = index == len(self.micro_batches) - 1
            if stoppable and self.guard.stopping and not last and not is_sharded(self.model):
                # Before the last micro-batch no rank waits for another: what is left can be given
                # back.
                incomplete = True
                continue
            inputs, labels = self._to_device(micro.tokens), self._to_device(micro.labels)
            if self.faults:
                labels = self.faults.labels(index, labels)
            self._throw(index)
            with accumulating(self.model, last=last):
                logits = self.model(inputs, **self._extra(micro.extra))
                if self.faults:
                    logits = self.faults.logits(index, logits)
                loss, count = self.loss_sum(logits, labels)
                self._tell_rows(index, logits, labels)
                if self.faults:
                    loss = self.faults.loss(index, self.model, loss, scale=self.scaler.get_scale())
                trained = loss
                if config.train.z_loss:
                    trained = loss + z_penalty(logits, labels, config.train.z_loss)
                self.accelerator.backward(self._scaled(trained))
            total += loss.detach()
            tokens += count
        return total, tokens, incomplete

    def _scaled(self, loss: Tensor) -> Tensor:
        """The summed loss of a micro-batch -> what its backward pass begins with; see
        trainer.objectives.loss.
        """
        return self.scaler.scale(loss * (self.config.layout.data_ranks / self.nominal))

    def _replay(self, batch: Batch, step: int, rows: Rows | None) -> tuple[Tensor, Tensor, float]:
        """Forward and backward over this rank's share of any batch; what is known of the last step
        stays as it is.
        """
        held, peaks = self.micro_batches, self.qk_clip.peaks() if self.qk_clip is not None else []
        self.micro_batches = self._again(batch, step)
        self._rows = [] if rows is not None else None
        try:
            once = (
                self._accumulated(stoppable=False)
                if self.pipeline is None
                else self._pipelined(self.pipeline)
            )
            if self.faults:
                self.faults.gradients(self.model)
            if rows is not None:
                none = torch.empty(0, device=self.device)
                # none on most stages of a pipeline
                told = self._rows or [(none, none)] * len(self.micro_batches)
                rows += [
                    (self.loader.positions(batch, index), *pair) for index, pair in enumerate(told)
                ]
        finally:
            self.micro_batches, self._rows = held, None
            if self.qk_clip is not None:
                self.qk_clip.put_back(peaks)
        total, tokens, _ = once
        return total, tokens, self.nominal

    @torch.no_grad()
    def _structure(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """(Loss sum, the same with each row's labels in another order, label tokens) of this rank's
        share.
        """
        peaks = self.qk_clip.peaks() if self.qk_clip is not None else []
        total = torch.zeros(3, device=self.device, dtype=torch.float64)
        try:
            for micro in self._again(batch, step):
                orders = (micro.labels, reordered(micro.labels, seeds=micro.sample_ids))
                total += self._losses(micro.tokens, orders, micro.extra)
        finally:
            if self.qk_clip is not None:
                self.qk_clip.put_back(peaks)
        return tuple(total.tolist()) if self.config.layout.counts(self.rank) else (0.0, 0.0, 0.0)

    def _again(self, batch: Batch, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of any batch, with what is wrong with its data; no fault is
        used up.
        """
        micro_batches = self.loader.read(batch)
        if not self.faults:
            return micro_batches
        self.faults.again(step=step, positions=batch.positions)
        return self._spoiled(batch, micro_batches)

    def _spoiled(self, batch: Batch, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        places = [self.loader.positions(batch, index) for index in range(len(micro_batches))]
        return self.faults.data(micro_batches, places, vocabulary=self.corpus.vocabulary)

    @torch.no_grad()
    def _tell_rows(self, index: int, logits: Tensor, labels: Tensor) -> None:
        """Where a replay asks for it: the loss sum and label tokens of each row, micro-batches in
        their order.
        """
        if self._rows is None:
            return
        assert index == len(self._rows)
        pairs = [
            self.loss_sum(logits[row : row + 1], labels[row : row + 1])
            for row in range(len(labels))
        ]
        self._rows.append(
            (torch.stack([loss for loss, _ in pairs]), torch.stack([count for _, count in pairs]))
        )

    def _rerun(self) -> None:
        """The forward passes of the last step once more, with the same dice."""
        for index, micro in enumerate(self.micro_batches):
            if self.pipeline is not None:
                self.pipeline.forward(self._to_device(micro.tokens), again=index)
                continue
            self._throw(index)
            self.model(self._to_device(micro.tokens), **self._extra(micro.extra))

    def _throw(self, index: int, chunk: int = 0) -> None:
        """The dice of a micro-batch of the last step, on this rank and in this chunk of its stage
        of a pipeline.
        """
        part = self.config.layout.dice(self.rank, chunk)
        seed_micro_batch(
            self.config.train.seed, self.micro_batches[index].position, self.data_rank, part
        )

    # -- pipeline ----------------------------------------------------------------------------------

    def _pipeline(self) -> Pipeline | None:
        place = place_of(self.model)
        if place is None:
            return None
        config = self.config
        vocabulary = self.corpus.vocabulary + self.objective.extra_ids
        return Pipeline(
            self.model,
            place,
            schedule=config.parallel.schedule,
            micro_batches=config.micro_batches,
            rows=config.micro_batch_size,
            length=config.data.sequence_length,
            stream=(
                config.data.sequence_length // unwrapped(self.model).stream_parts,
                config.model.width,
            ),
            outputs=len(
                columns(vocabulary, place=self.rank % config.layout.tp, ranks=config.layout.tp)
            ),
            device=self.device,
            begin=self._throw,
            loss=self._pipeline_loss,
        )

    def _pipelined(self, pipeline: Pipeline) -> tuple[Tensor, Tensor, bool]:
        """As `_accumulated`, by all stages together; the sum of losses on the last one, 0 on the
        others.
        """
        self._total = torch.zeros((), device=self.device)
        rows = [
            (self._to_device(micro.tokens), self._to_device(micro.labels))
            for micro in self.micro_batches
        ]
        tokens = torch.cat([inputs for inputs, _ in rows])
        targets = [labels for _, labels in rows]
        if self.faults:
            targets = [self.faults.labels(index, labels) for index, labels in enumerate(targets)]
        labels = torch.cat(targets)
        pipeline.train(tokens, labels)
        return self._total, (labels != IGNORED).sum(), False

    def _pipeline_loss(self, index: int, logits: Tensor, labels: Tensor) -> Tensor:
        if self.faults:
            logits = self.faults.logits(index, logits)
        loss, _ = self.loss_sum(logits, labels)
        self._tell_rows(index, logits, labels)
        if self.faults:
            loss = self.faults.loss(index, self.model, loss, scale=self.scaler.get_scale())
        self._total += loss.detach()
        return self._scaled(loss)

    def _extra(self, arrays: dict[str, Any]) -> dict[str, Tensor]:
        """What the objective gives the model besides tokens."""
        return {name: self._to_device(array) for name, array in arrays.items()}

    def _to_device(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor
        )

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.train.eval_every
        return (
            bool(every)
            and len(self.corpus.eval) > 0
            and (step % every == 0 or step == self.total_steps)
        )

    def _evaluate(self) -> None:
        """Mean held-out loss, nats a token, over the same samples each time; gives way to a stop at
        every batch.
        """
        config, split = self.config, self.corpus.eval
        self.guard.enter(Phase.EVAL)
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        size = config.micro_batch_size
        for index in range(config.train.eval_batches):
            if self.guard.poll_stop():
                return
            first = (index * config.layout.data_ranks + self.data_rank) * size
            ids = [sample for sample in range(first, first + size) if sample < len(split)]
            loss, count = self._loss_of(split, ids or [0])
            if ids and config.layout.counts(self.rank):
                sums += torch.stack([loss, count])
            self.guard.enter(Phase.EVAL)
        if config.world > 1:
            dist.all_reduce(sums)
        loss_total, tokens = sums.tolist()
        if tokens:
            self.guard.log_eval(loss_total / tokens)

    def _loss_of(self, split: Any, sample_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(sum of losses, label tokens) of some samples, float64, without dropout."""
        shown = self.objective(split.tokens(sample_ids), sample_ids)
        loss, count = self._losses(shown.tokens, (shown.labels,), shown.extra)
        return loss, count

    @torch.no_grad()
    def _losses(self, tokens: Any, orders: Sequence[Any], extra: dict[str, Any]) -> Tensor:
        """float64 [orders + 1]: the sum of losses with each of these labels, and label tokens;
        without dropout.
        """
        labels = [self._to_device(one) for one in orders]
        self.model.eval()
        try:
            if self.pipeline is None:
                return self._counted(
                    self.model(self._to_device(tokens), **self._extra(extra)), labels
                )
            logits = self.pipeline.forward(self._to_device(tokens))
            mine = torch.zeros(len(labels) + 1, device=self.device, dtype=torch.float64)
            return self.pipeline.from_last(
                mine if logits is None else self._counted(logits, labels)
            )
        finally:
            self.model.train()
            # FSDP2 keeps the root's parameters gathered after a forward pass without a backward
            # one, and would take the next update's step from that copy.
            self.guard.state.settle()

    def _counted(self, logits: Tensor, labels: Sequence[Tensor]) -> Tensor:
        pairs = [self.loss_sum(logits, one) for one in labels]
        return torch.stack([*(loss.double() for loss, _ in pairs), pairs[0][1].double()])

    def _fixed_loss(self) -> float:
        """Loss on the first samples of the data, the same on every rank: what a resumed model must
        reproduce.
        """
        split = self.corpus.eval if len(self.corpus.eval) else self.corpus.train
        loss, count = self._loss_of(split, range(min(FIXED_SAMPLES, len(split))))
        return float(loss / count.clamp(min=1))

    # -- set-up ------------------------------------------------------------------------------------

    def _take_lock(self) -> RunLock:
        assert self.run_directory is not None
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return self.run_directory.lock("trainer")
            except RunDirectoryError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _prepare_data(self) -> Path:
        """The first rank of each node builds the shards; the others wait for them without a
        collective to time out.

        So do all ranks for the other nodes, where there are some: the ranks do not meet before all
        corpora are there.
        """
        launch, first = self.config.launch, not int(os.environ.get("LOCAL_RANK", "0"))
        if launch.nodes == 1 or self.run_directory is None:
            return self._prepare_here(
                first, report=lambda text: None, builder=self._progress_of_rank_0
            )
        nodes = NodesReady(self.run_directory, nodes=launch.nodes, node=node_of_this_rank())
        try:
            folder = self._prepare_here(first, report=nodes.report, builder=nodes.text)
        except (Interrupted, DataError) as error:
            if first:
                nodes.give_up(error)
            raise
        if first:
            nodes.ready()
        nodes.wait(stop=self._builder_stopped, seconds=launch.setup_timeout, alive=self._say)
        return folder

    def _prepare_here(
        self, first: bool, *, report: Callable[[str], None], builder: Callable[[], str]
    ) -> Path:
        """The corpus on this node: built by its first rank, waited for by the others as long as
        `builder` changes.
        """
        data, seconds = self.config.data, self.config.launch.setup_timeout
        known = ""

        def watched() -> str:
            nonlocal known
            if (text := builder()) != known:
                known = text
                self._say(f"waiting for the corpus: {text}")  # or this rank would count as hung
            return known

        def progress(text: str, share: float) -> None:
            self._say(f"{text} {share:.0%}")
            report(f"{text} {share:.0%}")

        if not first:
            return wait_prepared(data, stop=self._builder_stopped, seconds=seconds, builder=watched)
        try:
            return prepare(data, progress=progress, stop=lambda: self.signals.requested)
        except Interrupted:
            # With a corpus that is there the others go on, and wait for this rank where they can
            # agree on the stop.
            with contextlib.suppress(DataError):
                return wait_prepared(data, stop=lambda: False, seconds=0.0)
            raise

    def _builder_stopped(self) -> bool:
        """Whether there will be no corpus: the builder of this start was stopped, or found no text
        that it could use.

        Asked to stop alone, a rank that waits goes on until all can agree.
        """
        status = self.run_directory.read_status() if self.run_directory is not None else None
        return status is not None and status.phase.ended and status.start == this_start()

    def _progress_of_rank_0(self) -> str:
        status = self.run_directory.read_status() if self.run_directory is not None else None
        return status.progress if status is not None else ""

    def _say(self, text: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.say(text)

    def _stop_if_asked(self) -> None:
        """All ranks together: one that left alone would leave the others waiting for it. A
        collective.
        """
        asked = torch.tensor(float(self.signals.requested), device=self.device)
        if self.config.world > 1:
            dist.all_reduce(asked)
        if asked.item():
            raise Interrupted("asked to stop during set-up; nothing was trained that is not saved")

    # -- the record --------------------------------------------------------------------------------

    def _describe(self, sample_ids: Sequence[int]) -> tuple[list[dict[str, Any]], int]:
        """The documents that samples were cut from, with an excerpt of the first ones."""
        split = self.corpus.train
        refs, total = split.documents_of(sample_ids[:MAX_DESCRIBED])
        excerpts = [split.excerpt(ref, limit=120) for ref in refs]
        return [
            msgspec.to_builtins(ref) | {"excerpt": text}
            for ref, text in zip(refs, excerpts, strict=True)
        ], total

    def _texts(self, sample_ids: Sequence[int]) -> list[str]:
        """The samples as text, nothing taken out of them."""
        return [
            self.corpus.tokenizer.decode(row) for row in self.corpus.train.tokens(list(sample_ids))
        ]

    def _tokens(self, token_ids: Sequence[int], sample_ids: Sequence[int]) -> list[dict[str, Any]]:
        """The text of each token, and how often the samples show it, before an objective takes
        anything out of them.
        """
        rows = self.corpus.train.tokens(list(sample_ids))[:, :-1]
        spelled = self.corpus.tokenizer.spelled
        return [
            {"text": visible(spelled(token), 40), "count": int((rows == token).sum())}
            for token in token_ids
        ]


def gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank; a collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _read_lines(path: str) -> list[str]:
    """The lines of the file that data.quarantine names. Raises DataError."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"data.quarantine = {path!r}: expected a readable file of sample ids ({reason})"
        ) from error


def train(config: Config, **parts: Any) -> Phase:
    """Build a Trainer and run it to its end."""
    return Trainer(config, **parts).train()
