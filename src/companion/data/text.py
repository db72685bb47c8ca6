"""Texts by name: Python's own reference text, WikiText, and the user's (``text:PATH``).

| name | trained on | evaluated on |
|---|---|---|
| ``pydoc`` | the reference text inside CPython | its last topics, a tenth of it |
| ``wikitext2``, ``wikitext103`` | the training text | the validation text |
| ``text:FILE`` | the file | its last 10 % (``?test=20``: 20 %) |
| ``text:FOLDER`` | its train file | its valid file; without one its test file |

``textnames.py`` names and options · ``corpus.py`` files and pieces · ``tokens.py`` tokenisers ·
``wikitext.py`` WikiText · ``windows.py`` windows that are measured on. Source: our chapter 5.
"""

from __future__ import annotations

import hashlib
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from companion.core.errors import BadParameter
from companion.core.locations import data_root
from companion.data import corpus, tokens, wikitext
from companion.data.corpus import Text, Texts
from companion.data.dataset import TextCounts, TextFacts
from companion.data.sources import FileReport, RawText, Source, fingerprint
from companion.data.textnames import TEXTS, USER, Request, canonical, is_text, parse
from companion.data.tokens import Tokenizer
from companion.data.windows import load_windows, save_windows, windows_digest

__all__ = [
    "TEXTS",
    "canonical",
    "is_text",
    "load_windows",
    "save_windows",
    "source",
    "tokenizer",
    "windows_digest",
]

PYDOC_TEST = 10  # percent, at least


def _pydoc(request: Request, root: Path) -> Texts:
    """The topics in alphabetical order, every paragraph once; the last topics are the test text.

    A fifth of the topics' text repeats other topics (``specialnames`` holds ``customization``, …).
    Left in, it would put training text into the test.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = []
    for name in sorted(topics):
        paragraphs = []
        for paragraph in re.split(r"\n[ \t]*\n", topics[name].strip("\n")):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph + "\n\n")
        kept.append("".join(paragraphs))
    enough, at = sum(map(len, kept)) * PYDOC_TEST / 100, len(kept)
    while sum(map(len, kept[at:])) < enough:
        at -= 1
    share = sum(map(len, kept)) / sum(map(len, topics.values()))
    return Texts(
        Text.of("pydoc (train)", "".join(kept[:at])),
        Text.of("pydoc (test)", "".join(kept[at:])),
        "its last topics",
        notes=(
            f"Python {sys.version.split()[0]}: {len(topics)} topics; every paragraph once, which "
            f"leaves {share:.0%} of the text",
            f"test: the last {len(topics) - at} topics, from {sorted(topics)[at]!r}",
        ),
    )


def _user(request: Request, root: Path) -> Texts:
    train, test = _user_files(request)
    if not test:
        percent = request.options["test"]
        texts = corpus.split_file(train[0], percent)
        return Texts(*texts, f"its last {percent} %", (train[0],), (f"test: last {percent} %",))
    note = f"train: {train[0].name}; test: {test[0].name}"
    texts = corpus.of_files(train), corpus.of_files(test)
    return Texts(*texts, f"its {test[0].name}", (*train, *test), (note,))


def _user_files(request: Request) -> tuple[list[Path], list[Path]]:
    train, test = corpus.user_files(request.path)
    if test and "test" in request.given:
        raise BadParameter(
            f"{request.base}: test={request.options['test']}, but the folder has a "
            f"{test[0].name} of its own. Leave the option out."
        )
    return train, test


def _texts(request: Request, root: Path) -> Texts:
    if request.base.startswith(USER):
        return _user(request, root)
    return (_pydoc if request.base == "pydoc" else wikitext.read)(request, root)


def _tokenizer(request: Request, root: Path, train: Text, sha256: str) -> Tokenizer:
    if request.options["tokenizer"] == "gpt2":
        return tokens.gpt2(root)
    if request.options["tokenizer"] == "bytes":
        return tokens.BYTES
    return tokens.cached_trained(train, sha256, request.options["vocab"])


def tokenizer(name: str) -> Tokenizer:
    """The tokeniser of a text, to show tokens as text: ``tokenizer("pydoc").decode(x[0])``.

    Raises:
        BadParameter, MissingData, CorruptData: as :func:`companion.data.load`.
    """
    request, root = parse(name), data_root()
    text = _texts(request, root).train
    return _tokenizer(request, root, text, text.sha256())


def _read(request: Request, root: Path) -> RawText:
    texts = _texts(request, root)
    digests = [text.sha256() for text in (texts.train, texts.test)]
    made = _tokenizer(request, root, texts.train, digests[0])
    ids: list[NDArray[Any]] = []
    counts: list[TextCounts] = []
    for text, digest in zip((texts.train, texts.test), digests, strict=True):
        ids.append(tokens.cached_tokens(text, digest, made))
        found = tokens.cached_survey(text, digest)
        counts.append(TextCounts(len(ids[-1]), found.bytes, found.characters, found.words))
    window = request.options["window"]
    for text, stream in zip((texts.train, texts.test), ids, strict=True):
        if len(stream) <= window:
            raise BadParameter(
                f"{request.canonical}: {text.name} has {len(stream)} tokens: not one window of "
                f"{window} and a token behind it. Take a smaller window, or more text."
            )
    facts = TextFacts(made.name, made.vocabulary, counts[0], counts[1], texts.evaluated_on)
    parts = [("train text", digests[0]), ("test text", digests[1])]
    for name, stream in zip(("train tokens", "test tokens"), ids, strict=True):
        parts.append((name, hashlib.sha256(stream.data).hexdigest()))
    rule = f"text v1: tokenizer={made.name}; vocabulary={made.vocabulary}; window={window}"
    return RawText(
        train=ids[0],
        test=ids[1],
        window=window,
        classes=_rounded_up(made.vocabulary),
        fingerprint=fingerprint(rule, parts),
        facts=facts,
        files=tuple(
            FileReport(p, p.stat().st_size, "unknown") for p in (*texts.files, *made.files)
        ),
        notes=(*texts.notes, f"train text {digests[0]}", f"test text {digests[1]}"),
    )


# --- sources


def source(name: str) -> Source:
    """The source that a text's name stands for.

    Raises:
        BadParameter: no path, or an option that does not exist or make sense.
    """
    request = parse(name)
    options = request.options
    common: dict[str, Any] = {
        "name": request.canonical,
        "shape": (options["window"],),
        "files": partial(_files, request),
        "read": partial(_read, request),
        "kind": "text",
    }
    if request.base.startswith(USER):
        return Source(
            label=f"text: {request.path.stem if request.path.is_file() else request.path.name}",
            classes=None,
            folder=str(request.path),
            how="your own text: a file, or a folder with train.txt and valid.txt",
            **common,
        )
    known = {"bytes": 256, "gpt2": tokens.GPT2_VOCABULARY, "bpe": options["vocab"]}
    common["classes"] = _rounded_up(known[options["tokenizer"]])
    if request.base == "pydoc":
        return Source(
            label=f"reference text of Python {sys.version_info.major}.{sys.version_info.minor}",
            folder=None,
            how="nothing to get: it comes with Python",
            **common,
        )
    raw = "?form=raw" if options["form"] == "raw" else ""
    return Source(
        label=wikitext.label(request),
        folder=wikitext.find(request, data_root())[0],
        how=f"companion data get {request.base}{raw}",
        hub=wikitext.hub(request),
        hint=partial(wikitext.hint, request),
        **common,
    )


def _files(request: Request, root: Path) -> tuple[list[Path], list[str]]:
    """With the tokeniser's own files, so that a change of them is a change of the dataset."""
    found: list[Path] = []
    missing: list[str] = []
    if request.base.startswith(USER):
        train, test = _user_files(request)
        found = [*train, *test]
    elif request.base != "pydoc":
        found, missing = wikitext.files(request, root)
    if request.options["tokenizer"] == "gpt2" and not missing:
        found = [*found, *tokens.gpt2_files(root)]
    return found, missing


def _rounded_up(vocabulary: int) -> int:
    return -(-vocabulary // 64) * 64  # a multiple of 64 is faster on a GPU; 50,257 becomes 50,304
