"""The tokens that pull hardest on the embedding are named: the right ones, on every rank alike, and
only when asked.
"""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F

from guardrail.core.events.event import Event
from guardrail.core.records.findings import FindingKind
from guardrail.core.records.signals import EMBED_GRAD_NORM, EMBED_SHARE
from guardrail.core.records.verdicts import Action, Verdict
from guardrail.core.text import escape_text
from guardrail.decide.embedding_lead import concerns_embedding
from guardrail.decide.run_history import RunHistory
from guardrail.report.build import build_report
from guardrail.report.output import incident_text, render_report, report_as_dict
from guardrail.rundir.run_directory import RunDirectory
from guardrail.torch.diagnose.embedding_tokens import MAX_TOKENS, find_longest_rows
from guardrail.tui.model.pane_state import PaneState
from guardrail.tui.model.run_story import Story, StoryBuilder
from guardrail.tui.model.view import View
from guardrail.tui.panes import incidents
from tests.support.fake_run import example, snapshot_of
from tests.support.findings import make_finding
from tests.support.ranks import run_ranks
from tests.support.running import (
    BATCH,
    FEW_SHAPES,
    LENGTH,
    assert_same,
    of_kind,
    tiny,
    told,
    trained,
    write_corpus,
)
from tests.support.tiny import VOCABULARY, Setup
from trainer.config.config import Config
from trainer.config.layout import ParallelSection
from trainer.data.tokenizer import ByteTokenizer, JsonTokenizer

GUARD = {"embed_score": 5.0, "embed_factor": 0.4, "embed_hold": 3, "embed_back": 2}
BAD = 32 * BATCH  # first position of the batch that holds one byte again and again


# -- the rows of a gradient


def rows_of(rank: int, kind: str) -> tuple[list[tuple[int, float]], list[float]]:
    """Longest rows by the ranks' shards, and all norms of the whole gradient."""
    setup = Setup(kind)
    tokens = torch.randint(0, VOCABULARY, (8, 5), generator=torch.Generator().manual_seed(3))
    mine = tokens.chunk(setup.world)[setup.rank]
    torch.manual_seed(0)
    F.cross_entropy(setup.model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten()).backward()
    weight = setup.inner.embed.weight
    gradient = weight.grad
    assert gradient is not None
    before = gradient.full_tensor().clone() if kind == "fsdp" else gradient.clone()

    def gathered(value: Any) -> list[Any]:
        everyone: list[Any] = [None] * setup.world
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    found = find_longest_rows([torch.zeros(3, 2), weight], gathered)
    after = gradient.full_tensor() if kind == "fsdp" else gradient
    assert torch.equal(before, after), "the gradient is only read"
    assert (
        find_longest_rows([], gathered) == []
        and find_longest_rows([torch.zeros(3, 2)], gathered) == []
    )
    return found, before.norm(dim=1).tolist()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_longest_rows_of_a_gradient_that_is_spread_over_ranks(
    kind: str, tmp_path: Path
) -> None:
    results = run_ranks(rows_of, 2, kind, folder=tmp_path)
    assert results[0] == results[1]
    found, norms = results[0]
    expected = sorted(range(VOCABULARY), key=lambda row: -norms[row])[:MAX_TOKENS]
    assert [row for row, _ in found] == expected and MAX_TOKENS < VOCABULARY
    assert [norm for _, norm in found] == pytest.approx([norms[row] for row in expected])


# -- a run


def one_byte(folder: Path, *, world: int = 1, strategy: str = "ddp", tied: bool = False) -> Config:
    """A corpus of which one batch, its 33rd, holds nothing but one byte."""
    corpus = write_corpus(folder / "corpus")
    # Each token is one byte, and the end of a document one more.
    whole, rest = divmod(BAD * LENGTH, 1000 + 1)
    short = corpus / f"{whole:04d}.txt"
    short.write_text(short.read_text(encoding="utf-8")[: rest - 1], encoding="utf-8")
    (corpus / f"{whole + 1:04d}.txt").write_text("~" * BATCH * LENGTH, encoding="utf-8")
    model = {"tied": tied, "dropout": 0.0}
    return tiny(
        folder, world=world, strategy=strategy, model=model, train={"steps": 40}, guard=GUARD
    )


def assert_one_byte(config: Config, *, leads: bool = True) -> list[dict[str, Any]]:
    """The tokens that such a run has named. Where the embedding led, its gradients went down and
    came back.
    """
    run = trained(config)
    first = of_kind(run, "verdict")[0]
    assert first.data["at_step"] == 33 and first.data["batch"] == [BAD, BAD + BATCH]
    tokens = first.data["tokens"]
    assert (tokens[0]["id"], tokens[0]["text"], tokens[0]["count"]) == (126, "~", BATCH * LENGTH)
    assert [token["norm"] for token in tokens] == sorted(
        (token["norm"] for token in tokens), reverse=True
    )
    embedding = next(f["value"] for f in first.data["findings"] if f["signal"] == EMBED_GRAD_NORM)
    assert all(
        token["share"] == pytest.approx((token["norm"] / embedding) ** 2) for token in tokens
    )
    assert sum(token["share"] for token in tokens) <= 1.0 + 1e-6
    assert not any("tokens" in event.data for event in run.events() if event.kind != "verdict")
    past = RunHistory.from_events(run.events())
    alphas = [past.effects(step, config.guard).embed_alpha for step in range(32, 40)]
    assert alphas == pytest.approx([1.0, 0.4, 0.4, 0.4, 0.6, 0.8, 1.0, 1.0] if leads else [1.0] * 8)
    assert_same(run, trained(told(config, run)))
    return list(tokens)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[dict[str, Any]]]:
    config = one_byte(tmp_path_factory.mktemp("alone"))
    return config, assert_one_byte(config)


def test_a_batch_of_one_byte_is_named_by_that_byte(
    alone: tuple[Config, list[dict[str, Any]]],
) -> None:
    """With an input matrix of its own nearly all of the gradient is this row's."""
    _, tokens = alone
    assert tokens[0]["share"] > 0.95


@pytest.mark.parametrize(("world", "strategy"), FEW_SHAPES[1:])
def test_two_ranks_name_the_same(
    tmp_path: Path, world: int, strategy: str, alone: tuple[Config, list[dict[str, Any]]]
) -> None:
    tokens = assert_one_byte(one_byte(tmp_path, world=world, strategy=strategy))
    ours, theirs = tokens[0], alone[1][0]
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", [{"tp": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": True}], ids=str
)
def test_a_split_vocabulary_and_a_pipeline_name_the_same(
    tmp_path: Path, parallel: dict[str, Any], alone: tuple[Config, list[dict[str, Any]]]
) -> None:
    whole = one_byte(tmp_path, world=2)
    train = msgspec.structs.replace(whole.train, micro_batch_size=4)
    split = msgspec.structs.replace(whole, parallel=ParallelSection(**parallel), train=train)
    (ours,), (theirs,) = assert_one_byte(split), alone[1]
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-2)


def test_tied_weights_name_what_was_shown_and_what_was_expected(tmp_path: Path) -> None:
    # the loss stood out as early
    tokens = assert_one_byte(one_byte(tmp_path, tied=True), leads=False)
    assert len(tokens) == MAX_TOKENS and tokens[0]["share"] < 1.0
    assert (tokens[1]["text"], tokens[1]["count"]) == (" ", 0), (
        "what the model takes for the likeliest byte"
    )


# -- what is asked for, and what is shown


def verdict(action: Action, signal: str, value: float = 5.0, **more: Any) -> Verdict:
    found = make_finding(
        3, signal=signal, kind=FindingKind.EMBED_SPIKE, value=value, baseline=1.0, score=9.0
    )
    return Verdict(action=action, step=3, findings=(found,), **more)


def test_tokens_are_asked_for_only_of_a_rejected_step_with_a_finding_on_the_embedding() -> None:
    assert concerns_embedding(verdict(Action.SKIP, EMBED_SHARE))
    assert concerns_embedding(verdict(Action.ROLLBACK, EMBED_GRAD_NORM))
    assert concerns_embedding(verdict(Action.APPLY, EMBED_GRAD_NORM, would=Action.SKIP)), (
        "advise tells them too"
    )
    assert not concerns_embedding(verdict(Action.APPLY, EMBED_GRAD_NORM)), (
        "a note on a healthy step costs nothing"
    )
    assert not concerns_embedding(verdict(Action.SKIP, "loss"))
    assert not concerns_embedding(verdict(Action.SKIP, EMBED_GRAD_NORM, math.nan))
    assert not concerns_embedding(Verdict(action=Action.APPLY, step=3))


def test_a_token_is_spelled_by_its_text_or_by_its_name() -> None:
    tokenizer = ByteTokenizer()
    assert [tokenizer.spell_token(token) for token in (126, 0xE2, 257, 300)] == [
        "~",
        "<0xE2>",
        "<|eos|>",
        "",
    ]
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": 2, "content": "<|eos|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
        ],
        "model": {"type": "WordLevel", "vocab": {"a": 0, " SolidGoldMagikarp": 1, "<|eos|>": 2}, "unk_token": "a"},
    }  # fmt: skip
    words = JsonTokenizer(json.dumps(content), name="x", source="x")
    assert [words.spell_token(token) for token in (1, 2, 9)] == [
        " SolidGoldMagikarp",
        "<|eos|>",
        "",
    ]


def test_what_does_not_print_is_shown_as_its_escape() -> None:
    assert escape_text("a\n\x1b[2J\u202e\ud800é", 60) == "a\\n\\x1b[2J\\u202e\\ud800é"
    assert escape_text("x" * 100, 10) == "x" * 9 + "…" and escape_text(" the", 9) == " the"


EVIL = "\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e</dd><script>alert(1)</script>[/red]\n"


def story_of(events: list[Event]) -> Story:
    digest = StoryBuilder()
    digest.add(events)
    return digest.story()


def test_tokens_stand_in_every_form_of_the_report_and_on_the_screen_and_can_do_no_harm(
    tmp_path: Path,
) -> None:
    run = RunDirectory.create(tmp_path, "demo", "")
    told = [
        [
            {"id": 7, "text": "\\x07", "norm": 1.5, "share": 0.25, "count": 3},
            {"id": 9, "norm": 1.0, "share": 0.1},
        ],
        [
            {"id": 7, "text": "\\x07", "norm": 12.5, "share": 0.875, "count": 264},
            {"id": 11, "text": EVIL, "count": 0},
        ],
    ]
    for number, tokens in enumerate(told):
        event = msgspec.to_builtins(verdict(Action.SKIP, EMBED_GRAD_NORM))
        run.append(
            "verdict",
            "skip",
            step=2,
            action="skip",
            findings=event["findings"],
            incident=1,
            tokens=tokens,
        )
        if not number:
            run.append("incident", "incident 1: open", step=2, number=1, state="open", onset=3)
    best = 'token 7 "\\x07": up to 88% of the gradient of the embedding, norm 12.5, 264 times in the batch'
    terminal = incident_text(run, 1)
    markdown, page = (render_report(run, form) for form in ("markdown", "html"))
    rows = [line.split() for line in terminal.splitlines()]
    assert ["7", '"\\x07"', "up", "to", "88", "%", "264"] in rows
    assert ["9", "up", "to", "10", "%", "-"] in rows
    assert not any(row[:1] == ["11"] for row in rows), "it does not occur in the batch"
    assert markdown.count("x07") == 1 and html.escape('7 "\\x07"') in page
    assert "<script" not in page
    assert [one["id"] for one in report_as_dict(run)["incidents"][0]["tokens"]] == [11, 7, 9], (
        "what has no norm is foremost"
    )
    snapshot = replace(snapshot_of(example()), story=story_of(run.events()))
    rows = incidents.PANE.detail(View(snapshot, 0.0), 200, 40, PaneState(cursor=0))
    screen = "\n".join("".join(piece for piece, _ in line) for line in rows)
    assert "tokens" in screen and best in screen
    for shown in (terminal, markdown, page, screen):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


def test_a_journal_full_of_nonsense_names_no_token(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo", "")
    for tokens in (
        None,
        3,
        {},
        [1, None, []],
        [{"id": "x", "share": [], "norm": {}, "text": 5, "count": None}],
    ):
        run.append("verdict", "skip", step=2, action="skip", incident=1, tokens=tokens)
    assert [token.id for token in build_report(run).incidents[0].tokens] == [0]
