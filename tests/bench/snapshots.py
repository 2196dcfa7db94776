"""Cost of a copy of the training state: to a snapshot, back from it, and to disk.

    python -m tests.bench.snapshots [--rounds 40] [--threads 1] [--millions 110] [--beside]

The model has about 10 M parameters and AdamW. Each round measures every line once, in turn, together
with a plain `_foreach_copy_` of the same tensors between existing buffers. Ratios are medians of
these pairs, since a busy machine slows both alike. Goal: 1.3 for a snapshot, both ways. The stall
of a checkpoint is the time that the caller waits. The background write is given as "until
committed".

`--beside` measures only how long a training step waits while a checkpoint is written. Snapshots are
taken at the given interval, like `snapshots.every`, until several checkpoints are committed; then
some are deleted. No step waits if the longest snapshot takes about as long as the usual one.
`--millions 110`: 1.3 GB of state, 10 GB of memory.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from guardrail.torch.checkpoint.disk_checkpoints import CheckpointStore
from guardrail.torch.checkpoint.memory_snapshots import SnapshotRing
from guardrail.torch.state.training_state import TrainingState
from tests.support.bench_options import make_parser
from trainer.config.config import ModelSection, OptimSection
from trainer.model import Decoder
from trainer.optim.registry import build_optimizers

SIZES = {
    10: ModelSection(layers=8, width=320, heads=5),
    110: ModelSection(layers=16, width=768, heads=12),
}  # by millions of parameters


class Subject:
    """A trained model with everything that copies it: snapshots, store, Accelerate, plain copies."""

    def __init__(self, folder: Path, *, millions: int = 10) -> None:
        self.accelerator = Accelerator(cpu=True)
        model = Decoder(SIZES[millions], vocabulary=259, sequence_length=128, seed=0)
        optimizer = build_optimizers(model, OptimSection(lr=3e-4, warmup_steps=10))[0]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        self.state = TrainingState(self.model, self.optimizer)
        self.ring = SnapshotRing(self.state, 4)
        self.store = CheckpointStore(folder / "checkpoints", self.state, keep=2)
        self.accelerate_folder = folder / "accelerate"
        self.live = list(self.state.tensors().values())
        self.host: list[torch.Tensor] = []
        self.step = 0
        self.committed: list[float] = []
        for _ in range(5):  # the ring fills up and every buffer has been touched
            self.take()

    def prepare_bare_copies(self) -> None:
        self.host = [torch.empty_like(tensor) for tensor in self.live]

    def copy_out(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.host, self.live)

    def copy_in(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.host)

    def take(self) -> None:
        self.step += 1
        self.snapshot = self.ring.take(self.step, 8 * self.step, 0, {"detectors": list(range(400))})

    def restore(self) -> None:
        self.ring.restore(self.snapshot)

    def take_and_save(self) -> None:
        self.take()
        self.store.save(self.snapshot, {"config": "0" * 64})

    def committed_now(self) -> None:
        """Finish the background write and empty the disk before the next line; not timed."""
        assert self.store.wait(120)
        self.committed += [
            event.seconds for event in self.store.take_events() if event.state == "candidate"
        ]

    def load(self) -> None:
        path = self.store.find_newest_valid().path
        assert path is not None
        self.store.load(path)

    def accelerate_save(self) -> None:
        self.accelerator.save_state(str(self.accelerate_folder))

    def accelerate_load(self) -> None:
        self.accelerator.load_state(str(self.accelerate_folder))

    def clear(self) -> None:
        for path in self.store.folder.iterdir():
            shutil.rmtree(path)


def timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(subject: Subject, *, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return line -> (seconds, seconds of the plain copy after it) of each round."""
    lines: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "snapshot to the ring": (subject.take, subject.copy_out),
        "rollback from the ring": (subject.restore, subject.copy_in),
        "checkpoint, stall": (subject.take_and_save, subject.copy_out),
        "checkpoint, verify and load": (subject.load, subject.copy_in),
        "accelerate save_state": (subject.accelerate_save, subject.copy_out),
        "accelerate load_state": (subject.accelerate_load, subject.copy_in),
    }
    pairs: dict[str, list[tuple[float, float]]] = {line: [] for line in lines}
    for number in range(rounds + 1):
        for line, (work, bare) in lines.items():
            # which of the two goes first makes a difference
            first = timed(bare) if number % 2 else None
            seconds = timed(work)
            other = timed(bare) if first is None else first
            if line == "checkpoint, stall":
                subject.committed_now()
            if number:
                pairs[line].append((seconds, other))
        subject.clear()
    return pairs


def beside_saves(subject: Subject, *, saves: int, interval: float) -> dict[str, list[float]]:
    """Return line -> seconds that the step waited for each call."""
    lines: dict[str, list[float]] = {
        "snapshot, nothing is written": [],
        "snapshot, a checkpoint is written": [],
    }
    for _ in range(8):
        lines["snapshot, nothing is written"].append(timed(subject.take))
        time.sleep(interval)
    for _ in range(saves):
        lines.setdefault("snapshot and asking for a checkpoint", []).append(
            timed(subject.take_and_save)
        )
        while subject.store.busy:
            time.sleep(interval)
            lines["snapshot, a checkpoint is written"].append(timed(subject.take))
    subject.store.set_states({info.path: "good" for info in subject.store.infos()})
    lines["pruning"] = [timed(lambda: subject.store.prune(subject.step))]
    assert subject.store.wait(120)
    return lines


def print_beside(lines: dict[str, list[float]]) -> None:
    print(f"{'held up by':38} {'calls':>6} {'median ms':>10} {'longest ms':>11}")
    for line, seconds in lines.items():
        print(
            f"{line:38} {len(seconds):6} {statistics.median(seconds) * 1e3:10.1f} {max(seconds) * 1e3:11.1f}"
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--threads", type=int, default=1, help="intra-op threads, for all lines alike"
    )
    parser.add_argument("--millions", type=int, default=10, choices=SIZES, help="parameters, about")
    parser.add_argument(
        "--beside", action="store_true", help="only how long steps are held up beside a save"
    )
    parser.add_argument(
        "--interval", type=float, default=0.5, help="seconds between two snapshots, with --beside"
    )
    parser.add_argument("--saves", type=int, default=4, help="checkpoints, with --beside")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        subject = Subject(Path(name), millions=arguments.millions)
        torch.set_num_threads(arguments.threads)
        if arguments.beside:
            print_beside(beside_saves(subject, saves=arguments.saves, interval=arguments.interval))
            subject.store.close(60)
            return
        subject.prepare_bare_copies()
        pairs = measure(subject, rounds=arguments.rounds)
        subject.store.close(60)
    size = sum(tensor.numel() * tensor.element_size() for tensor in subject.live)
    print(
        f"{subject.parameters / 1e6:.1f} M parameters with AdamW: {len(subject.live)} tensors, {size / 1e6:.0f} MB; "
        f"{arguments.threads} thread(s), {arguments.rounds} rounds in turn"
    )
    print(f"{'':30} {'median ms':>10} {'bare copy ms':>13} {'ratio, median of pairs':>23}")
    for line, values in pairs.items():
        mine, bare = (statistics.median(column) * 1e3 for column in zip(*values, strict=True))
        ratio = statistics.median(a / b for a, b in values)
        print(f"{line:30} {mine:10.1f} {bare:13.1f} {ratio:23.2f}")
    print(f"{'checkpoint, until committed':30} {statistics.median(subject.committed) * 1e3:10.1f}")


if __name__ == "__main__":
    main()
