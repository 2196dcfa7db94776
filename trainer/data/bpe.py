"""Byte-level BPE trained once on a bounded share of the sources, cached by the content that it was
trained on.
"""

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

TRAINING_BYTES = 16 << 20  # of text; more changes a vocabulary of this kind very little
_UNFOLDS = 5  # bytes of text in a byte of a compressed file, roughly
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")


def train_or_load(
    reader: DocumentReader, *, vocabulary: int, cache: Path, pulse: Progress
) -> JsonTokenizer:
    """The tokenizer of the text that `reader` gives; trained when `cache` has none of the same text
    and size.
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
    pulse.begin("training the tokenizer")
    content = _train(texts, vocabulary, pulse)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(file, content.encode("utf-8"))
    return JsonTokenizer(content, name="bpe", source=str(file))


def read_sample(reader: DocumentReader, limit: int) -> Iterator[str]:
    """About `limit` characters, of each file in proportion to its size, from its beginning.

    A file earns its share and pays with its text; files that come while nothing is left are not
    opened.
    """
    sizes = [file.size * (_UNFOLDS if file.compression else 1) for file in reader.files]
    share = min(1.0, limit / max(1, sum(sizes)))
    credit = 0.0
    for index, size in enumerate(sizes):
        credit += size * share
        if credit > 0:
            for document in reader.read_file(index):
                for text in split_text(document.text):
                    yield text
                    credit -= len(text)
                    if credit <= 0:
                        break
                if credit <= 0:
                    break


def _train(texts: list[str], vocabulary: int, pulse: Progress) -> str:
    """The content of a tokenizer.json. Trains in a thread, so that a stop does not wait for the end
    of it.
    """
    fed = 0
    stopped = threading.Event()
    outcome: list[str | BaseException] = []

    def feed() -> Iterator[str]:
        nonlocal fed
        for text in texts:
            if stopped.is_set():
                raise Interrupted("stopped while training the tokenizer")
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
            # the merges come after the words: no share is known
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
