"""guardrail init: write a commented configuration."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from guardrail.cli.common import has_terminal
from guardrail.core.errors import ConfigError, UsageError

BUILT_IN_TEXT = "builtin:python"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the run that suits it. TEMPLATE has a slot for each attribute but `text`.

    Attributes:
        text: what the question shows.
        lr: peak learning rate of AdamW.
        batch_size: samples of one update over all processes, before it is rounded up to a multiple
            of the number of processes.
    """

    text: str
    tokenizer: str
    sequence_length: int
    layers: int
    width: int
    heads: int
    lr: str
    warmup_steps: int
    steps: int
    batch_size: int
    micro_batch_size: int
    checkpoint_every: int


# The learning rate of "base" is GPT-3 Small's (Brown et al. 2020, table 2.1). Smaller models take a
# larger one.
SIZES = {
    "tiny": Size(
        text="0.8 M parameters, for a CPU",
        tokenizer="bytes",
        sequence_length=128,
        layers=4,
        width=128,
        heads=4,
        lr="2e-3",
        warmup_steps=30,
        steps=300,
        batch_size=16,
        micro_batch_size=0,
        checkpoint_every=50,
    ),
    "small": Size(
        text="14 M parameters, for one GPU",
        tokenizer="bpe",
        sequence_length=512,
        layers=6,
        width=384,
        heads=6,
        lr="1e-3",
        warmup_steps=200,
        steps=5_000,
        batch_size=64,
        micro_batch_size=16,
        checkpoint_every=500,
    ),
    "base": Size(
        text="91 M parameters, for several GPUs",
        tokenizer="bpe",
        sequence_length=1024,
        layers=12,
        width=768,
        heads=12,
        lr="6e-4",
        warmup_steps=1_000,
        steps=20_000,
        batch_size=256,
        micro_batch_size=8,
        checkpoint_every=1_000,
    ),
}

TEMPLATE = """\
# Written by `guardrail init`. Start the run:   guardrail launch {path}
# Check it on this machine first:               guardrail doctor {path}
# A key that is not here has its default.

[run]
# The run directory becomes runs/{name}/DATE-NN.
name = "{name}"

[launch]
# Processes on this machine; on GPUs one for each GPU. They train the same model on parts of each
# batch.
processes = {processes}
# "auto": GPUs where there are any, else the CPU.
device = "auto"

[guard]
# "auto" acts by itself, "ask" pauses and asks before it rolls back, "advise" only reports, "off"
# only records.
mode = "auto"

[snapshots]
# Applied steps between two copies of the training state in host memory, and how many are kept.
every = {snapshot_every}
keep = 4

[checkpoint]
# Applied steps between two checkpoints on disk.
every = {checkpoint_every}

[data]
# Folders, globs or files (.txt .md .py ... .jsonl, also .gz or .zst); "builtin:python" is the
# source and documentation of this Python.
sources = [{sources}]
# "bytes" needs no training; "bpe" is trained once on the sources and cached; or the path of a
# tokenizer.json.
tokenizer = "{tokenizer}"
# Tokens of one sample.
sequence_length = {sequence_length}

[model]
layers = {layers}
width = {width}
heads = {heads}

[optim]
# Peak learning rate of AdamW, reached after a linear warm-up; then a cosine to a tenth of it.
lr = {lr}
warmup_steps = {warmup_steps}
# Global gradient norm to which gradients are clipped.
clip = 1.0

[train]
# Applied updates until the end of the run.
steps = {steps}
# Samples of one update over all processes: {batch_size} x {sequence_length} = {batch_tokens:,}
# tokens.
batch_size = {batch_size}
# Samples of one forward and backward pass of one process; 0: its full share of the batch.
micro_batch_size = {micro_batch_size}
# "bf16" halves the memory of activations on GPUs that support it.
precision = "fp32"
# Steps between two evaluations on held-out documents.
eval_every = {eval_every}
"""


@click.command()
@click.argument("path", default="config.toml", metavar="[FILE]")
@click.option("--data", multiple=True, metavar="PATH", help="Text to train on; repeatable.")
@click.option(
    "--size",
    type=click.Choice(tuple(SIZES)),
    help=f"Model size. {'; '.join(f'{name}: {size.text}' for name, size in SIZES.items())}.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 1024),
    help="Number of processes. Default: one for each GPU.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def command(
    path: str, data: tuple[str, ...], size: str | None, processes: int | None, force: bool
) -> int:
    """Write a commented configuration to FILE (config.toml; - prints it).

    `init` asks for the data, the size of the model and the number of processes. An option
    answers the question of its name. Without a terminal, the defaults answer the rest.
    """
    target = Path(path)
    if path != "-" and target.exists() and not force:
        raise UsageError(f"{path} exists. Give another FILE, or --force to replace it.")
    asks = has_terminal() and path != "-"
    sources = data or ask_sources(asks)
    chosen = size or ask_size(asks)
    count = processes or ask_processes(asks)
    text = render_config(path, sources, SIZES[chosen], count)
    check_config(text, path)
    if path == "-":
        click.echo(text, nl=False)
        return 0
    target.write_text(text, encoding="utf-8")
    click.echo(f"{path} written. Next:")
    click.echo(f"  guardrail doctor {path}    check this machine and the configuration")
    click.echo(f"  guardrail launch {path}    start the run")
    return 0


def ask_sources(asks: bool) -> tuple[str, ...]:
    """Return the text to train on: the answer, or the default where nothing is asked."""
    if not asks:
        return (BUILT_IN_TEXT,)
    answer = click.prompt("Text to train on (folder, file or glob)", default=BUILT_IN_TEXT)
    return (str(answer),)


def ask_size(asks: bool) -> str:
    """Return a name of SIZES: the answer, or "tiny" where nothing is asked."""
    if not asks:
        return "tiny"
    for name, size in SIZES.items():
        click.echo(f"  {name:6} {size.text}")
    return str(click.prompt("Model size", type=click.Choice(tuple(SIZES)), default="tiny"))


def ask_processes(asks: bool) -> int:
    """Return the number of processes: the answer, or one for each GPU where nothing is asked."""
    from guardrail.launch.preflight import count_cuda_devices

    default = count_cuda_devices() or 1
    if not asks:
        return default
    return int(click.prompt("Processes", type=click.IntRange(1, 1024), default=default))


def render_config(path: str, sources: tuple[str, ...], size: Size, processes: int) -> str:
    """Return the text of the configuration."""
    per_process = size.micro_batch_size or 1
    step = processes * per_process
    batch_size = -(-size.batch_size // step) * step
    rounded = dataclasses.replace(size, batch_size=batch_size)
    return TEMPLATE.format(
        path="config.toml" if path == "-" else path,
        name=suggest_run_name(path),
        processes=processes,
        sources=", ".join(quote_toml(source) for source in sources),
        snapshot_every=max(10, size.checkpoint_every // 10),
        batch_tokens=batch_size * size.sequence_length,
        eval_every=max(50, size.steps // 20),
        **dataclasses.asdict(rounded),
    )


def suggest_run_name(path: str) -> str:
    """Return the name of the file where it can be the name of a run, else "run"."""
    from guardrail.rundir.run_creation import is_run_name

    stem = Path(path).stem
    if path == "-" or stem == "config" or not is_run_name(stem):
        return "run"
    return stem


def quote_toml(text: str) -> str:
    """Return the text as a TOML string."""
    import tomli_w

    return tomli_w.dumps({"v": text}).removeprefix("v = ").strip()


def check_config(text: str, path: str) -> None:
    """Refuse answers that cannot work, such as a path without files. Raises ConfigError."""
    import tomllib

    from guardrail.core.config import build_config

    try:
        build_config(tomllib.loads(text), file="guardrail init", base=Path.cwd())
    except ConfigError as error:
        print(f"guardrail init: {path} is not written", file=sys.stderr)
        raise error
