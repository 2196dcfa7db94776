"""Logs of other programs, each as its own library writes it, complete and cut off."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from guardrail.backtest.backtest import run_backtest
from guardrail.backtest.importers import names, wandb_files
from guardrail.backtest.importers.recorded_log import COUNTED, Log
from guardrail.backtest.importers.sources import find_sources
from guardrail.core.errors import DataError
from guardrail.core.guard_options import GuardOptions
from guardrail.core.packages import install_hint

NAN = float("nan")


def logs(*paths: Path, **columns: str) -> list[Log]:
    return [
        log
        for source in find_sources([str(path) for path in paths])
        for log in source.read(columns)
    ]


def only(path: Path, **columns: str) -> Log:
    (log,) = logs(path, **columns)
    return log


def cells(log: Log, signal: str = "loss") -> list[float | None]:
    return [log.columns[signal].get(row) for row in range(len(log))]


def observed(log: Log) -> list[tuple[int, dict[str, float]]]:
    return [(obs.step, obs.signals) for _, obs in log.observations()]


def same(a: list[Any], b: list[Any]) -> bool:
    """Equal, NaN included."""
    return repr(a) == repr(b)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# -- text ------------------------------------------------------------------------------------------

MEGATRON = (
    " iteration {step:8d}/  159576 | consumed samples: {step:12d} | elapsed time per iteration (ms): 18706.1 | "
    "learning rate: 6.000E-05 | global batch size:    96 | lm loss: {loss:.6E} | loss scale: 2048.0 | "
    "grad norm: {norm:.3f} | num zeros: 0.0 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)
TEXTS = {
    "llm.c": "s:{step} trl:{loss:.4f} lr:0.000012 norm:{norm:.2f}",
    "llm.c output": "step {step:4d}/19560 | loss {loss:.6f} (+nanz)| norm {norm:.4f} (+0.13z)| lr 8.57e-07 | 3 ms",
    "nanoGPT": "iter {step}: loss {loss:.4f}, time 250.11ms, mfu 20.01%",
    "build-nanogpt": "{step} train {loss:.6f}",
    "nanochat": "step {step:05d}/21400 (0.06%) | loss: {loss:.6f} | grad norm: {norm:.4f} | lrm: 1.00 | dt: 250.00ms",
    "modded-nanogpt": "step:{step}/5100 train_loss:{loss:.4f} train_time:2100ms step_avg:250.11ms",
    "Megatron": MEGATRON,
    "torchtitan": "[rank0]:[titan] 2025-06-04 08:51:48,074 - root - INFO - \x1b[31mstep: {step:2}  \x1b[32mloss: "
    "{loss:8.5f}  \x1b[38;2;180;60;0mgrad_norm: {norm:7.4f}  \x1b[36mmemory: 27.34GiB(28.78%)  tps: 7,034\x1b[39m",
    "Trainer output": "{{'loss': {loss:.4f}, 'grad_norm': {norm:.4f}, 'learning_rate': 1e-05, 'epoch': 0.01}}",
    "text": "[2026-01-02 03:04:05] epoch 0 step {step} of 900: train loss = {loss:.4f}, gradient norm = {norm:.4f}",
}
# What stands between the records of real logs and is none.
TALK = [
    "using bfloat16, 124.44M parameters",
    "val loss 11.0332",
    "step 250: train loss 4.1, val loss 4.2000",
    "s:250 tel:4.2000",
    "250 val 4.2000",
    "250 hella 0.2600",
    "step:250/5100 val_loss:4.2000 train_time:1ms step_avg:2ms",
    " validation loss at iteration 250 | lm loss value: 7.174200E+00 | lm loss PPL: 1.305315E+03 |",
    "{'eval_loss': 4.2, 'eval_runtime': 1.0, 'epoch': 0.5}",
    "saving checkpoint to out/step-00000250",
]


@pytest.mark.parametrize("kind", TEXTS)
def test_text_of(kind: str, tmp_path: Path) -> None:
    steps = list(range(240, 270))
    values = [(step, 5.0 - step / 1000, 1.0 + step / 1000) for step in steps]
    lines = [TEXTS[kind].format(step=step, loss=loss, norm=norm) for step, loss, norm in values]
    talk = TALK if kind != "text" else TALK[:2]
    lines = [*talk, *lines[:10], *talk, *lines[10:], *talk]
    log = only(write(tmp_path / "out.txt", "\n".join(lines) + "\n"))
    assert log.format == kind
    assert list(log.steps) == (steps if kind != "Trainer output" else list(range(1, 31)))
    assert cells(log) == pytest.approx([loss for _, loss, _ in values], abs=0.0051)
    if "norm" in TEXTS[kind]:
        assert cells(log, "grad_norm") == pytest.approx([norm for *_, norm in values], abs=0.0051)
    if kind == "Megatron":
        assert set(cells(log, "loss_scale")) == {2048.0}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_with_nan(kind: str, tmp_path: Path) -> None:
    lines = [
        TEXTS[kind].format(step=step, loss=NAN if step > 5 else 2.0, norm=NAN)
        for step in range(1, 20)
    ]
    log = only(write(tmp_path / "out.txt", "\n".join(lines)))
    assert same(cells(log), [2.0] * 5 + [NAN] * 14)


@pytest.mark.fault("E7")
@pytest.mark.parametrize(
    "kind",
    ["llm.c", "llm.c output", "nanochat", "Megatron", "torchtitan", "Trainer output", "text"],
)
def test_text_without_the_loss_that_its_neighbours_have(kind: str, tmp_path: Path) -> None:
    """A loss that is not printed is not finite: a record, and no line that vanishes."""
    without = {
        "llm.c": " trl:{loss:.4f}",
        "llm.c output": " loss {loss:.6f} (+nanz)|",
        "nanochat": " loss: {loss:.6f} |",
        "Megatron": " lm loss: {loss:.6E} |",
        "torchtitan": "\x1b[32mloss: {loss:8.5f}  ",
        "Trainer output": "'loss': {loss:.4f}, ",
        "text": " train loss = {loss:.4f},",
    }[kind]
    assert without in TEXTS[kind]
    bare = TEXTS[kind].replace(without, "")
    lines = [
        (TEXTS[kind] if step < 20 else bare).format(step=step, loss=2.0, norm=1.0)
        for step in range(1, 31)
    ]
    lines = [*TALK[:2], *lines[:25], "saving checkpoint to out/step-00000025", *lines[25:]]
    log = only(write(tmp_path / "out.txt", "\n".join(lines)))
    assert list(log.steps) == list(range(1, 31))
    assert same(cells(log), [2.0] * 19 + [NAN] * 11)


@pytest.mark.parametrize(
    "shown",
    [
        *(
            pytest.param(shown, marks=pytest.mark.fault("E7"))
            for shown in ("None", "N/A", "1.#QNAN", "********")
        ),
        *("-nan", "nan(ind)"),
    ],
)
def test_text_whose_loss_is_no_number(shown: str, tmp_path: Path) -> None:
    text = "step {step} | loss: {loss} | norm: 1.0000"
    lines = [text.format(step=step, loss=2.0 if step < 20 else shown) for step in range(1, 31)]
    assert same(cells(only(write(tmp_path / "out.txt", "\n".join(lines)))), [2.0] * 19 + [NAN] * 11)


@pytest.mark.fault("E7")
def test_iterations_that_megatron_skipped_are_overflows(tmp_path: Path) -> None:
    """While the scale falls, such a line holds neither loss nor norm."""
    lines = [MEGATRON.format(step=step, loss=2.0, norm=1.0) for step in range(1, 61)]
    for row in range(50, 60):
        fields = [f for f in lines[row].split("|") if "lm loss" not in f and "grad norm" not in f]
        line = "|".join(fields).replace("skipped iterations:   0", "skipped iterations:   1")
        lines[row] = line.replace("scale: 2048.0", f"scale: {2048 / 2 ** (row - 49)}")
    log = only(write(tmp_path / "out.log", "\n".join(lines)))
    assert observed(log)[55] == (56, {"loss_scale": 32.0, "grad_norm": math.inf})
    alarms = [(alarm.row, alarm.kind) for alarm in run_backtest(log, GuardOptions()).alarms]
    assert (57, "scale_collapse") in alarms


def test_text_gives_a_step_once_although_every_rank_prints_it(tmp_path: Path) -> None:
    line = "[rank{rank}]:2025-04-01 00:25:47,084 - root - INFO - step: {step}  loss:  6.2{rank}  memory: 8.04GiB(9.48%)"
    lines = [line.format(rank=rank, step=step) for step in range(1, 30) for rank in (1, 0, 2)]
    log = only(write(tmp_path / "job.out", "\n".join(lines)))
    assert list(log.steps) == list(range(1, 30))
    assert set(cells(log)) == {6.21}


def test_text_overwritten_by_carriage_returns_and_cut_off(tmp_path: Path) -> None:
    lines = [
        f"step {step:05d} (0.1%) | loss: {3 + step / 100:.6f} | lrm: 1.00    " for step in range(30)
    ]
    log = only(write(tmp_path / "out.txt", "\r".join(lines)[:-40]))
    assert list(log.steps) == list(range(29))


def test_text_whose_counter_goes_back(tmp_path: Path) -> None:
    steps = [*range(100, 130), *range(120, 140)]
    lines = [f"iter {step}: loss 3.1000, time 250.11ms, mfu 20.01%" for step in steps]
    assert list(only(write(tmp_path / "out.txt", "\n".join(lines))).steps) == steps


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_table_keeps_a_blank_apart_from_a_nan(delimiter: str, tmp_path: Path) -> None:
    rows = [
        ["step", "lr", "loss", "grad_norm"],
        ["10", "1e-3", "3.5", ""],
        ["20", "1e-3", "nan", "inf"],
        ["30"] * 4,
    ]
    log = only(write(tmp_path / "log", "\ufeff" + "\n".join(delimiter.join(row) for row in rows)))
    assert list(log.steps) == [10, 20, 30]
    assert same(cells(log), [3.5, NAN, 30.0])
    assert same(cells(log, "grad_norm"), [None, math.inf, 30.0])
    assert observed(log)[0] == (10, {"loss": 3.5})


def test_lightning_writes_training_and_validation_on_rows_of_their_own(tmp_path: Path) -> None:
    text = "epoch,step,train_loss,val_loss,grad_2.0_norm_total\n"
    text += "".join(
        f"0,{step},{3 - step / 100},,\n0,{step},,,1.5\n0,{step},,3.1,\n"
        for step in range(49, 300, 50)
    )
    log = only(write(tmp_path / "version_0" / "metrics.csv", text))
    assert (len(log), log.other_rows) == (6, {"evaluation": 6}), (
        "a step is one record, whatever rows it was written on"
    )
    assert [step for step, _ in observed(log)] == [49, 99, 149, 199, 249, 299]
    assert all(set(signals) == {"loss", "grad_norm"} for _, signals in observed(log))


def test_table_exported_from_wandb_holds_a_run_a_column(tmp_path: Path) -> None:
    header = [
        "Step",
        *(
            f"{run} - train/loss{end}"
            for run in ("brisk-1", "calm-2")
            for end in ("", "__MIN", "__MAX")
        ),
    ]
    rows = [
        [str(step), "2.5", "2.4", "2.6", *(["3.5"] * 3 if step > 3 else [""] * 3)]
        for step in range(1, 7)
    ]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in [header, *rows])
    brisk, calm = logs(write(tmp_path / "export.csv", text))
    assert (brisk.path.rpartition("#")[2], list(brisk.steps), set(cells(brisk))) == (
        "brisk-1",
        [*range(1, 7)],
        {2.5},
    )
    assert (calm.path.rpartition("#")[2], list(calm.steps), set(cells(calm))) == (
        "calm-2",
        [4, 5, 6],
        {3.5},
    )


def test_table_cut_off_and_with_zeros_of_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"step,loss\n1,3.0\n2,3.1\nabc,3.2\n4\n5,3.3\n" + b"\0" * 300)
    log = only(path)
    assert (list(log.steps), cells(log)) == ([1, 2, 5], [3.0, 3.1, 3.3])
    assert "2 lines" in log.notes[0]


def test_table_whose_step_is_an_epoch(tmp_path: Path) -> None:
    text = "step,loss\n" + "".join(f"{row // 100},3.0\n" for row in range(500))
    log = only(write(tmp_path / "log.csv", text))
    assert list(log.steps) == list(range(1, 501))
    assert "counted" in log.notes[0]


@pytest.mark.parametrize("step", ["nan", "inf", "1e30", "-", ""])
def test_table_whose_steps_are_none_counts(step: str, tmp_path: Path) -> None:
    log = only(write(tmp_path / "a.csv", "step,loss\n" + f"{step},2.5\n{step},\n{step},2.25\n"))
    assert observed(log) == [(1, {"loss": 2.5}), (2, {"loss": 2.25})]
    assert COUNTED.format("step") in log.notes


def test_table_with_one_step_leaves_records_without_out(tmp_path: Path) -> None:
    log = only(write(tmp_path / "a.csv", "step,loss\nnan,3\n7,2.5\ninf,2\n"))
    assert observed(log) == [(7, {"loss": 2.5})]
    (note,) = log.notes
    assert note.startswith("2 lines")


def test_json_lines_whose_steps_are_none_say_that_they_count(tmp_path: Path) -> None:
    log = only(
        write(tmp_path / "a.jsonl", '{"step": 1e30, "loss": 2.5}\n{"step": 1e30, "loss": 2.25}\n')
    )
    assert observed(log) == [(1, {"loss": 2.5}), (2, {"loss": 2.25})]
    assert log.notes == [COUNTED.format("step")]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("iter {}: loss nan, time 3ms, mfu 3%", "nanoGPT"),
        ("step {} loss nan, lr 3e-4", "text"),
        ("epoch 1, iteration {}, loss None, fast", "text"),
    ],
)
def test_text_of_nothing_but_nan_is_no_table(line: str, kind: str, tmp_path: Path) -> None:
    log = only(
        write(tmp_path / "out.log", "".join(line.format(step) + "\n" for step in range(1, 4)))
    )
    assert log.format == kind and same(cells(log), [NAN] * 3) and list(log.steps) == [1, 2, 3]


def test_table_without_steps_counts(tmp_path: Path) -> None:
    assert list(only(write(tmp_path / "log.csv", "loss,lr\n3,1\n2,1\n")).steps) == [1, 2]


def test_column_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "step,ce,router\n1,3.0,4.0\n2,3.1,5.0\n")
    log = only(path, loss="ce", router_norm="router")
    assert (cells(log), cells(log, "router_norm")) == ([3.0, 3.1], [4.0, 5.0])
    with pytest.raises(names.ColumnError, match=r"'cd'.*step, ce, router") as missing:
        only(path, loss="cd")
    assert (missing.value.kind, missing.value.signal) == ("no_column", "loss")
    with pytest.raises(DataError, match="step, ce, router\n  hint: --column loss=NAME") as unnamed:
        only(path)
    assert unnamed.value.kind == "no_signal"


@pytest.mark.parametrize(
    ("columns", "loss", "norm"),
    [
        (["loss", "val_loss", "grad_norm"], "loss", "grad_norm"),
        (
            ["eval/loss", "train/loss", "train/grad_norm", "train/grad_norm/layer.0"],
            "train/loss",
            "train/grad_norm",
        ),
        (
            ["lm-loss-training/lm loss", "lm-loss-validation/lm loss"],
            "lm-loss-training/lm loss",
            None,
        ),
        (["grad-norm/grad-norm", "loss-scale/loss-scale"], None, "grad-norm/grad-norm"),
        (
            ["loss_metrics/global_avg_loss", "loss_metrics/global_max_loss"],
            "loss_metrics/global_avg_loss",
            None,
        ),
        (["train/CrossEntropyLoss", "train/Perplexity"], "train/CrossEntropyLoss", None),
        (["optim/total_grad_norm", "optim/param_norm"], None, "optim/total_grad_norm"),
        (["train_loss_step", "train_loss_epoch", "val_loss"], "train_loss_step", None),
        (["aux_loss", "z_loss", "load_balancing_loss", "policy/loss"], "policy/loss", None),
        (["gnorm", "valid_loss"], None, "gnorm"),
        (["max_grad_norm", "clip/grad_norm_clipped", "loss_scale"], None, None),
    ],
)
def test_usual_names(columns: list[str], loss: str | None, norm: str | None) -> None:
    chosen = names.Chooser().choose(columns)
    assert (chosen.get("loss"), chosen.get("grad_norm")) == (loss, norm)


# -- JSON ------------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    records: list[Any] = [
        {"_step": step, "train": {"loss": 3.0, "grad_norm": 1.0}, "ok": True} for step in range(5)
    ]
    records[2]["train"]["loss"] = NAN
    records[3]["train"] = {"loss": "Infinity"}
    text = "\n".join(json.dumps(record) for record in records) + '\n{"_step": 5, "train": {"lo'
    log = only(write(tmp_path / "history", text))
    assert list(log.steps) == [0, 1, 2, 3, 4]
    assert same(cells(log), [3.0, 3.0, NAN, math.inf, 3.0])
    assert cells(log, "grad_norm")[3] is None
    assert "1 record" in log.notes[0]


def trainer_state(count: int) -> str:
    """As TrainerState.save_to_json of transformers 5 lays it out."""
    history: list[dict[str, Any]] = []
    for step in range(10, 10 * count + 1, 10):
        norm = NAN if step == 50 else 1.25
        history.append(
            {
                "epoch": step / 100,
                "grad_norm": norm,
                "learning_rate": 0.001,
                "loss": 2.5,
                "step": step,
            }
        )
        if step % 100 == 0:
            history.append(
                {"epoch": step / 100, "eval_loss": 2.75, "eval_runtime": 1.5, "step": step}
            )
    history.append({"epoch": 3.0, "step": 10 * count, "train_loss": 2.6, "train_runtime": 12.5})
    state = {
        "best_metric": None,
        "global_step": 10 * count,
        "log_history": history,
        "max_steps": 500,
    }
    return json.dumps(state, indent=2, sort_keys=True) + "\n"


def test_trainer_state(tmp_path: Path) -> None:
    log = only(write(tmp_path / "trainer_state.json", trainer_state(30)))
    assert list(log.steps) == list(range(10, 301, 10))
    assert set(cells(log)) == {2.5}
    assert same(cells(log, "grad_norm"), [1.25] * 4 + [NAN] + [1.25] * 25)
    assert log.notes == []


def test_trainer_state_cut_off(tmp_path: Path) -> None:
    text = trainer_state(30)
    log = only(write(tmp_path / "trainer_state.json", text[: text.index('"step": 200')]))
    assert list(log.steps) == list(range(10, 191, 10))
    assert "cut off" in log.notes[0]


def test_trainer_state_as_transformers_writes_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state = transformers.TrainerState()
    state.log_history = json.loads(trainer_state(30))["log_history"]
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert list(only(tmp_path / "trainer_state.json").steps) == list(range(10, 301, 10))


def test_trainer_writes_its_history_in_every_checkpoint(tmp_path: Path) -> None:
    for count in (10, 30, 20):
        write(tmp_path / "out" / f"checkpoint-{count}" / "trainer_state.json", trainer_state(count))
    (log,) = logs(tmp_path)
    assert "checkpoint-30" in log.path


@pytest.mark.fault("E16")
def test_numbers_as_objects_are_printed(tmp_path: Path) -> None:
    shown = [
        "tensor(1.5, device='cuda:0')",
        "tensor([1.5])",
        "np.float64(1.5)",
        "'1.5'",
        "1.5",
        "tensor(nan)",
    ]
    records = [
        {"step": step, "loss": 2.0, "grad_norm": value} for step, value in enumerate(shown, 1)
    ]
    log = only(write(tmp_path / "log.jsonl", "\n".join(map(json.dumps, records))))
    assert same(cells(log, "grad_norm"), [1.5] * 5 + [NAN])


@pytest.mark.fault("E16")
def test_what_was_not_read_is_said(tmp_path: Path) -> None:
    records = [
        {"step": step, "loss": 2.0, "grad_norm": "high" if step > 10 else 1.0}
        for step in range(1, 31)
    ]
    log = only(write(tmp_path / "log.jsonl", "\n".join(map(json.dumps, records))))
    (note,) = log.notes
    assert note.startswith("grad_norm: 20 ") and "'high'" in note
    records = [{"step": step, "loss": 2.0, "grad_norm": "high"} for step in range(1, 31)]
    log = only(write(tmp_path / "other.jsonl", "\n".join(map(json.dumps, records))))
    (note,) = log.notes
    assert note.startswith("grad_norm: ") and "'high'" in note
    log = only(write(tmp_path / "log.csv", "step,loss,grad_norm\n1,2.0,high\n2,2.0,1.0\n"))
    (note,) = log.notes
    assert note.startswith("grad_norm: 1 ")


# -- TensorBoard -----------------------------------------------------------------------------------


def events(
    folder: Path, *, tensors: bool, steps: range = range(40), seldom: int = 1, start: float = 1e9
) -> None:
    """By the writer that PyTorch ships: scalars of the first format, or tensors of the second."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step in steps:
            loss = NAN if step == 30 else 3.0 - step / 100
            writer.add_scalar("train/loss", loss, step, walltime=start + step, new_style=tensors)
            writer.add_scalar("train/lr", 1e-3, step, walltime=start + step, new_style=tensors)
            if step % seldom == 0:
                writer.add_scalar(
                    "train/grad_norm", 1.5, step, walltime=start + step, new_style=tensors
                )
            writer.add_scalar("val/loss", 9.0, step, walltime=start + step, new_style=tensors)
            writer.add_text("note", "words", step, walltime=start + step)


@pytest.mark.parametrize("tensors", [False, True])
def test_event_files(tensors: bool, tmp_path: Path) -> None:
    events(tmp_path, tensors=tensors, seldom=5)
    log = only(tmp_path)
    assert log.names == {"loss": "train/loss", "grad_norm": "train/grad_norm"}
    assert list(log.steps) == list(range(40))
    loss = cells(log)
    assert loss[0] == 3.0 and loss[30] is not None and math.isnan(loss[30])
    assert [row for row, value in enumerate(cells(log, "grad_norm")) if value is not None] == list(
        range(0, 40, 5)
    )


def test_event_file_cut_off(tmp_path: Path) -> None:
    events(tmp_path, tensors=False)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    log = only(path)
    assert 20 < len(log) < 30
    assert "cut off" in log.notes[0]


def test_event_files_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    events(tmp_path, tensors=False, steps=range(30))
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.1000000000.a")
    events(tmp_path, tensors=False, steps=range(20, 40), seldom=7, start=2e9)
    log = only(tmp_path)
    assert list(log.steps) == [*range(30), *range(20, 40)]
    assert [row for row, value in enumerate(cells(log, "grad_norm")) if value is not None][30:] == [
        31,
        38,
        45,
    ]


def test_guardrails_own_event_files(tmp_path: Path) -> None:
    from guardrail.trackers.tfevents import EventFile, encode_scalars

    file = EventFile(tmp_path)
    for step in range(1, 20):
        file.append(encode_scalars({"train/loss": 2.5, "train/grad_norm": 1.5}, step=step, at=NAN))
    log = only(tmp_path)
    assert (list(log.steps), set(cells(log))) == (list(range(1, 20)), {2.5})


# -- wandb -----------------------------------------------------------------------------------------


def framed(records: list[bytes]) -> bytes:
    """As wandb frames records: blocks of 32 KiB, parts of records with their checksums."""
    out = bytearray(struct.pack("<4sHB", b":W&B", 0xBEE1, 0))
    for record in records:
        begun = False
        while True:
            left = 32768 - len(out) % 32768
            if left < 7:
                out += bytes(left)
                left = 32768
            part, record = record[: left - 7], record[left - 7 :]
            kind = {(False, True): 1, (False, False): 2, (True, False): 3, (True, True): 4}[
                begun, not record
            ]
            out += (
                struct.pack("<IHB", zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind)
                + part
            )
            begun = True
            if not record:
                break
    return bytes(out)


def test_frames_of_wandb() -> None:
    records = [
        bytes([number]) * size for number, size in enumerate([10, 40_000, 0, 100_000, 32_754, 7])
    ]
    data = framed(records)
    assert list(wandb_files.read_frames(io.BytesIO(data))) == records
    assert list(wandb_files.read_frames(io.BytesIO(data[:90_000]))) == [*records[:3], None]
    assert list(wandb_files.read_frames(io.BytesIO(data[:50] + b"x" + data[51:]))) == [
        records[0],
        None,
    ]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="tests", dir=str(tmp_path), mode="offline") as run:
        for step in range(200):
            run.log(
                {
                    "train/loss": 3.0 - step / 1000,
                    "train/grad_norm": NAN if step == 100 else 1.5,
                    "note": "words",
                }
            )
    (path,) = tmp_path.rglob("run-*.wandb")
    log, until = only(path), time.monotonic() + 60
    # on a busy machine wandb's own process still writes
    while len(log) < 200 and time.monotonic() < until:
        time.sleep(0.2)
        log = only(path)
    assert (len(log), cells(log)[:2]) == (200, [3.0, 2.999])
    assert same(cells(log, "grad_norm")[99:102], [1.5, NAN, 1.5])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 20 < len(only(path)) < 180


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = tmp_path / "run.wandb"
    path.write_bytes(framed([b"x"]))
    with pytest.raises(DataError, match=re.escape(install_hint("wandb"))):
        only(path)


# -- what is where ---------------------------------------------------------------------------------


def test_folders_are_searched_and_formats_recognised_by_content(tmp_path: Path) -> None:
    write(tmp_path / "a" / "table.data", "step,loss\n1,3.0\n2,3.0\n")
    write(tmp_path / "a" / "people.csv", "name,age\nada,36\n")
    write(tmp_path / "a" / "config.json", '{"model": {"width": 3}}')
    write(tmp_path / "b" / "c" / "out.csv", '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 3.0}\n')
    write(
        tmp_path / "b" / "job.4242",
        "\n".join(TEXTS["nanoGPT"].format(step=step, loss=3.0) for step in range(9)),
    )
    write(tmp_path / "b" / "README.md", "step 1 | loss: 3.0 |\n")
    write(
        tmp_path / "b" / "notes",
        "the loss went up at step 12: loss 3.0, and later step 90\nnothing to see\n",
    )
    write(tmp_path / ".git" / "log.csv", "step,loss\n1,3.0\n")
    events(tmp_path / "d", tensors=False)
    (tmp_path / "b" / "weights.dat").write_bytes(bytes(range(256)) * 20)
    found = {str(Path(log.path).relative_to(tmp_path)): log.format for log in logs(tmp_path)}
    assert found.pop("b/notes") == "text"
    assert found == {
        "a/table.data": "csv",
        "b/c/out.csv": "jsonl",
        "b/job.4242": "nanoGPT",
        "d": "tensorboard",
    }


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"\0" * 100, "empty"),
        (b"\x7fELF\2\1\1\0\0\0\0\0", "unknown_format"),
        (b"PK\3\4\0\0\0\0\0\0step,loss", "unknown_format"),
        (b"hello\nworld\n", "no_training_line"),
        (b"step,loss\n", "no_number"),
        (b"step,loss\nx,y\n", "no_number"),
        (b"name,age\nada,36\n", "no_signal"),
        (b'{"a": 1}\n', "no_signal"),
        (b'{"log_history": []}', "no_signal"),
        (b'{"log_history": 3', "no_history"),
        (b'{"loss"', "no_signal"),
        (b"[[[[[[[[", "no_signal"),
    ],
)
def test_foreign_files_get_one_clear_sentence(content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        only(path)
    assert error.value.kind == kind
    assert str(path) in str(error.value).split("\n")[0]


def test_what_is_not_there(tmp_path: Path) -> None:
    missing = os.strerror(errno.ENOENT)
    for path, kind, why in (
        (tmp_path / "nowhere", "unreadable", missing),
        (tmp_path, "no_run", ""),
    ):
        with pytest.raises(DataError, match=re.escape(str(path))) as error:
            only(path)
        assert error.value.kind == kind and why in str(error.value)


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_any_cut_of_a_file_is_read_or_refused(cut: int, tmp_path: Path) -> None:
    texts = [
        "step,loss,grad_norm\n" + "".join(f"{step},3.5,nan\n" for step in range(40)),
        trainer_state(4),
        "".join(json.dumps({"step": step, "train": {"loss": 2.5}}) + "\n" for step in range(20)),
        "\n".join(MEGATRON.format(step=step, loss=3.0, norm=1.0) for step in range(3)),
    ]
    for number, text in enumerate(texts):
        path = write(tmp_path / f"log-{number}", text[:cut])
        try:
            assert len(only(path)) >= 1
        except DataError as error:
            assert str(path) in str(error)
