"""What holds for every source of the registry, and how a new one is added."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from guardrail.core.errors import ConfigError
from tests.support.examples.zip_source import ZipSource
from tests.support.running import corpus_of, tiny
from trainer.data.sources import discover
from trainer.sources import registry
from trainer.sources.base import Source
from trainer.sources.registry import SOURCES, find_source, source_of_entry

each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
TEXT = "a document that is long enough for a sample of this test. " * 40


def entry_of(source: Source, folder: Path) -> str:
    """An entry of `data.sources` that the source reads."""
    if source.name.startswith("builtin:"):
        return source.name
    (folder / "text").mkdir()
    (folder / "text" / "one.txt").write_text(TEXT)
    return str(folder / "text")


def test_names_are_unique_and_found() -> None:
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names)
    assert [find_source(name) for name in names] == list(SOURCES)
    with pytest.raises(KeyError):
        source_of_entry("builtin:no such text")


@each_source
def test_it_claims_its_entries_and_the_configuration_takes_them(
    source: Source, tmp_path: Path
) -> None:
    entry = entry_of(source, tmp_path)
    assert source.help and not source.help.endswith(".")
    assert source_of_entry(entry) is source
    config = tiny(tmp_path, data={"sources": [entry]})
    (resolved,) = config.resolved(base=Path("/elsewhere")).data.sources
    assert resolved == source.resolve(resolved, base=tmp_path), "not independent of the folder"


@each_source
def test_its_files_come_in_one_order_and_can_be_opened(source: Source, tmp_path: Path) -> None:
    entry = entry_of(source, tmp_path)
    found, again = discover((entry,)), discover((entry,))
    assert found.files and found.files == again.files
    for file in (found.files[0], found.files[-1]):
        assert file.source == source.name
        with source.open(file) as content:
            assert len(content.read()) == file.size


@each_source
def test_what_it_is_asked_for_is_polled(source: Source, tmp_path: Path) -> None:
    """`pulse` ends the search: a stop request does not wait for a large folder."""

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        discover((entry_of(source, tmp_path),), stop)


def test_an_example_of_one_file_is_picked_up_by_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "SOURCES", (ZipSource(), *SOURCES))
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("a.txt", TEXT)
        archive.writestr("b.txt", TEXT.upper())
    entry = f"zip:{tmp_path / 'text.zip'}"
    corpus = corpus_of(tiny(tmp_path, data={"sources": [entry]}))
    assert corpus.report.documents == 2 and not corpus.report.bad
    text = corpus.tokenizer.decode(corpus.train.tokens([0])[0])
    assert text.lower() in TEXT.lower()
    with pytest.raises(ConfigError) as caught:
        tiny(tmp_path, data={"sources": ["zip:nothing.zip"]})
    assert caught.value.key == "data.sources[0]"
