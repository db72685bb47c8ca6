"""Texts by name: Python's own reference text, WikiText, and the user's (``text:PATH``).

``pydoc?vocab=1024&window=128``, ``wikitext2?tokenizer=./pythia-70m``: the options, what each text
is trained and evaluated on, and where its files lie are in data/README.md. ``corpus.py`` reads
files in pieces, ``tokens.py`` has the tokenisers. Source: our chapter 5.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from companion.core import closing, files
from companion.core.errors import BadParameter, CorruptData, one_of
from companion.core.locations import data_root
from companion.data import corpus, tokens
from companion.data.corpus import Survey, Text, Texts
from companion.data.dataset import Split, TextCounts, TextFacts
from companion.data.sources import FileReport, RawText, Source, fingerprint
from companion.data.tokens import SMALLEST, TOKENIZERS, Tokenizer

if TYPE_CHECKING:
    from companion.core.runs import Store

# --- names and options

USER = "text:"
TEST_PERCENT = 10
_COMMON = {"tokenizer": "bpe", "vocab": 512, "window": 64}
_WIKITEXT = {"form": "tokens", "train": "train"}
# Every text that has a name, its options and their defaults.
TEXTS: Mapping[str, Mapping[str, Any]] = {
    "pydoc": _COMMON,
    "wikitext2": {**_COMMON, "vocab": 4096, **_WIKITEXT},
    "wikitext103": {**_COMMON, "vocab": 16384, **_WIKITEXT},
}
_OF_USER: Mapping[str, Any] = {**_COMMON, "test": TEST_PERCENT}
_CHOICES = {"tokenizer": TOKENIZERS, "form": ("tokens", "raw"), "train": ("train", "test")}
_RANGES = {"vocab": (SMALLEST, 1 << 24), "window": (1, 1 << 24), "test": (1, 90)}
PYDOC_TEST = 10  # percent, at least

# Nothing is called WikiText that has not the published number of lines and words. Lines, and words
# with line ends, are those of Merity et al. 2016, table 1 (its "tokens"); lines are the rows of
# Hugging Face's copy. The raw form has the same lines.
_VALID_AND_TEST = {"valid": (3_760, 217_646), "test": (4_358, 245_569)}
PUBLISHED = {
    "wikitext2": {"train": (36_718, 2_088_628), **_VALID_AND_TEST},
    "wikitext103": {"train": (1_801_350, 103_227_021), **_VALID_AND_TEST},
}
_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
"""Of Salesforce/wikitext: what is downloaded does not change, and is compared once it is here."""
_LABELS = {"wikitext2": "WikiText-2", "wikitext103": "WikiText-103"}
_FOLDERS = {
    "tokens": ("wikitext-{}", "wikitext-{}-v1", "wikitext{}", "wikitext/wikitext-{}-v1"),
    "raw": ("wikitext-{}-raw", "wikitext-{}-raw-v1", "wikitext/wikitext-{}-raw-v1"),
}
_SUFFIXES = {"tokens": ("tokens", "txt", "parquet"), "raw": ("raw", "txt", "parquet")}

RECORD = "texts.sha256"
"""In the folder of a downloaded text: what it was at first."""

_ROWS = 4096  # of windows hashed at a time
_FILE = "windows.safetensors"


def is_text(name: str) -> bool:
    """Whether a dataset's name, with or without options, is that of a text."""
    return name.startswith(USER) or name.partition("?")[0] in TEXTS


@dataclass(frozen=True)
class Request:
    """A name taken apart.

    Arguments:
        base: ``pydoc``, …, ``text:PATH``.
        options: all of them, with their defaults.
        given: those that the name holds.
    """

    base: str
    options: Mapping[str, Any]
    given: frozenset[str] = frozenset()

    @property
    def path(self) -> Path:
        """Of ``text:PATH``."""
        return Path(self.base.removeprefix(USER)).expanduser().absolute()

    @property
    def canonical(self) -> str:
        """One spelling for one dataset: options sorted, defaults left out."""
        defaults = _defaults(self.base)
        written = [f"{k}={v}" for k, v in sorted(self.options.items()) if v != defaults[k]]
        return "?".join([self.base, *(["&".join(written)] if written else [])])


def parse_text_name(name: str) -> Request:
    """Take a text's name apart.

    Raises:
        BadParameter: no path, or an option that does not exist, is given twice or makes no sense.
    """
    base, _, written = name.partition("?")
    if base == USER:
        raise BadParameter("dataset: text:PATH needs a path, as in text:~/book.txt.")
    defaults = _defaults(base)
    given: dict[str, Any] = {}
    for option in written.split("&") if written else ():
        key, _, value = option.partition("=")
        if one_of(f"{name}: option", key, defaults) in given:
            raise BadParameter(f"{name}: {key} is given twice.")
        given[key] = _value(name, key, value)
    values = {**defaults, **given}
    if values["tokenizer"] != "bpe" and "vocab" in given:
        raise BadParameter(
            f"{name}: vocab is for tokenizer=bpe; {values['tokenizer']} has its own vocabulary."
        )
    return Request(base, values, frozenset(given))


def _defaults(base: str) -> Mapping[str, Any]:
    return _OF_USER if base.startswith(USER) else TEXTS[one_of("text", base, TEXTS)]


def _value(name: str, key: str, value: str) -> int | str:
    if key == "tokenizer" and "/" in value:
        return value  # a folder with one
    if key in _CHOICES:
        return one_of(f"{name}: {key}", value, _CHOICES[key])
    least, most = _RANGES[key]
    if not re.fullmatch(r"[1-9][0-9]{0,8}", value, re.ASCII) or not least <= int(value) <= most:
        what = "percent of the file" if key == "test" else "tokens"
        raise BadParameter(
            f"{name}: {key} is a number of {what} from {least:,} to {most:,}, not {value!r}."
        )
    return int(value)


def canonical_data(name: str) -> str:
    """One spelling for one dataset: options sorted, defaults left out.

    ``pydoc?window=64&vocab=1024`` is ``pydoc?vocab=1024``; names of images stay as they are.

    Raises:
        BadParameter: as :func:`text_source`.
    """
    return parse_text_name(name).canonical if is_text(name) else name


# --- the texts


def _read_pydoc(request: Request, root: Path) -> Texts:
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


def _user_files(request: Request) -> tuple[list[Path], list[Path]]:
    train, test = corpus.user_files(request.path)
    if test and "test" in request.given:
        raise BadParameter(
            f"{request.base}: test={request.options['test']}, but the folder has a "
            f"{test[0].name} of its own. Leave the option out."
        )
    return train, test


def _read_user(request: Request, root: Path) -> Texts:
    train, test = _user_files(request)
    if not test:
        percent = request.options["test"]
        texts = corpus.split_file(train[0], percent)
        return Texts(*texts, f"its last {percent} %", (train[0],), (f"test: last {percent} %",))
    note = f"train: {train[0].name}; test: {test[0].name}"
    texts = corpus.of_files(train), corpus.of_files(test)
    return Texts(*texts, f"its {test[0].name}", (*train, *test), (note,))


def _wikitext_folders(request: Request) -> list[str]:
    number = request.base.removeprefix("wikitext")
    return [name.format(number) for name in _FOLDERS[request.options["form"]]]


def _wikitext_files(request: Request, root: Path) -> tuple[str, dict[str, list[Path]], list[str]]:
    """The folder that holds most, the files of train and valid there, and what is missing."""
    suffixes, train = _SUFFIXES[request.options["form"]], request.options["train"]
    found = [
        (
            folder,
            {s: corpus.split_files(root / folder, n, suffixes) for s, n in corpus.NAMES.items()},
        )
        for folder in _wikitext_folders(request)
    ]
    needed = (train, "valid")
    folder, files = max(found, key=lambda f: (all(f[1][s] for s in needed), any(f[1].values())))
    return folder, {s: files[s] for s in needed}, [f"{s} text" for s in needed if not files[s]]


def _wikitext_hint(request: Request, root: Path) -> str:
    """Where was looked, and what else what is there can be used as, if it is asked for."""
    suffixes = ", ".join(f".{suffix}" for suffix in _SUFFIXES[request.options["form"]])
    folders = ", ".join(_wikitext_folders(request))
    said = f"Looked in {folders} for train, valid and test as {suffixes}."
    others = [
        other.canonical
        for form in ("tokens", "raw")
        for train in ("train", "test")
        for other in [Request(request.base, {**request.options, "form": form, "train": train})]
        if not _wikitext_files(other, root)[2]
    ]
    if others:
        said += (
            f" What is there can be used as {' or '.join(others)}: that is "
            "another dataset, so it has to be asked for by this name, and its label says so."
        )
    return said


def _read_wikitext(request: Request, root: Path) -> Texts:
    """The text trained on and the validation text.

    Raises:
        CorruptData: not the published number of lines and words, not the form asked for, or not the
            text that was downloaded first.
    """
    train, form = request.options["train"], request.options["form"]
    folder, paths, _ = _wikitext_files(request, root)
    # Hugging Face's copy has emptied the lines that hold one space: the published text has them.
    texts = {s: corpus.of_files(paths[s], blank=" \n") for s in paths}
    known = recorded(root / folder)
    for split, text in texts.items():
        digest = text.sha256()
        if digest != known.get(split, digest):
            raise CorruptData(
                f"{paths[split][0]}: not the text that was downloaded first (SHA-256 {digest}; "
                f"{RECORD} beside it says {known[split]}). Delete the file and get it again. If "
                "that brings the same, the text has changed at its source: do not use it."
            )
        _compare(request, split, tokens.cached_survey(text, digest), paths[split][0])
    return Texts(
        *(texts[train], texts["valid"], "its validation text", (*paths[train], *paths["valid"])),
        notes=(
            f"form: {form}; lines{' and words' if form == 'tokens' else ''} as published",
            f"trained on its {'training' if train == 'train' else 'TEST'} text",
        ),
    )


def record(folder: Path) -> None:
    """Write down the SHA-256 of each split's text, beside it, unless that was done before.

    We know of no published checksum of these texts. So the first download is trusted if lines and
    words are as published, and all later ones have to bring the same. Texts and not files count:
    libraries of another version write another parquet file.
    """
    digests = {
        split: corpus.of_files(paths, blank=" \n").sha256()
        for split, names in corpus.NAMES.items()
        if (paths := corpus.split_files(folder, names, ("parquet",)))
    }
    lines = [f"{digest}  {split}" for split, digest in {**digests, **recorded(folder)}.items()]
    files.write(folder / RECORD, "".join(f"{line}\n" for line in lines).encode())


def recorded(folder: Path) -> dict[str, str]:
    """Split -> SHA-256 (hex) of its text as :func:`record` saw it first; {} without a record."""
    try:
        lines = (folder / RECORD).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptData(f"{folder / RECORD}: cannot be read ({error}).") from error
    return {split: digest for digest, _, split in (line.partition("  ") for line in lines)}


def _compare(request: Request, split: str, found: Survey, path: Path) -> None:
    lines, words = PUBLISHED[request.base][split]
    form, of = request.options["form"], f"the {split} text of {_LABELS[request.base]}"
    if found.lines != lines:
        raise CorruptData(
            f"{path}: {found.lines:,} lines where {of} has {lines:,}. Get it again, or load it as "
            f"text:{path.parent}."
        )
    if form == "tokens" and (n := found.words + found.lines) != words:
        raise CorruptData(
            f"{path}: {n:,} words and line ends where {of} has {words:,} in its tokenised form. If "
            "this is the raw form, put it into a folder called wikitext-"
            f"{request.base.removeprefix('wikitext')}-raw and ask for form=raw."
        )
    if form == "raw" and found.unknown * 1000 > found.words:
        raise CorruptData(
            f"{path}: this is the tokenised form ({found.unknown:,} times <unk>), not the raw one. "
            "Put it into a folder without 'raw' in its name, and leave form=raw out."
        )


# --- texts to tokens


def _texts(request: Request, root: Path) -> Texts:
    if request.base.startswith(USER):
        return _read_user(request, root)
    return (_read_pydoc if request.base == "pydoc" else _read_wikitext)(request, root)


def _tokenizer(request: Request, root: Path, train: Text, sha256: str) -> Tokenizer:
    if request.options["tokenizer"] == "gpt2":
        return tokens.gpt2(root)
    if request.options["tokenizer"] == "bytes":
        return tokens.BYTES
    if "/" in request.options["tokenizer"]:
        return tokens.own(request.options["tokenizer"])
    return tokens.cached_trained(train, sha256, request.options["vocab"])


def tokenizer(name: str) -> Tokenizer:
    """The tokeniser of a text, to show tokens as text: ``tokenizer("pydoc").decode(x[0])``.

    Raises:
        BadParameter, MissingData, CorruptData: as :func:`companion.data.load`.
    """
    request, root = parse_text_name(name), data_root()
    text = _texts(request, root).train
    return _tokenizer(request, root, text, text.sha256())


def _read(request: Request, root: Path) -> RawText:
    texts, window = _texts(request, root), request.options["window"]
    both = (texts.train, texts.test)
    digests = [text.sha256() for text in both]
    made = _tokenizer(request, root, texts.train, digests[0])
    ids: list[NDArray[Any]] = []
    counts: list[TextCounts] = []
    for text, digest in zip(both, digests, strict=True):
        ids.append(tokens.cached_tokens(text, digest, made))
        found = tokens.cached_survey(text, digest)
        counts.append(TextCounts(len(ids[-1]), found.bytes, found.characters, found.words))
    for text, stream in zip(both, ids, strict=True):
        if len(stream) <= window:
            raise BadParameter(
                f"{request.canonical}: {text.name} has {len(stream)} tokens: not one window of "
                f"{window} and a token behind it. Take a smaller window, or more text."
            )
    hashes = [*digests, *(hashlib.sha256(stream.data).hexdigest() for stream in ids)]
    names = ("train text", "test text", "train tokens", "test tokens")
    rule = f"text v1: tokenizer={made.name}; vocabulary={made.vocabulary}; window={window}"
    return RawText(
        *(ids[0], ids[1], window, _rounded_up(made.vocabulary)),
        fingerprint=fingerprint(rule, zip(names, hashes, strict=True)),
        facts=TextFacts(made.name, made.vocabulary, counts[0], counts[1], texts.evaluated_on),
        files=tuple(map(FileReport.of, (*texts.files, *made.files))),
        notes=(*texts.notes, f"train text {digests[0]}", f"test text {digests[1]}"),
    )


def text_source(name: str) -> Source:
    """The source that a text's name stands for.

    Raises:
        BadParameter: no path, or an option that does not exist or make sense.
    """
    request = parse_text_name(name)
    options, base = request.options, request.base
    known = {"bytes": 256, "gpt2": tokens.GPT2_VOCABULARY, "bpe": options["vocab"]}
    size = None if base.startswith(USER) else known.get(options["tokenizer"])
    common: dict[str, Any] = {
        "name": request.canonical,
        "classes": size and _rounded_up(size),
        "shape": (options["window"],),
        "files": partial(_files, request),
        "read": partial(_read, request),
        "kind": "text",
    }
    if base.startswith(USER):
        return Source(
            label=f"text: {request.path.stem if request.path.is_file() else request.path.name}",
            folder=str(request.path),
            how="your own text: a file, or a folder with train.txt and valid.txt",
            **common,
        )
    if base == "pydoc":
        return Source(
            label=f"reference text of Python {sys.version_info.major}.{sys.version_info.minor}",
            folder=None,
            how="nothing to get: it comes with Python",
            **common,
        )
    raw = options["form"] == "raw"
    said = ["raw"] * raw + ["trained on its test text"] * (options["train"] == "test")
    config = f"wikitext-{base.removeprefix('wikitext')}-{'raw-' * raw}v1"
    return Source(
        label=_LABELS[base] + (f" ({', '.join(said)})" if said else ""),
        folder=_wikitext_files(request, data_root())[0],
        how=f"companion data get {base}{'?form=raw' * raw}",
        hub=("Salesforce/wikitext", config, config, _REVISION),
        hint=partial(_wikitext_hint, request),
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
        _, paths, missing = _wikitext_files(request, root)
        found = [path for files in paths.values() for path in files]
    if request.options["tokenizer"] == "gpt2" and not missing:
        found += tokens.gpt2_files(root)
    elif "/" in request.options["tokenizer"]:
        found.append(tokens.own_file(request.options["tokenizer"]))
    return found, missing


def _rounded_up(vocabulary: int) -> int:
    return -(-vocabulary // 64) * 64  # a multiple of 64 is faster on a GPU; 50,257 becomes 50,304


# --- windows that are measured on: their hash, and keeping them in the run store


def windows_digest(split: Split) -> str:
    """SHA-256 (hex) of the windows of a text: their number, length, order and tokens.

    Raises:
        BadParameter: the split holds images.
    """
    if split.kind != "text":
        raise BadParameter("windows: a split of a text is needed; this one holds images.")
    h = hashlib.sha256(f"windows v1 {len(split)} {split.window}\n".encode())
    for part in (split.x, split.y):
        for rows in part.split(_ROWS):
            h.update(rows.cpu().numpy().astype("<i8").tobytes())
    return h.hexdigest()


def save_windows(split: Split, store: Store) -> str:
    """Keep the windows of a text in the run store, once, as an entry of kind ``windows``.

    Arguments:
        split: such as the head of the test split that a measurement used.
        store: where to.

    Returns:
        Their digest, the name under which :func:`load_windows` finds them.

    Raises:
        BadParameter: the split holds images.
        StoreUnwritable: no space, or no permission.
    """
    digest = windows_digest(split)
    if closing.active():  # what was measured names them, and nothing else is measured on them
        return digest
    entry = store.entry(_identity(digest))
    if _FILE in entry:  # without a lock: a store that may only be read has them, too
        return digest
    with entry.lock():
        if _FILE not in entry:
            small = {"x": split.x.to(torch.int32), "y": split.y.to(torch.int32)}
            entry.write_tensors(_FILE, small)
    return digest


def load_windows(digest: str, store: Store) -> Split:
    """The windows that :func:`save_windows` kept, on the CPU.

    Raises:
        BadParameter: there are none with this digest.
        CorruptEntry, CorruptData: they are not those that were stored.
    """
    entry = store.entry(_identity(digest))
    try:
        tensors = entry.read_tensors(_FILE)
    except KeyError:
        raise BadParameter(f"windows {digest[:12]}: not in the run store {store.root}.") from None
    split = Split(tensors["x"].long(), tensors["y"].long())
    if windows_digest(split) != digest:
        raise CorruptData(f"windows {digest[:12]}: {entry.path} holds other windows.")
    return split


def _identity(digest: str) -> dict[str, str]:
    return {"kind": "windows", "windows": digest}
