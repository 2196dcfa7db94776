"""Public reports about other tools, each with the behaviour that would have been right; numbered as
in their list.
"""

import errno
import math
import os
import shutil
import signal
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import guardrail.torch.checkpoint.disk_checkpoints
import guardrail.torch.checkpoint.rank_share
from guardrail.core.config import load_trainer_config
from guardrail.core.errors import CheckpointInvalid
from guardrail.core.events.decisions import VerdictGiven
from guardrail.core.records.commands import Command
from guardrail.core.records.findings import FindingKind
from guardrail.core.records.verdicts import Action
from guardrail.core.toml_file import dump_toml
from guardrail.decide.sample_order import SampleOrder
from guardrail.rundir.checkpoint_folders import checkpoint_dirs
from guardrail.rundir.manifest import MANIFEST, read_manifest, sealed
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.checkpoint.loader import CheckpointLoader
from guardrail.torch.guard.written_settings import NEXT_RATE
from guardrail.torch.state.training_state import TrainingState
from tests.support.ranks import run_ranks, wait_ranks
from tests.support.running import (
    BATCH,
    LENGTH,
    assert_same,
    corpus_of,
    final,
    new_run,
    of_kind,
    outcome,
    prompt_disk,
    spans,
    start_run,
    table,
    tiny,
    train,
    trained,
)
from tests.support.texts import numbers_in
from trainer.config.config import Config
from trainer.config.schedule import Schedule
from trainer.loop.evaluation import Evaluation
from trainer.train import Trainer


def fault(kind: str, step: int, **settings: Any) -> dict[str, Any]:
    """Strikes every attempt at the batch that step `step` would be made of."""
    return {"kind": kind, "first": (step - 1) * BATCH, "last": step * BATCH, **settings}


def stopped(config: Config, step: int) -> RunDirectory:
    """A run that was stopped by command after `step`."""
    run = new_run(config)
    run.send(Command(id="stop", kind="stop", at_step=step))
    assert train(run, config.world) == "stopped"
    return run


def check_of(run: RunDirectory) -> dict[str, str]:
    """What the last resume said of its own state."""
    return {key: value for key, value in of_kind(run, "resume_check")[-1].data.items()}


def samples_met(rank: int, path: Path) -> list[tuple[int, tuple[int, ...]]]:
    """Train or resume, and tell (step, sample ids in the order of the rows) of each applied
    step.
    """
    config = load_trainer_config(path / "config.toml")
    assert isinstance(config, Config)
    trainer = Trainer(config, run=RunDirectory.open(path))
    met = []
    for step in trainer.guard:
        rows = [sample for micro in trainer.loader.load(step.batch) for sample in micro.sample_ids]
        trainer.train_step(step)
        met.append((step.number, tuple(rows)))
    return met


def meet(run: RunDirectory, name: str) -> list[tuple[int, tuple[int, ...]]]:
    (met,) = run_ranks(samples_met, 1, run.path, folder=run.path / name, init=False)
    return met  # type: ignore[no-any-return]


# -- A. resume is not where it left off


def test_case_01_resume_in_a_later_epoch_goes_on_in_that_epochs_order(tmp_path: Path) -> None:
    """huggingface/accelerate#2016: after a resume in epoch >= 2 the loader yields the order of
    epoch 1.
    """
    config = tiny(tmp_path, data={"order": "shuffled"}, train={"steps": 0, "epochs": 3})
    config = _with_samples(config, 80)
    whole = meet(new_run(config), "whole")
    assert len(whole) == 30 and len({rows for _, rows in whole}) == 30
    run = new_run(config)
    run.send(Command(id="stop", kind="stop", at_step=14))
    first = meet(run, "first")
    manifest = read_manifest(checkpoint_dirs(run.checkpoints)[0])
    order = SampleOrder(samples=80, seed=config.data.seed)
    assert (manifest.step, manifest.cursor, order.epoch(manifest.cursor)) == (14, 14 * BATCH, 1)
    assert first + meet(run, "second") == whole
    assert check_of(run)["data"] == "ok"


def _with_samples(config: Config, samples: int) -> Config:
    """The same with a corpus of exactly that many samples."""
    file = Path(config.data.sources[0]) / "only.txt"
    shutil.rmtree(file.parent)
    file.parent.mkdir()
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(samples * LENGTH))
    file.write_text(text, encoding="ascii")
    assert len(corpus_of(config).train) == samples
    return config


@pytest.mark.fault("E15")
def test_case_01_another_order_is_refused_before_the_first_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same thread: the sampler's seed is checked, not trusted."""
    config = tiny(tmp_path, data={"order": "shuffled"}, train={"steps": 20})
    run = stopped(config, 10)
    data = msgspec.structs.replace(config.data, seed=config.data.seed + 1)
    run.write_config(dump_toml(msgspec.structs.replace(config, data=data)))
    lines, rows = len(run.events()), len(run.metrics())
    train(run, 1)
    (refusal,) = (line for line in capfd.readouterr().err.splitlines() if "data.seed" in line)
    assert numbers_in(refusal) == [config.data.seed + 1, config.data.seed, 10]
    assert len(run.metrics()) == rows
    assert [event.kind for event in run.events()[lines:]] == ["ended"], (
        "the refusal, and nothing else"
    )


def test_case_02_each_sample_once_an_epoch_through_a_resume_in_the_middle(tmp_path: Path) -> None:
    """wyim-pgl/transgenic#59: the permutation came from the global RNG: 15 samples twice, 15
    never.
    """
    config = _with_samples(
        tiny(tmp_path, data={"order": "shuffled"}, train={"steps": 0, "epochs": 2}), 64
    )
    run = new_run(config)
    run.send(Command(id="stop", kind="stop", at_step=3))
    met = [rows for _, rows in meet(run, "first")]
    torch.manual_seed(12345)  # the state of the global dice is nobody's business
    met += [rows for _, rows in meet(run, "second")]
    for epoch in (0, 1):
        ids = Counter(sample for rows in met[8 * epoch : 8 * epoch + 8] for sample in rows)
        assert ids == dict.fromkeys(range(64), 1)
    assert [*met[0], *met[1]] != [*met[8], *met[9]], "another permutation each epoch"


def test_case_03_resumed_moments_are_warm_and_cold_ones_are_refused(tmp_path: Path) -> None:
    """tinker-feedback#127, KempnerForge#115: resume succeeds, and the Adam moments are cold."""
    config = tiny(tmp_path, train={"steps": 40})
    whole, run = trained(config), stopped(config, 25)
    stop_point = shutil.copytree(run.checkpoints, tmp_path / "copy")
    assert train(run, 1) == "finished"
    assert check_of(run)["moments"] == "ok"
    assert_same(run, whole)

    newest = checkpoint_dirs(stop_point)[0]
    (checks,) = run_ranks(loaded, 1, config, newest, folder=tmp_path / "weights", init=False)
    assert checks["weights-only"] == {"weights": "ok", "moments": "cold", "schedule": "cold"}
    assert "weights_only=True" in checks["stripped"]


def loaded(rank: int, config: Config, path: Path) -> dict[str, Any]:
    """A checkpoint into a new model: weights alone, and once its moments are gone from it."""
    trainer = Trainer(config)
    loader = CheckpointLoader(path.parent, trainer.guard.state)
    checks: dict[str, Any] = {"weights-only": loader.load(path, weights_only=True).checks}
    manifest = read_manifest(path)
    kept = {
        name: entry for name, entry in manifest.tensors.items() if not name.startswith("optim/")
    }
    (path / MANIFEST).write_bytes(sealed(msgspec.structs.replace(manifest, tensors=kept)))
    try:
        loader.load(path)
    except CheckpointInvalid as error:
        checks["stripped"] = str(error)
    return checks


def test_case_05_the_learning_rate_goes_on_along_its_schedule(tmp_path: Path) -> None:
    """lightly-train#301, torch-points3d#630, yolov5#292: the rate is reset to its warm-up by a
    resume.
    """
    config = tiny(tmp_path, train={"steps": 40}, optim={"warmup_steps": 10})
    schedule = Schedule.from_section(config.optim, steps=40)
    run = stopped(config, 25)
    assert train(run, 1) == "finished"
    assert check_of(run)["schedule"] == "ok"
    assert table(run, ("lr",))[:, 0].tolist() == [schedule(step) for step in range(1, 41)]


@pytest.mark.parametrize(("factor", "fine"), [(1.005, True), (1.02, False)])
def test_case_05_a_rate_off_its_schedule_is_reported(
    tmp_path: Path, factor: float, fine: bool
) -> None:
    """The same threads: more than 1 % is said aloud, with both numbers."""
    config = tiny(tmp_path, train={"steps": 30})
    run = stopped(config, 20)
    optim = msgspec.structs.replace(config.optim, lr=config.optim.lr * factor)
    run.write_config(dump_toml(msgspec.structs.replace(config, optim=optim)))
    assert train(run, 1) == "finished"
    schedule = Schedule.from_section(config.optim, steps=30)
    said = check_of(run)["schedule"]
    if fine:
        assert said == "ok"
    else:
        assert (
            f"learning rate {schedule(21):.4g}" in said and f"{schedule(21) * factor:.4g}" in said
        )
        assert "schedule" in of_kind(run, "resume_check")[-1].message


@pytest.mark.fault("E3")
def test_case_05_a_run_that_is_made_shorter_goes_on_at_the_rate_of_the_shorter_schedule(
    tmp_path: Path,
) -> None:
    """`--resume RUN --set train.steps=30` of a run of 3,000 steps: its first update had the rate of
    the long one.
    """
    run = stopped(tiny(tmp_path, train={"steps": 3000}), 20)
    shorter = tiny(tmp_path, train={"steps": 30}, optim={"weight_decay": 0.0})
    run.write_config(dump_toml(shorter))
    assert train(run, 1) == "finished"
    schedule = Schedule.from_section(shorter.optim, steps=30)
    assert table(run, ("lr",))[20:, 0].tolist() == [schedule(step) for step in range(21, 31)]
    settings = [entry for event in of_kind(run, "note") for entry in event.data.get("settings", ())]
    assert {entry["key"] for entry in settings} == {NEXT_RATE, "weight_decay"}


def test_case_06_dropout_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """vllm-project/speculators#1027, pytorch#5627: the loss differs from step 1 after a resume, RNG
    not saved.
    """
    config = tiny(tmp_path, model={"dropout": 0.1}, train={"steps": 40})
    whole, run = trained(config), stopped(config, 30)
    assert train(run, 1) == "finished"
    assert_same(run, whole)
    # The dice matter: without dropout the losses are others.
    dry = trained(tiny(tmp_path, model={"dropout": 0.0}, train={"steps": 40}))
    assert not np.array_equal(table(dry, ("loss",)), table(whole, ("loss",)))


def _spoil(component: str) -> Any:
    """A load that is followed by a small change of one component, as a bug in a loader would make
    it.
    """
    whole = TrainingState.load

    def spoiling(self: TrainingState, *arguments: Any, **settings: Any) -> None:
        whole(self, *arguments, **settings)
        name = next(
            n
            for n in self.tensors()
            if n.startswith(component) and (component == "model/" or "exp_avg" in n)
        )
        self.tensors()[name].view(-1)[0] += 1e-3

    return spoiling


@pytest.mark.parametrize("what", ["nothing", "weights", "moments", "schedule", "loss"])
def test_case_07_a_resume_says_which_part_differs(tmp_path: Path, what: str) -> None:
    """DeepSpeech#3620, ms-swift#6049, transformers#33336: "loss spikes after restoring", cause
    never found.
    """
    config = tiny(tmp_path, data={"order": "shuffled", "eval_fraction": 0.1}, train={"steps": 20})
    run = stopped(config, 10)
    replace = msgspec.structs.replace
    with pytest.MonkeyPatch.context() as patch:
        if what in ("weights", "moments"):
            patch.setattr(
                TrainingState, "load", _spoil("model/" if what == "weights" else "optim/")
            )
        elif what == "schedule":
            run.write_config(
                dump_toml(replace(config, optim=replace(config.optim, warmup_steps=15)))
            )
        elif what == "loss":
            patch.setattr("trainer.model.Decoder.forward", _scaled_forward())
        assert train(run, 1) == "finished"
    check = check_of(run)
    assert set(check) >= {"weights", "moments", "schedule", "data", "loss"}
    differ = {part for part, said in check.items() if said != "ok"}
    # Other weights give another loss as well; that is how both would show.
    assert differ == {"nothing": set(), "weights": {"weights", "loss"}}.get(what, {what})
    for part in differ:
        assert part in of_kind(run, "resume_check")[-1].message


def _scaled_forward() -> Any:
    """The same weights in another model: one whose code was changed between two starts."""
    from trainer.model import Decoder

    whole = Decoder.forward
    return lambda self, tokens: whole(self, tokens) * 1.01


# -- B. loss, gradients, accumulation


def test_case_08_a_nan_is_seen_at_its_step_and_reaches_no_weight(tmp_path: Path) -> None:
    """huggingface/trl#6702: the logged loss is a running mean without the NaN, and the step was
    taken.
    """
    run = trained(tiny(tmp_path, faults=[fault("nan_loss", 5)], train={"steps": 20}))
    (verdict,) = of_kind(run, "verdict")
    assert (verdict.data["at_step"], verdict.data["action"]) == (5, "skip")
    view = run.metrics()
    bad = np.isnan(view.column("loss"))
    assert view.column("step")[bad].tolist() == [5] and view.column("verdict")[bad].tolist() == [1]
    assert np.isfinite(table(run)).all() and len(table(run)) == 20


def test_case_10_ignored_labels_count_as_no_tokens(tmp_path: Path) -> None:
    """Automodel#3796, pytorch#116349: a batch with every label ignored gives 0/0 and destroys the
    weights.
    """
    faults = [fault("ignore_labels", 5), fault("ignore_labels", 9, micro=0)]
    run = trained(tiny(tmp_path, faults=faults, train={"steps": 30, "micro_batch_size": 2}))
    (verdict,) = (event for event in run.events() if isinstance(event, VerdictGiven))
    assert verdict.at_step == 5
    assert [finding.kind for finding in verdict.findings] == [FindingKind.NO_TOKENS]
    assert [span.first for span in spans(run)] == [4 * BATCH]
    tokens = dict(table(run, ("first", "tokens")).tolist())
    assert tokens.pop(8.0 * BATCH) == (BATCH - 2) * LENGTH
    assert set(tokens.values()) == {BATCH * LENGTH}
    assert np.isfinite(table(run)).all() and not of_kind(run, "rollback")


def test_case_11_an_infinite_gradient_is_measured_before_clipping_and_named(tmp_path: Path) -> None:
    """pytorch#46849: clip_grad_norm_ turns the gradients into NaN or 0 without a word."""
    run = trained(tiny(tmp_path, faults=[fault("inf_grad", 5, micro=1)], train={"steps": 20}))
    (verdict,) = of_kind(run, "verdict")
    assert verdict.data["parameters"] == {"0": ["norm.weight"]}
    view = run.metrics()
    assert math.isinf(view.column("grad_norm")[view.column("verdict") == 1][0])
    assert np.isfinite(table(run)).all() and len(table(run)) == 20


# -- C. detectors and actions that are themselves wrong


def test_case_16_a_nan_of_one_rank_is_everybodys(tmp_path: Path) -> None:
    """WeatherGenerator#2724, ace#850, Lightning#5243: decided on one rank only, the others hang in
    the all-reduce.
    """
    launch = {"collective_seconds": 20.0}
    config = tiny(
        tmp_path, world=2, faults=[fault("nan_loss", 5, rank=1)], launch=launch, train={"steps": 20}
    )
    run = trained(config, seconds=100)
    (verdict,) = of_kind(run, "verdict")
    assert {
        tuple(finding["ranks"]) for finding in verdict.data["findings"] if finding["ranks"]
    } == {(1,)}
    assert len(table(run)) == 20


# -- D. checkpoints, signals, logs, terminals


@pytest.mark.parametrize("moment", ["write_share", "commit"])
def test_case_17_killed_in_a_save(tmp_path: Path, moment: str) -> None:
    """Lightning#688, metaseq#53, allennlp#2129: the newest checkpoint is short or empty, and resume
    picks it.
    """
    config = tiny(tmp_path, checkpoint={"every": 10}, train={"steps": 30})
    whole, run = trained(config), new_run(config)
    with prompt_disk(), pytest.MonkeyPatch.context() as patch:
        done = getattr(guardrail.torch.checkpoint.disk_checkpoints, moment)

        def lethal(job: Any, *arguments: Any) -> Any:
            if moment == "write_share" and job.snapshot.step == 20:
                patch.setattr(guardrail.torch.checkpoint.rank_share, "write_file", _short_file)
            elif job.snapshot.step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return done(job, *arguments)

        patch.setattr(guardrail.torch.checkpoint.disk_checkpoints, moment, lethal)
        assert wait_ranks(start_run(run, 1)) == [-signal.SIGKILL]
    assert [read_manifest(path).step for path in checkpoint_dirs(run.checkpoints)] == [10, 0]
    assert list(run.checkpoints.glob(".*")), "the unfinished one lies there under a temporary name"
    assert train(run, 1) == "finished"
    assert of_kind(run, "restarted")[0].step == 10
    assert not list(run.checkpoints.glob(".*"))
    assert_same(run, whole)


def _short_file(path: Path, tensors: Any) -> Any:
    path.write_bytes(b"\0" * 100)
    os.kill(os.getpid(), signal.SIGKILL)


def test_case_18_a_disk_that_is_too_small_is_found_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """returnn#1829, ChatGLM-6B#1166, mmdetection#12069: a full disk ends a run of days in
    torch.save.
    """
    config = tiny(tmp_path, checkpoint={"every": 10, "retry_seconds": 0.05}, train={"steps": 40})
    run = new_run(config)
    usage = namedtuple("usage", ("total", "used", "free"))
    step_of = Trainer.train_step
    with monkeypatch.context() as patch:

        def full_for_a_while(self: Trainer, step: Any) -> None:
            if step.number == 15:
                patch.setattr(
                    guardrail.torch.checkpoint.commit.shutil,
                    "disk_usage",
                    lambda path: usage(10**9, 10**9, 10**5),
                )
            if step.number == 35:
                patch.setattr(
                    guardrail.torch.checkpoint.commit.shutil,
                    "disk_usage",
                    lambda path: usage(10**9, 0, 10**9),
                )
            step_of(self, step)

        patch.setattr(Trainer, "train_step", full_for_a_while)
        with prompt_disk():
            assert train(run, 1) == "finished"
    failed = [
        event.data["reason"]
        for event in of_kind(run, "checkpoint")
        if event.data["state"] == "failed"
    ]
    assert len(failed) >= 2
    for why in failed:
        assert why.startswith(os.strerror(errno.ENOSPC))
        assert numbers_in(why) == [1.5, 0.1], "megabytes that are needed, and that are free"
    states = [event.data["state"] for event in of_kind(run, "disk")]
    assert states[0] == "failing" and states[-1] == "ok"
    candidates = [
        event.data["cp_step"]
        for event in of_kind(run, "checkpoint")
        if event.data["state"] == "candidate"
    ]
    assert 10 in candidates and 40 in candidates and not {20, 30} & set(candidates)
    assert not list(run.checkpoints.glob(".*"))
    assert final(run)


def test_case_19_a_signal_in_an_evaluation_saves_at_once(tmp_path: Path) -> None:
    """goodfire-ai/spd#677: the save on SIGTERM never fired, because evaluation does not poll. See
    test_stop.py too.
    """
    config = tiny(
        tmp_path,
        data={"eval_fraction": 0.1},
        train={"steps": 20, "eval_every": 10, "eval_batches": 5},
    )
    run = new_run(config)
    counted = tmp_path / "counted"
    evaluate, sum_losses = Evaluation.run, Evaluation.sum_losses
    evaluating = []
    with pytest.MonkeyPatch.context() as patch:

        def noted(self: Evaluation, *arguments: Any) -> None:
            evaluating.append(True)
            evaluate(self, *arguments)

        def signalled(self: Evaluation, *arguments: Any) -> Any:
            if evaluating and not counted.exists():
                counted.write_text("x")
                os.kill(os.getpid(), signal.SIGTERM)
            return sum_losses(self, *arguments)

        patch.setattr(Evaluation, "run", noted)
        patch.setattr(Evaluation, "sum_losses", signalled)
        assert train(run, 1) == "stopped"
    assert counted.exists() and not of_kind(run, "eval")
    assert read_manifest(checkpoint_dirs(run.checkpoints)[0]).step == 10
    assert outcome(run) == "stopped"


def test_case_20_steps_that_go_back_are_kept_and_the_last_attempt_is_shown(tmp_path: Path) -> None:
    """wandb#4482, ms-swift#7080: after a rollback the points with a smaller step are dropped."""
    run = new_run(tiny(tmp_path, train={"steps": 30}))
    run.send(Command(id="back", kind="rollback", value=15, at_step=22))
    assert train(run, 1) == "finished"
    view = run.metrics()
    assert view.column("step").tolist() == [*range(1, 23), *range(16, 31)]
    assert view.column("timeline").tolist() == [0] * 22 + [1] * 15
    assert (view.column("verdict") == list(Action).index(Action.APPLY)).all()
    shown = view.array[view.current()]
    assert shown[:, view.columns.index("step")].tolist() == list(range(1, 31))
    assert shown[:, view.columns.index("timeline")].tolist() == [0] * 15 + [1] * 15
