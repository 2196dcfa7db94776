"""Whatever reaches a run at the same instant has one winner, and the others are told why they are
refused.

The guard runs in a thread with a real run directory and reads its inbox as it always does, only
faster. Every third batch gives a NaN, about which it asks; each pair is driven against one run, 50
rounds of it where the pair allows it.
"""

from __future__ import annotations

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
from guardrail.core.guard_options import GuardOptions
from guardrail.core.records.commands import Command, Shown
from guardrail.core.records.status import Phase, Status
from guardrail.core.records.verdicts import Mode
from guardrail.core.sections import CheckpointSection, SnapshotSection
from guardrail.decide.control_commands.registry import shown_in
from guardrail.decide.sample_order import SampleOrder
from guardrail.launch import launcher as launching
from guardrail.operate import control, preview
from guardrail.rundir import journal, processes
from guardrail.rundir.mailbox import CommandPoller
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.run_lock import RunLock
from guardrail.torch.guard.guard import Guard
from tests.support.lab import Lab, wait_for

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
            if named or "over" in reason:
                assert (
                    f"the question of line {question} is over: answer continue by sender {winner}"
                    in reason
                )
            else:  # it came when none was open
                assert reason == "no question is open" or "before the guard asked" in reason
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
            assert f"the question of line {question} is over: answer continue by sender" in reason
            assert f"the question of line {following} is open now" in reason
            question = following
        assert asking.guard.phase is None, "a late stop has stopped nothing"


@pytest.mark.fault("T7")
def test_resume_answers_no_question_and_says_what_does(tmp_path: Path) -> None:
    with Asking(tmp_path) as asking:
        question = asking.question()
        for _ in range(5):
            assert asking.reason(asking.send("resume")) == (
                f"the guard asks (journal line {question}): use answer accept, answer continue or answer stop"
            )
        assert not asking.lines("resumed")
        wait_for(
            lambda: (status := asking.run.read_status()) and status.question, what="its status"
        )
        foreseen = preview.preview_in_run(asking.run, Command(id="x", kind="resume"))
        assert not foreseen.possible and "answer accept" in foreseen.refusal


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
            assert f"before the guard asked the question of line {question}" in reason
        assert asking.outcomes(asking.send("skip", 1.0, question=question)) == ["applied"]
        wait_for(lambda: asking.lines("resumed"), what="the end of the question")
        resumed = asking.lines("resumed")[0]
        assert (resumed.data["question"], resumed.data["answer"]) == (question, "by_hand")
        over = asking.reason(asking.send("skip", 1.0, question=question))
        assert f"the question of line {question} is over: skip 1 batch by sender" in over


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
            assert asking.reason(loser) == f"another user has changed it: it is x{factor:g} now"
        for wanted in (Mode.AUTO, Mode.ADVISE):
            command = {
                "kind": "mode",
                "value": float(list(Mode).index(wanted)),
                "shown": Shown(instead_of=float(list(Mode).index(mode))),
            }
            loser = at_once(asking, command, command)[1]
            assert asking.reason(loser) == f"another user has changed it: it is {wanted.value} now"
            mode = wanted


@pytest.mark.fault("T4")
def test_a_command_whose_target_or_cost_has_changed_is_refused(tmp_path: Path) -> None:
    with Asking(tmp_path, every=0) as asking:
        wait_for(lambda: asking.guard.step > 12 or asking.failure, what="some steps")
        newest = Command(id="x", kind="rollback", value=float("nan"))
        shown = shown_in(preview.preview_in_run(asking.run, newest, status=asking.guard.status()))
        assert shown.to_step is not None and shown.steps_lost_most >= shown.steps_lost + 10
        replace = msgspec.structs.replace
        refused = {
            "it would restore step": replace(shown, to_step=3),
            "as shown": replace(shown, tier="disk"),
            "steps now, not 0 as shown": replace(
                shown, to_step=0, tier="disk", steps_lost=0, steps_lost_most=0
            ),
            "the run was rolled back meanwhile": replace(shown, timeline=7),
        }
        for words, one in refused.items():
            value = 0.0 if one.to_step == 0 else float("nan")
            assert words in asking.reason(asking.send("rollback", value, shown=one))
        assert not asking.lines("rollback")
        # A rollback that both have seen: the second one was shown on a timeline that is over.
        first = replace(shown, to_step=0, tier="disk", steps_lost_most=1 << 40)
        given = {"kind": "rollback", "value": 0.0, "shown": first}
        loser = at_once(asking, given, given)[1]
        assert "the run was rolled back meanwhile" in asking.reason(loser)
        assert "of timeline 1 now" in asking.reason(loser) and len(asking.lines("rollback")) == 1


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
        told: list[str] = []

        def give(word: str) -> None:
            command = control.bind_to_present(asking.run, control.parse_command("answer", word))
            assert command.question == question and command.value == CONTINUE
            barrier.wait()
            try:
                told.append(control.send_and_wait(asking.run, command, seconds=60).message)  # type: ignore[union-attr]
            except UsageError as error:
                told.append(str(error))

        threads = [threading.Thread(target=give, args=(word,)) for word in ("continue", "1")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken, refused = sorted(told, key=lambda text: "refuses" in text)
        assert taken.startswith("answer continue takes effect after step")
        assert f"refuses: the question of line {question} is over: answer continue by" in refused
        main = CliRunner().invoke(
            ctl, [str(asking.run.path), "answer", "stop", "--question", str(question)]
        )
        assert isinstance(main.exception, UsageError) and "is over" in str(main.exception)
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
        refused = commands[effects.index("refused")].id
        assert "the run was rolled back meanwhile" in asking.reason(refused)
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
[run]
name = "fake"
[launch]
trainer = "faketrainer"
device = "cpu"
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
    (lab.folder / "c.toml").write_text(LAUNCHED)
    place = lab.root / "fake" / "one"

    def both(*arguments: str, odd: Sequence[str] = ()) -> str:
        """Start two at once; what the loser says."""
        two = [lab.start(*arguments), lab.start(*arguments, *odd)]
        said = [process.communicate(timeout=120)[1] for process in two]
        codes = [process.returncode for process in two]
        assert sorted(codes) == [0, 2], said
        return said[codes.index(2)]

    loser = both("launch", "c.toml", "--detach", "--run-dir", str(place))
    assert "another launch is making a run there" in loser or "exists already" in loser
    run = RunDirectory.open(place)
    supervisor = lab.supervisor(run)
    wait_for(lambda: (status := run.read_status()) and status.phase is Phase.STEP, what="a step")
    assert lab.guardrail("ctl", str(place), "stop", "--wait", "0").returncode == 0
    late = lab.guardrail("launch", "--resume", str(place), "--detach")
    if late.returncode:  # while the old one ends it is refused, and told why
        assert "is running on" in late.stderr or "have not ended" in late.stderr
    else:
        assert not processes.alive(supervisor)
        supervisor = lab.supervisor(run)
    supervisor.send_signal(signal.SIGTERM)
    wait_for(lambda: not processes.alive(supervisor), what="the end of the first start")
    loser = both("launch", "--resume", str(place), "--detach", odd=["--set", "guard.mode=ask"])
    assert "is being started by another command" in loser or "is running on" in loser
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
            match=f"is being started by another command .*process {os.getpid()} on",
        ),
    ):
        launching.prepare_resume(str(run.path), (), root="")
    assert [command.id for command in run.commands_pending()] == ["waits"], (
        "it is left to the other one"
    )
    assert launching.prepare_resume(str(run.path), (), root="").lock is not None  # type: ignore[union-attr]
