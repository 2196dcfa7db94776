"""Whatever reaches a run at the same instant has one winner, and the others are told why they are
refused.

The guard runs in a thread with a real run directory and reads its inbox as it always does, only
faster. Every third batch gives a NaN, about which it asks; each pair is driven against one run, 50
rounds of it where the pair allows it.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import guardrail.torch.guard.command_handler as command_handler
import guardrail.torch.guard.command_inbox as command_inbox
from guardrail.cli.ctl import command as ctl
from guardrail.core.config import GuardConfig
from guardrail.core.errors import RunDirectoryError, UsageError
from guardrail.core.events.event import Event
from guardrail.core.events.run_state import CommandAnswered
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command, Shown
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.core.sections import CheckpointSection, SnapshotSection
from guardrail.decide.control_commands.answer import NO_QUESTION, Answer
from guardrail.decide.control_commands.registry import shown_in
from guardrail.decide.control_commands.skip import Skip
from guardrail.decide.questions import (
    CHOICES,
    Open,
    how_to_answer,
    question_changed,
    setting_changed,
    target_changed,
    timeline_changed,
)
from guardrail.decide.sample_order import SampleOrder
from guardrail.launch import launcher as launching
from guardrail.operate import control, preview
from guardrail.rundir import journal, processes
from guardrail.rundir.mailbox import CommandPoller
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_lock import RunLock
from guardrail.torch.guard.guard import Guard
from tests.support.lab import Lab, wait_for
from tests.support.texts import numbers_in

ROUNDS = 50
CONTINUE, STOP = 1.0, 2.0


class Asking:
    """A run that asks again and again, in a thread.

    Args:
        every: one batch in so many gives a NaN; 0: none does.
    """

    def __init__(self, folder: Path, *, every: int = 3, mode: Mode = Mode.ASK) -> None:
        self.run = RunDirectory.create(folder, "asking", "")
        self.every = every
        self.failure: BaseException | None = None
        self.sent = 0
        self._events: list[Event] = []
        self._offset = 0
        self.run.append("note", "a journal")
        model = nn.Linear(2, 1)
        self.model = model
        self.guard = Guard.from_config(
            GuardConfig(
                guard=GuardOptions(mode=mode, rollback_after_rejections=1, cause_test=False),
                snapshots=SnapshotSection(every=5, keep=3),
                checkpoint=CheckpointSection(every=100_000),
            ),
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
            data=SampleOrder(samples=1_000_000, seed=3),
            batch_size=4,
            run=self.run,
        )
        self.thread = threading.Thread(target=self._train, name="trainer", daemon=True)

    def _train(self) -> None:
        try:
            for step in self.guard:
                loss = self.model(torch.ones(1, 2)).square().mean()
                if self.every and step.batch.first // 4 % self.every == self.every - 1:
                    loss = loss * float("nan")
                loss.backward()
                step.finish(loss)
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Asking:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.send("stop")
        self.thread.join(timeout=60)
        assert not self.thread.is_alive() and self.failure is None

    def lines(self, kind: str, after: int = 0) -> list[Event]:
        """Of the journal, of which only what is new is read."""
        with self.run.journal_path.open("rb") as file:
            file.seek(self._offset)
            events, used = journal.parse(file.read())
        self._events += events
        self._offset += used
        return [event for event in self._events if event.seq > after and event.kind == kind]

    def question(self, after: int = 0) -> int:
        """Number of the first question behind a line, once it is asked."""
        wait_for(lambda: self.failure or self.lines("paused", after), what="a question")
        return self.lines("paused", after)[0].seq

    def send(self, kind: str, value: float = 0.0, **fields: Any) -> str:
        self.sent += 1
        id = f"c{self.sent}"
        self.run.send(Command(id=id, kind=kind, value=value, who=f"sender {id}", **fields))
        return id

    def answer(self, id: str) -> Event:
        """The run's answer to a command, once it is there."""
        wait_for(lambda: self.failure or self._answers(id), what=f"an answer to {id}")
        (found,) = self._answers(id)
        return found

    def _answers(self, id: str) -> list[Event]:
        return [event for event in self.lines("command") if event.data["id"] == id]

    def outcomes(self, *ids: str) -> list[str]:
        return [str(self.answer(id).data["effect"]) for id in ids]

    def reason(self, id: str) -> str:
        answer = self.answer(id)
        assert answer.data["effect"] == "refused", answer
        return str(answer.data["reason"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same paths, with shorter waits between two looks."""
    monkeypatch.setattr(command_handler, "PARKED_SECONDS", 0.002)
    monkeypatch.setattr(command_inbox, "CommandPoller", partial(CommandPoller, seconds=0.004))
    yield


def is_over(question: int, how: str) -> str:
    """How the refusal begins of a command for a question that was answered, by its first answer."""
    text = question_changed(question, Open(0, {question: how} if how else {}))
    assert numbers_in(text)[0] == question and how in text
    return text


def at_once(asking: Asking, *commands: dict[str, Any]) -> tuple[str, str]:
    """Send two commands from two threads that leave one barrier together; ids of the one that was
    taken, and not.
    """
    barrier = threading.Barrier(len(commands))
    ids = []

    def act(id: str, fields: dict[str, Any]) -> None:
        command = Command(id=id, who=f"sender {id}", **fields)
        barrier.wait()
        asking.run.send(command)

    threads = []
    for fields in commands:
        asking.sent += 1
        ids.append(f"c{asking.sent}")
        threads.append(threading.Thread(target=act, args=(ids[-1], fields)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = dict(zip(ids, asking.outcomes(*ids), strict=True))
    if set(outcomes.values()) == {"applied"} and not any(
        "question" in fields for fields in commands
    ):
        # One was sent so late, by a thread that had to wait for a processor, that the next question
        # was open.
        first, second = (asking.answer(id).data["question"] for id in ids)
        assert first != second, "one question has two answers"
        return "", ""
    assert sorted(outcomes.values()) == ["applied", "refused"], outcomes
    winner, loser = sorted(outcomes, key=outcomes.__getitem__)
    return winner, loser


@pytest.mark.fault("T5")
@pytest.mark.parametrize("named", [True, False])
def test_of_two_answers_at_once_one_counts_and_the_other_learns_who_was_first(
    tmp_path: Path, named: bool
) -> None:
    """Also where neither says which question it is for: then it is the one that is open when it
    arrives.
    """
    with Asking(tmp_path) as asking:
        question, met = 0, 0
        for _ in range(ROUNDS):
            question = asking.question(question)
            given = {"kind": "answer", "value": CONTINUE} | (
                {"question": question} if named else {}
            )
            winner, loser = at_once(asking, given, given)
            if not winner:
                # Both are answered. The `resumed` line of the second may not be written yet.
                question = asking.lines("paused")[-1].seq
                continue
            met += 1
            reason = asking.reason(loser)
            over = is_over(question, f"{Answer(CONTINUE).describe()} by sender {winner}")
            if named or reason.startswith(over):
                assert reason.startswith(over)
            elif reason != NO_QUESTION:  # it came when none was open
                (asked,) = numbers_in(reason)
                assert asked > question and reason == question_changed(0, Open(int(asked), {}))
        assert met > ROUNDS // 2
        ended = [line.data for line in asking.lines("resumed")]
        assert len(ended) >= ROUNDS and all(line["question"] and line["who"] for line in ended)


@pytest.mark.fault("T5")
def test_an_answer_that_comes_late_never_answers_the_next_question(tmp_path: Path) -> None:
    with Asking(tmp_path) as asking:
        question = asking.question()
        for _ in range(ROUNDS):
            asking.send("answer", CONTINUE, question=question)
            following = asking.question(question)
            late = asking.send("answer", STOP, question=question)
            reason = asking.reason(late)
            assert reason.startswith(is_over(question, Answer(CONTINUE).describe()))
            assert numbers_in(reason)[-1] == following
            question = following
        assert asking.guard.phase is None, "a late stop has stopped nothing"


@pytest.mark.fault("T7")
def test_resume_answers_no_question_and_says_what_does(tmp_path: Path) -> None:
    with Asking(tmp_path) as asking:
        question = asking.question()
        for _ in range(5):
            assert asking.reason(asking.send("resume")) == how_to_answer(question)
        assert numbers_in(how_to_answer(question)) == [question]
        assert not asking.lines("resumed")
        wait_for(
            lambda: (status := asking.run.read_status()) and status.question, what="its status"
        )
        foreseen = preview.preview_in_run(asking.run, Command(id="x", kind="resume"))
        assert not foreseen.possible and foreseen.refusal == how_to_answer(question)
        assert all(f"answer {choice}" in foreseen.refusal for choice in CHOICES)


@pytest.mark.fault("T5")
def test_a_command_that_was_shown_before_the_question_does_not_answer_it(tmp_path: Path) -> None:
    """A skip or a rollback at a question is an answer to it: of someone who has seen it alone."""
    with Asking(tmp_path) as asking:
        question = asking.question()
        for kind, value in (
            ("skip", 1.0),
            ("rollback", 0.0),
            ("undo", 3.0),
        ):
            reason = asking.reason(asking.send(kind, value, question=0))
            assert reason == question_changed(0, Open(question, {}))
            assert numbers_in(reason) == [question]
        assert asking.outcomes(asking.send("skip", 1.0, question=question)) == ["applied"]
        wait_for(lambda: asking.lines("resumed"), what="the end of the question")
        resumed = asking.lines("resumed")[0]
        assert (resumed.data["question"], resumed.data["answer"]) == (question, "by_hand")
        over = asking.reason(asking.send("skip", 1.0, question=question))
        assert over.startswith(is_over(question, Skip(1.0).describe()))


@pytest.mark.fault("T4")
def test_of_two_that_change_a_setting_at_once_one_wins(tmp_path: Path) -> None:
    """Both were shown the same value as the present one."""
    with Asking(tmp_path, every=0) as asking:
        factor, mode = 1.0, Mode.ASK
        for turn in range(ROUNDS):
            values = [0.5, 0.25] if factor == 1.0 else [1.0, 1.0]
            given = [
                {"kind": "lr", "value": value, "shown": Shown(instead_of=factor)}
                for value in (values if turn % 2 else reversed(values))
            ]
            winner, loser = at_once(asking, *given)
            factor = float(asking.answer(winner).data["value"])
            shown = given[0]["shown"]
            assert asking.reason(loser) == setting_changed(shown, factor, f"x{factor:g}")
            assert f" x{factor:g} " in asking.reason(loser)
        for wanted in (Mode.AUTO, Mode.ADVISE):
            command = {
                "kind": "mode",
                "value": float(list(Mode).index(wanted)),
                "shown": Shown(instead_of=float(list(Mode).index(mode))),
            }
            loser = at_once(asking, command, command)[1]
            shown = command["shown"]
            assert asking.reason(loser) == setting_changed(shown, math.nan, wanted.value)
            assert f" {wanted.value} " in asking.reason(loser)
            mode = wanted


@pytest.mark.fault("T4")
def test_a_command_whose_target_or_cost_has_changed_is_refused(tmp_path: Path) -> None:
    with Asking(tmp_path, every=0) as asking:
        wait_for(lambda: asking.guard.step > 12 or asking.failure, what="some steps")
        newest = Command(id="x", kind="rollback", value=float("nan"))
        shown = shown_in(preview.preview_in_run(asking.run, newest, status=asking.guard.status()))
        assert shown.to_step is not None and shown.steps_lost_most >= shown.steps_lost + 10
        replace = msgspec.structs.replace
        for other in (replace(shown, to_step=3), replace(shown, tier="disk")):
            reason = asking.reason(asking.send("rollback", float("nan"), shown=other))
            now, was = map(int, numbers_in(reason))
            assert was == other.to_step
            assert reason == target_changed(other, to_step=now, tier=shown.tier, steps_lost=0)
        cheap = replace(shown, to_step=0, tier="disk", steps_lost=0, steps_lost_most=0)
        reason = asking.reason(asking.send("rollback", 0.0, shown=cheap))
        lost = int(numbers_in(reason)[0])
        assert lost > 12 and reason == target_changed(
            cheap, to_step=0, tier="disk", steps_lost=lost
        )
        elsewhere = replace(shown, timeline=7)
        reason = asking.reason(asking.send("rollback", float("nan"), shown=elsewhere))
        step, timeline = map(int, numbers_in(reason))
        assert timeline == 0 and reason == timeline_changed(elsewhere, timeline=0, step=step)
        assert not asking.lines("rollback")
        # A rollback that both have seen: the second one was shown on a timeline that is over.
        first = replace(shown, to_step=0, tier="disk", steps_lost_most=1 << 40)
        given = {"kind": "rollback", "value": 0.0, "shown": first}
        loser = at_once(asking, given, given)[1]
        reason = asking.reason(loser)
        step, timeline = map(int, numbers_in(reason))
        assert timeline == 1 and reason == timeline_changed(first, timeline=1, step=step)
        assert len(asking.lines("rollback")) == 1


@pytest.mark.fault("T5")
def test_two_that_answer_from_the_command_line_at_once(tmp_path: Path) -> None:
    """Words, the number of the question, and no number: that is for the question that was open when
    it was given.
    """
    with Asking(tmp_path) as asking:
        question = asking.question()
        wait_for(
            lambda: (status := asking.run.read_status()) and status.question, what="its status"
        )
        barrier = threading.Barrier(2)
        taken: list[Event] = []
        refused: list[UsageError] = []

        def give(word: str) -> None:
            command = control.bind_to_present(asking.run, control.parse_command("answer", word))
            assert command.question == question and command.value == CONTINUE
            barrier.wait()
            try:
                taken.append(control.send_and_wait(asking.run, command, seconds=60))  # type: ignore[arg-type]
            except UsageError as error:
                refused.append(error)

        threads = [threading.Thread(target=give, args=(word,)) for word in ("continue", "1")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ((answer,), (error,)) = taken, refused
        assert isinstance(answer, CommandAnswered) and answer.is_applied
        assert (answer.command, answer.value, answer.question) == ("answer", CONTINUE, question)
        assert is_over(question, Answer(CONTINUE).describe()) in str(error)
        main = CliRunner().invoke(
            ctl, [str(asking.run.path), "answer", "stop", "--question", str(question)]
        )
        assert isinstance(main.exception, UsageError)
        assert is_over(question, "") in str(main.exception)
        assert asking.guard.phase is None


@pytest.mark.fault("T4")
def test_two_that_roll_back_from_the_command_line_at_once_go_back_once(tmp_path: Path) -> None:
    with Asking(tmp_path, every=0) as asking:
        wait_for(
            lambda: (status := asking.run.read_status()) and status.step > 12, what="some steps"
        )
        commands = [
            control.bind_to_present(asking.run, control.parse_command("rollback", None))
            for _ in range(2)
        ]
        for command in commands:
            asking.run.send(command)
        effects = asking.outcomes(*(command.id for command in commands))
        assert sorted(effects) == ["applied", "refused"] and len(asking.lines("rollback")) == 1
        refused = commands[effects.index("refused")]
        reason = asking.reason(refused.id)
        step, timeline = map(int, numbers_in(reason))
        assert timeline == 1 and reason == timeline_changed(refused.shown, timeline=1, step=step)
        # What is sent after it holds again; and what waits for a step holds on any timeline.
        again = control.bind_to_present(asking.run, control.parse_command("rollback", None))
        asking.run.send(again)
        assert asking.outcomes(again.id) == ["applied"]
        assert (
            control.bind_to_present(
                asking.run, control.parse_command("rollback", None, at_step=10**6)
            ).shown
            is None
        )


# -- two that start one run


LAUNCHED = """
processes = 1
[tensorboard]
enabled = false
[fake]
steps = 100000
"""


def test_of_two_launches_and_of_two_resumes_at_once_one_wins(lab: Lab) -> None:
    """The other one is told, and changes nothing: not the configuration, not a command that
    waits.
    """
    lab.write_config(LAUNCHED)
    place = lab.root / "fake" / "one"

    def both(*arguments: str, odd: Sequence[str] = ()) -> str:
        """Start two at once; what the loser says."""
        two = [lab.start(*arguments), lab.start(*arguments, *odd)]
        said = [process.communicate(timeout=120)[1] for process in two]
        codes = [process.returncode for process in two]
        assert sorted(codes) == [0, 2], said
        return said[codes.index(2)]

    loser = both("launch", "c.toml", "--detach", "--run-dir", str(place))
    assert f"{place}: " in loser
    run = RunDirectory.open(place)
    supervisor = lab.supervisor(run)
    wait_for(lambda: (status := run.read_status()) and status.phase is Phase.STEP, what="a step")
    assert lab.guardrail("ctl", str(place), "stop", "--wait", "0").returncode == 0
    late = lab.guardrail("launch", "--resume", str(place), "--detach")
    if late.returncode:  # while the old one ends it is refused, and told why
        assert late.returncode == 2 and f"{run.name} " in late.stderr
    else:
        assert not processes.alive(supervisor)
        supervisor = lab.supervisor(run)
    supervisor.send_signal(signal.SIGTERM)
    wait_for(lambda: not processes.alive(supervisor), what="the end of the first start")
    loser = both("launch", "--resume", str(place), "--detach", odd=["--set", "guard.mode=ask"])
    assert f"{run.name} " in loser and f"guardrail attach {run.name}" in loser
    lab.supervisor(run)
    wait_for(lambda: (status := run.read_status()) and status.phase is Phase.STEP, what="a step")
    assert len([event for event in run.events() if event.kind == "restarted"]) <= 2


def test_a_resume_that_is_under_way_keeps_others_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(
        tmp_path, "words", '[train]\nsteps = 1000\n[launch]\ndevice = "cpu"\n'
    )
    run.write_status(Status(run=run.name, phase=Phase.STOPPED, host="elsewhere"))
    run.send(Command(id="waits", kind="stop"))
    with (
        RunLock(run.path / "launch.lock", "guardrail launch --resume"),
        pytest.raises(
            RunDirectoryError,
            match=rf"^{run.name} .*process {os.getpid()} ",
        ),
    ):
        launching.prepare_resume(str(run.path), (), root="")
    assert [command.id for command in run.commands_pending()] == ["waits"], (
        "it is left to the other one"
    )
    assert launching.prepare_resume(str(run.path), (), root="").lock is not None  # type: ignore[union-attr]
