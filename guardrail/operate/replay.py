"""Run a stretch of a run again, and say whether every number is the same.

A replay is a resume in another folder: the run's configuration, its whole journal and one of its
checkpoints (or none: from the beginning). What the journal decided, from the quarantine to a
learning rate that somebody set, is a fact there, as after a crash; the guard itself is off, so
nothing is decided anew. The run's own directory is only read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from guardrail.core.errors import (
    CheckpointInvalid,
    ExitCode,
    Interrupted,
    RunDirectoryError,
    UsageError,
    WorkersFailed,
)
from guardrail.core.files import FOLDER_MODE, encode_json, replace_file
from guardrail.core.records import METRIC_COLUMNS, Command, Event, Record
from guardrail.core.text import clean_text
from guardrail.decide.control_commands.mode import ChangeMode
from guardrail.decide.control_commands.stop import Stop
from guardrail.decide.run_history import RunHistory
from guardrail.decide.timelines import TimelineIndex
from guardrail.launch import launcher as launching
from guardrail.launch.preflight import cuda_devices
from guardrail.report.incident import Incident
from guardrail.report.incident_builder import ENDS, IncidentBuilder
from guardrail.rundir import processes
from guardrail.rundir.manifest import Manifest, checkpoint_dirs, fingerprint, read_manifest
from guardrail.rundir.run_directory import MetricsView, RunDirectory

if TYPE_CHECKING:
    import subprocess

    import numpy as np

POLL_SECONDS = 0.3
# Columns that say when and how fast, not what: they are another's every time. The guard of a replay
# is off, so that it expects nothing of a step.
INCIDENTAL = frozenset(
    "timeline time step_time step_time_max slowest_rank guard_time verdict update_norm".split()
    + [name for name in METRIC_COLUMNS if name.endswith(("_baseline", "_threshold"))]
)
Tell = Callable[[int, int], None]  # (steps done, steps in all)


class Plan(NamedTuple):
    """Steps (from_step, to_step] from the checkpoint `base`, or from the beginning."""

    base: Path | None
    from_step: int
    to_step: int
    incident: int | None = None


class Difference(Record, frozen=True, kw_only=True):
    """A number that is not the same."""

    step: int
    column: str
    was: float
    now: float

    def sentence(self) -> str:
        return f"{self.column} of step {self.step:,} was {self.was!r} and is {self.now!r}"


class Outcome(Record, frozen=True, kw_only=True):
    """What a replay has shown.

    Attributes:
        same: every compared number is, bit by bit, and so are the weights where both runs saved
        them.
        steps: compared ones; steps (from_step, to_step] were run.
        columns: compared ones.
        missing: steps that one of both runs has no row of.
        first: the first difference.
        weights_step: of the checkpoints that were compared, None where no step was saved by both.
        remarks: what is another here than it was, in sentences.
        scratch: the folder of the replay, where it was kept.
    """

    run: str
    incident: int | None
    same: bool
    from_step: int
    to_step: int
    steps: int
    columns: tuple[str, ...]
    missing: int = 0
    first: Difference | None = None
    weights_step: int | None = None
    weights_same: bool = True
    remarks: tuple[str, ...] = ()
    scratch: str = ""

    def sentence(self) -> str:
        stretch = f"steps {self.from_step + 1:,} to {self.to_step:,}"
        if self.first is not None:
            return f"not the same: {self.first.sentence()}"
        if not self.weights_same:
            return f"not the same: the weights after step {self.weights_step:,} are others"
        if not self.same:
            return f"not the same: {self.missing:,} of {stretch} have no row in one of both"
        weights = (
            f", and so are the weights after step {self.weights_step:,}"
            if self.weights_step is not None
            else ""
        )
        return (
            f"the same: {stretch}, {self.steps * len(self.columns):,} numbers, bit by bit{weights}"
        )


# -- what is to be run


def plan(run: RunDirectory, incident: int | None = None) -> Plan:
    """The whole of the run's present, or the stretch around one incident.

    Raises:
        UsageError: there is nothing to replay, or not here: another world, another device, a
        checkpoint that is gone.
    """
    events = run.events()
    view = run.metrics(["step", "verdict"])
    steps = view.array[view.current() & (view.column("verdict") == 0), 0]
    if not len(steps):
        raise UsageError(f"{run.name} has made no step yet: there is nothing to replay")
    last = int(steps.max())
    if incident is None:
        found = Plan(None, 0, last)
    else:
        about = _incident(run, events, incident)
        base, from_step = _before(run, events, about)
        found = Plan(
            base,
            from_step,
            min(last, max(_end_of(events, incident, last), from_step + 1)),
            incident,
        )
    if found.to_step <= found.from_step:
        raise UsageError(
            f"{run.name}: no step after step {found.from_step:,} is left of this stretch"
        )
    _refuse_other_machines(run, events, found)
    return found


def _incident(run: RunDirectory, events: Sequence[Event], number: int) -> Incident:
    incidents = {one.number: one for one in IncidentBuilder().of(events)}
    if number not in incidents:
        known = ", ".join(str(one) for one in sorted(incidents) if one) or "none"
        raise UsageError(f"{run.name} has no incident {number}\n  hint: it has {known}")
    return incidents[number]


def _before(
    run: RunDirectory, events: Sequence[Event], incident: Incident
) -> tuple[Path | None, int]:
    """The newest checkpoint of the present from before the incident; the beginning does where it is
    that near.
    """
    past = RunHistory.of(events)
    data = min((span.first for span in incident.spans), default=None)
    left: list[int] = []
    for folder in checkpoint_dirs(run.checkpoints):
        manifest = _manifest(folder)
        if manifest is None or folder.name in past.suspects:
            continue
        if not past.lives(timeline=manifest.timeline, step=manifest.step):
            continue
        left.append(manifest.step)
        if manifest.step < incident.onset and (data is None or manifest.cursor <= data):
            return folder, manifest.step
    hint = f"the oldest one left is of step {min(left):,}" if left else "none is left"
    raise UsageError(
        f"{run.name}: the checkpoint from before incident {incident.number} (step {incident.onset:,}) is pruned\n"
        f"  hint: {hint}; `guardrail replay` without --incident begins at step 0 and needs none"
    )


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except CheckpointInvalid:
        return None


def _end_of(events: Sequence[Event], number: int, last: int) -> int:
    """The step that closed an incident: the line is written before that step counts."""
    ends = [
        e
        for e in events
        if e.kind == "incident" and e.data.get("number") == number and e.data.get("state") in ENDS
    ]
    return ends[-1].step + 1 if ends else last


def _refuse_other_machines(run: RunDirectory, events: Sequence[Event], found: Plan) -> None:
    launch = tomllib.loads(run.config_text()).get("launch", {})
    if launch.get("nodes", 1) != 1:
        raise UsageError(f"{run.name} was trained on {launch['nodes']} nodes; a replay runs on one")
    here = int(launch.get("processes", 1))
    for event in _starts_of(events, found):
        world = event.data.get("world", here)
        if world != here:
            raise UsageError(
                f"{run.name} ran on {world} ranks from step {event.step:,} on, and on {here} by its configuration: "
                "sums over another number of ranks round differently, so not a bit of it can be expected"
            )
        if event.data.get("device") == "cuda" and cuda_devices() == 0:
            raise UsageError(
                f"{run.name} was trained on CUDA devices, of which there are none here"
            )


def _starts_of(events: Sequence[Event], found: Plan) -> list[Event]:
    """Those `started` and `restarted` lines whose ranks made steps of the stretch."""
    starts: list[Event] = []
    for event in events:
        if event.kind in ("started", "restarted"):
            starts = [one for one in starts if one.step < event.step] + [event]
    first = max((at for at, one in enumerate(starts) if one.step <= found.from_step), default=0)
    return [one for one in starts[first:] if one.step < found.to_step]


def remarks(run: RunDirectory) -> tuple[str, ...]:
    """What is another here than it was when the run began, and may be why numbers differ."""
    import socket
    from importlib.metadata import PackageNotFoundError, version

    first = next((event for event in run.events() if event.kind == "started"), None)
    if first is None:
        return ()
    found = []
    host = first.data.get("host")
    if host and host != socket.gethostname():
        found.append(f"the run began on {clean_text(str(host), 80)}, another machine")
    versions = first.data.get("versions")
    for name in ("torch", "guardrail"):
        was = versions.get(name) if isinstance(versions, dict) else None
        with contextlib.suppress(PackageNotFoundError):
            if was and str(was).split("+")[0] != version(name).split("+")[0]:
                found.append(f"{name} was {clean_text(str(was), 40)} and is {version(name)}")
    return tuple(found)


# -- the folder of the replay


def prepare(run: RunDirectory, stretch: Plan) -> RunDirectory:
    """A run directory that will do the stretch and then stop. Beside the run, where links to a
    checkpoint cost nothing.

    Raises:
        RunDirectoryError: it cannot be made.
        UsageError: nobody knows how to start the run.
    """
    beside = os.access(run.path.parent, os.W_OK)
    folder = run.path.parent if beside else Path(tempfile.gettempdir())
    path = folder / f".replay-{run.path.name}-{os.getpid()}-{secrets.token_hex(3)}"
    scratch = RunDirectory.create_at(path, _config(run))
    try:
        # Who decided is no matter here: nobody does.
        events = [event for event in run.events() if event.data.get("command") != ChangeMode.name]
        lines = b"".join(encode_json(_fields(event)) + b"\n" for event in events)
        replace_file(scratch.journal_path, lines)
        if stretch.base is not None:
            _link(stretch.base, scratch.checkpoints / stretch.base.name)
        scratch.send(Command(id="replayed", kind=Stop.name, at_step=stretch.to_step, who="replay"))
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise RunDirectoryError(f"{path}: cannot be written ({error.strerror})") from error
    return scratch


def _config(run: RunDirectory) -> str:
    """The run's own, with nobody deciding, nobody told, and no second try."""
    import tomli_w

    tree = tomllib.loads(run.config_text())
    if "launch" not in tree:
        raise UsageError(
            f"{run.name} was not started by `guardrail launch`: its config.toml does not say how to run it"
        )
    tree.setdefault("guard", {})["mode"] = "off"
    tree.setdefault("tensorboard", {})["enabled"] = False
    tree["launch"]["max_restarts"] = 0
    tree.pop("notify", None)
    return tomli_w.dumps(tree)


def _fields(event: Event) -> dict[str, Any]:
    fixed = {
        name: getattr(event, name)
        for name in ("seq", "time", "step", "timeline", "kind", "message")
    }
    return {**fixed, **event.data}


def _link(source: Path, target: Path) -> None:
    """The same files under another folder: a replay that prunes it takes nothing from the run."""
    target.mkdir(mode=FOLDER_MODE)
    for file in sorted(source.iterdir()):
        try:
            os.link(file, target / file.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, target / file.name)


# -- the comparison


class Comparison:
    """Rows of the replay against those of the run, as they come; each is read once.

    Attributes:
        columns: that both have and that mean something.
        steps: compared so far.
        first: the first difference.
    """

    def __init__(self, run: RunDirectory, scratch: RunDirectory, stretch: Plan) -> None:
        self._scratch, self._stretch = scratch, stretch
        view = run.metrics()
        self.columns = tuple(name for name in view.columns if name not in (*INCIDENTAL, "step"))
        self._steps, self._table = _applied(view, view.current(), self.columns, stretch)
        self._begin()

    def _begin(self) -> None:
        import numpy as np

        self._read = 0  # rows of the replay that have been compared
        self._timelines = TimelineIndex()
        self._met = np.zeros(len(self._steps), dtype=bool)
        self.steps = 0
        self.first: Difference | None = None

    def look(self) -> None:
        """Compare the rows that have come since; of a step that only one of both has, nothing is
        said yet.
        """
        view = self._scratch.metrics()
        # The row before tells whether the first new one begins a timeline.
        before = max(0, self._read - 1)
        rows = MetricsView(view.columns, view.array[before:], lambda: self._timelines)
        steps, numbers = rows.column("step"), rows.column("timeline")
        self._timelines.add_rows(steps, numbers, from_start=self._read == 0)
        current = self._timelines.current(steps, numbers)
        current[: self._read - before] = False
        self._compare(rows, current)
        self._read = len(view)

    def finish(self) -> None:
        """Compare all rows once more, by what the journal says at the end of what was abandoned."""
        self._begin()
        view = self._scratch.metrics()
        self._compare(view, view.current())
        self._read = len(view)

    def _compare(self, view: MetricsView, current: np.ndarray) -> None:
        import numpy as np

        steps, table = _applied(view, current, self.columns, self._stretch)
        at = np.searchsorted(self._steps, steps)
        known = at < len(self._steps)
        known[known] = self._steps[at[known]] == steps[known]
        at, table = at[known], table[known]
        self.steps += int(np.count_nonzero(~self._met[at]))
        self._met[at] = True
        was = self._table[at]
        differ = (was != table) & ~(np.isnan(was) & np.isnan(table))
        rows = np.flatnonzero(differ.any(axis=1))
        if len(rows) and self.first is None:
            row = int(rows[0])
            column = int(np.flatnonzero(differ[row])[0])
            self.first = Difference(
                step=int(self._steps[at[row]]),
                column=self.columns[column],
                was=float(was[row, column]),
                now=float(table[row, column]),
            )

    @property
    def missing(self) -> int:
        return self._stretch.to_step - self._stretch.from_step - self.steps


def _applied(
    view: MetricsView, current: np.ndarray, columns: Sequence[str], stretch: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """(steps ascending, numbers [steps, columns]) of applied steps of the present; the last row of
    a step counts.
    """
    import numpy as np

    all_steps: np.ndarray = np.asarray(view.column("step"))
    here = current & (view.column("verdict") == 0)
    here &= (all_steps > stretch.from_step) & (all_steps <= stretch.to_step)
    rows = np.flatnonzero(here)
    steps, from_the_end = np.unique(all_steps[rows][::-1].astype(np.int64), return_index=True)
    rows = rows[len(rows) - 1 - from_the_end]
    table = [np.asarray(view.column(name)[rows]) for name in columns]
    return steps, np.stack(table, axis=1) if table else np.empty((len(rows), 0))


def weights(run: RunDirectory, scratch: RunDirectory, stretch: Plan) -> tuple[int | None, bool]:
    """The newest step of the stretch of which both have a checkpoint, and whether their parameters
    are the same.
    """
    theirs = {
        m.step: folder
        for folder in checkpoint_dirs(scratch.checkpoints)
        if (m := _manifest(folder)) is not None
    }
    past = RunHistory.of(run.events())
    for folder in checkpoint_dirs(run.checkpoints):
        manifest = _manifest(folder)
        if manifest is None or not stretch.from_step < manifest.step <= stretch.to_step:
            continue
        if manifest.step in theirs and past.lives(timeline=manifest.timeline, step=manifest.step):
            return manifest.step, fingerprint(folder) == fingerprint(theirs[manifest.step])
    return None, True


# -- all of it


def replay(
    run: RunDirectory, *, incident: int | None = None, keep: bool = False, tell: Tell
) -> Outcome:
    """Plan, run, compare.

    Raises:
        UsageError: it cannot be replayed here.
        WorkersFailed: the ranks failed.
        Interrupted: Ctrl-C; nothing is left running.
    """
    stretch = plan(run, incident)
    scratch = prepare(run, stretch)
    try:
        compared = Comparison(run, scratch, stretch)
        _follow(scratch, launching.start(scratch), compared, stretch, tell)
        return outcome(run, scratch, stretch, compared, keep=keep)
    finally:
        if not keep:
            shutil.rmtree(scratch.path, ignore_errors=True)


def outcome(
    run: RunDirectory, scratch: RunDirectory, stretch: Plan, compared: Comparison, *, keep: bool
) -> Outcome:
    """What is known once the replay has ended."""
    compared.finish()
    saved, equal = weights(run, scratch, stretch) if compared.first is None else (None, True)
    return Outcome(
        run=run.name,
        incident=stretch.incident,
        same=compared.first is None and not compared.missing and equal,
        from_step=stretch.from_step,
        to_step=stretch.to_step,
        steps=compared.steps,
        columns=compared.columns,
        missing=compared.missing,
        first=compared.first,
        weights_step=saved,
        weights_same=equal,
        remarks=remarks(run),
        scratch=str(scratch.path) if keep else "",
    )


def _follow(
    scratch: RunDirectory,
    supervisor: subprocess.Popen[bytes],
    compared: Comparison,
    stretch: Plan,
    tell: Tell,
) -> None:
    """Until it has ended; at the first difference there is no need to go on."""
    with _ended_with_us(scratch, supervisor):
        while (code := launching.exit_code_of(supervisor)) is None:
            compared.look()
            tell(compared.steps, stretch.to_step - stretch.from_step)
            if compared.first is not None:
                return
            time.sleep(POLL_SECONDS)
    if code in (ExitCode.FINISHED, ExitCode.INTERRUPTED):
        return
    last = next((event for event in reversed(scratch.events()) if event.kind == "ended"), None)
    why = clean_text(last.message, 600) if last is not None else f"exit code {code}"
    raise (UsageError if code == ExitCode.USAGE else WorkersFailed)(
        f"the replay did not get to its end: {why}"
    )


@contextlib.contextmanager
def _ended_with_us(scratch: RunDirectory, supervisor: subprocess.Popen[bytes]) -> Iterator[None]:
    """However this is left, no process of the replay lives on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("the replay was left; the run is as it was") from None
    finally:
        if supervisor.poll() is None:
            supervisor.send_signal(signal.SIGQUIT)
            with contextlib.suppress(Exception):
                supervisor.wait(timeout=20)
            supervisor.kill()
            supervisor.wait()
        processes.kill(processes.processes_of(scratch.path))
