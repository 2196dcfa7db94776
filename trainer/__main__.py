"""One rank: `python -m trainer`, started by torch elastic. GUARDRAIL_RUN names the run directory.

The exit status is 0 for every intended end, so that elastic restarts failures only. status.json and
the journal say how the run ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback

from guardrail.core.errors import DiskRefuses, GuardrailError, Interrupted, UsageError
from guardrail.core.events.run_state import Ended
from guardrail.core.records.status import Phase
from guardrail.rundir.heartbeat import Heartbeat
from guardrail.rundir.run_directory import RunDirectory
from guardrail.rundir.stop_signals import KILLED, StopSignals

SUPERVISOR_VARIABLE = "GUARDRAIL_SUPERVISOR_PID"
SUPERVISOR_SECONDS = 2.0  # within which a supervisor passes a stop request on to its ranks


def has_supervisor() -> bool:
    """Return whether the supervisor that started this rank is alive."""
    try:
        os.kill(int(os.environ[SUPERVISOR_VARIABLE]), 0)
    except (KeyError, ValueError, OSError):
        return False
    return True


def record_failure(error: BaseException) -> None:
    """Write the exception that ends this rank to TORCHELASTIC_ERROR_FILE; the journal shows it.

    Called in an `except` block. torch's decorator `record` would do the same, but also for a stop
    on request, and it would import torch before the signal handlers are installed.
    """
    with contextlib.suppress(Exception):  # a full disk, or torch that cannot be imported
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of a disk that cannot be written


def write_end(run: RunDirectory, error: GuardrailError, phase: Phase) -> None:
    """Write the end of a start without any training to the journal, at the last step of the run."""
    events = run.events()
    step, timeline = 0, 0
    if events:
        step, timeline = events[-1].step, events[-1].timeline
    code, text = int(error.exit_code), str(error)
    run.write_event(
        Ended(
            message=text,
            step=step,
            timeline=timeline,
            phase=phase.value,
            exit_code=code,
            reason=text,
        )
    )


def main() -> int:
    folder = os.environ.get("GUARDRAIL_RUN")
    if not folder:
        print(
            "GUARDRAIL_RUN is not set: start a run with `guardrail launch CONFIG.toml`",
            file=sys.stderr,
        )
        return 2
    run = RunDirectory.open(folder)
    rank = int(os.environ.get("RANK", "0"))
    signals = StopSignals()
    heartbeat = Heartbeat(run, rank)
    try:
        # Before torch is imported: the default action of a stop signal kills the process.
        signals.install(run.logs / f"rank-{rank}.stacks")
        if rank == 0:  # training does not begin if its results cannot be saved
            run.check_writable()
        heartbeat.start()
        from guardrail.core.config import load_trainer_config
        from trainer.config.config import Config
        from trainer.train import train

        config = load_trainer_config(run.path / "config.toml", of_run=True)
        assert isinstance(config, Config)
        train(config, run=run, signals=signals, heartbeat=heartbeat)
    except (Interrupted, UsageError) as error:
        phase = Phase.FAILED
        if isinstance(error, Interrupted):
            phase = Phase.STOPPED
        print(error, file=sys.stderr)
        if (
            phase is Phase.STOPPED
            and has_supervisor()
            and not signals.came_from_supervisor(seconds=SUPERVISOR_SECONDS)
        ):
            # The run was not stopped: another rank has failed, and all ranks start again.
            return KILLED
        if rank == 0:
            with contextlib.suppress(OSError):  # a full disk must not turn a stop into a failure
                write_end(run, error, phase)
        heartbeat.at(phase)
    except GuardrailError as error:
        print(error, file=sys.stderr)
        record_failure(error)
        return int(error.exit_code)
    except OSError as error:
        # The first write failed because of the disk: a traceback would hide the reason.
        if error.errno not in REFUSED:
            raise
        print(DiskRefuses(run.path, error.strerror or str(error)), file=sys.stderr)
        return int(DiskRefuses.exit_code)
    finally:
        heartbeat.stop()
    return 0


if __name__ == "__main__":
    # os._exit: daemon threads and process groups may delay a normal interpreter exit for minutes.
    # After an error too, since the other ranks wait for the end of this process.
    try:
        code = main()
    except BaseException as error:
        traceback.print_exc()
        record_failure(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
