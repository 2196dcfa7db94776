"""Byte-level BPE: trained once on a part of the sources, cached by the text that it was trained on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from guardrail.core.errors import Interrupted
from guardrail.core.files import replace_file
from trainer.data.document_reader import DocumentReader
from trainer.data.progress import Progress
from trainer.data.tokenizer import JsonTokenizer, load_tokenizer, split_text
from trainer.sources.source_file import SourceFile

TRAINING_BYTES = 16 << 20  # of text; more text changes such a vocabulary very little
_COMPRESSION = 5  # bytes of text per byte of a compressed file, roughly
TRAINING = "training the tokenizer"  # what is done
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")


def train_or_load(
    reader: DocumentReader, *, vocabulary: int, cache: Path, pulse: Progress
) -> JsonTokenizer:
    """Return the tokenizer of the text of `reader`, from the cache if it is there.

    Args:
        vocabulary: number of token ids.
        cache: folder; the tokenizer is found by its text and size.
    """
    pulse.begin("reading text for the tokenizer")
    texts, digest = [], hashlib.sha256(f"byte-level BPE 1, {vocabulary}".encode())
    for text in read_sample(reader, TRAINING_BYTES):
        texts.append(text)
        digest.update(text.encode("utf-8"))
        pulse()
    file = cache / "tokenizers" / f"bpe-{vocabulary}-{digest.hexdigest()[:32]}.json"
    if file.exists():
        return load_tokenizer(file, name="bpe")
    pulse.begin(TRAINING)
    content = _train(texts, vocabulary, pulse)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(file, content.encode("utf-8"))
    return JsonTokenizer(content, name="bpe", source=str(file))


def read_sample(reader: DocumentReader, limit: int) -> Iterator[str]:
    """Yield about `limit` characters: the beginning of each file, in proportion to its size.

    Each file adds its share to a budget, and each text that is read is subtracted. A file is not
    opened while the budget is used up.
    """
    sizes = [_text_bytes(file) for file in reader.files]
    share = min(1.0, limit / max(1, sum(sizes)))
    budget = 0.0
    for index, size in enumerate(sizes):
        budget += size * share
        if budget <= 0:
            continue
        for text in _texts_of_file(reader, index):
            yield text
            budget -= len(text)
            if budget <= 0:
                break


def _text_bytes(file: SourceFile) -> int:
    """Return the size of a file, decompressed, roughly."""
    if file.compression:
        return file.size * _COMPRESSION
    return file.size


def _texts_of_file(reader: DocumentReader, index: int) -> Iterator[str]:
    for document in reader.read_file(index):
        yield from split_text(document.text)


def _train(texts: list[str], vocabulary: int, pulse: Progress) -> str:
    """Train a tokenizer and return the content of its tokenizer.json.

    The training runs in a thread, so that a stop request need not wait for its end.
    """
    fed = 0  # texts that the training has read
    stopped = threading.Event()
    outcome: list[str | BaseException] = []

    def feed() -> Iterator[str]:
        nonlocal fed
        for text in texts:
            if stopped.is_set():
                raise Interrupted(f"stopped while {TRAINING}")
            fed += 1
            yield text

    def work() -> None:
        try:
            outcome.append(_train_bpe(feed(), vocabulary))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="train-bpe", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            # Reading the words counts as half. The share of the merges that follow is not known.
            pulse.share = 0.5 * fed / max(1, len(texts))
            pulse()
            thread.join(0.02)
    finally:
        stopped.set()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _train_bpe(texts: Iterator[str], vocabulary: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()
