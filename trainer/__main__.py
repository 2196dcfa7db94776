"""One rank: `python -m trainer`, started by torch elastic, told its run by GUARDRAIL_RUN.

Every deliberate end exits with 0, so that elastic restarts failures only; how the run ended stands in status.json and
the journal.
"""

from __future__ import annotations

import contextlib
import os
import sys

from guardrail.errors import GuardrailError, Interrupted, UsageError
from guardrail.heartbeat import Heartbeat
from guardrail.records import Phase
from guardrail.rundir import RunDirectory
from guardrail.signals import StopSignals


def main() -> int:
    folder = os.environ.get("GUARDRAIL_RUN")
    if not folder:
        print("GUARDRAIL_RUN is not set: start a run with `guardrail launch CONFIG.toml`", file=sys.stderr)
        return 2
    run = RunDirectory.open(folder)
    rank = int(os.environ.get("RANK", "0"))
    signals = StopSignals()
    # Before torch is imported: a stop must not find the default action, which kills.
    signals.install(run.logs / f"rank-{rank}.stacks")
    heartbeat = Heartbeat(run, rank)
    heartbeat.start()
    try:
        from guardrail.config import load
        from trainer.config import Config
        from trainer.loop import train

        config = load(run.path / "config.toml")
        assert isinstance(config, Config)
        train(config, run=run, signals=signals, heartbeat=heartbeat)
    except (Interrupted, UsageError) as error:
        phase = Phase.STOPPED if isinstance(error, Interrupted) else Phase.FAILED
        print(error, file=sys.stderr)
        if rank == 0:
            with contextlib.suppress(OSError):  # a full disk must not turn a stop into a failure
                run.append("ended", str(error), phase=phase.value, exit_code=int(error.exit_code), reason=str(error))
        heartbeat.at(phase)
    except GuardrailError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    finally:
        heartbeat.stop()
    return 0


if __name__ == "__main__":
    # Straight out, because daemon threads and process groups may hold an orderly interpreter exit up for minutes.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
