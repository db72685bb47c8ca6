"""Tokenisers: byte-level BPE trained on the training text, GPT-2's or another published one, bytes.

All but that other one, which may do anything, work on the bytes of UTF-8: every text has tokens,
none is unknown, and decoding gives the text back. BPE training is a function of the text (the same
merges on one core and on many).
Source: Sennrich et al. 2016 (BPE), Radford et al. 2019 (on bytes); our chapter 5.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import groupby, islice
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from companion.core.errors import BadParameter, CorruptData, MissingData
from companion.core.locations import runs_root
from companion.data.corpus import Survey, Text, count_text, utf8
from companion.data.sources import cached_array, stored_array

TOKENIZERS = ("bpe", "gpt2", "bytes")
SMALLEST = 257  # one token for each byte, and one merge
GPT2_VOCABULARY = 50257
_GPT2_REPOSITORIES = ("openai-community/gpt2", "gpt2")
_BATCH = 64  # pieces tokenised at a time: some 4 MB of text


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokeniser: text to tokens ``0 … vocabulary - 1`` and back.

    Arguments:
        name: ``"bpe"``, ``"gpt2"``, ``"bytes"``, or ``"own"`` for one read from a file.
        vocabulary: number of tokens it knows.
        definition: the JSON that defines it, as ``tokenizers`` writes it; "" for bytes.
        files: those it was read from.
    """

    name: str
    vocabulary: int
    definition: str = ""
    files: tuple[Path, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the definition."""
        return hashlib.sha256(f"{self.name}\n{self.definition}".encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest integers that hold every token, little-endian."""
        return np.dtype("<u2" if self.vocabulary <= 1 << 16 else "<i4")

    def encode(self, text: str) -> NDArray[Any]:
        """(T,) tokens."""
        return self.encode_all([text])

    def encode_all(self, pieces: Iterable[str]) -> NDArray[Any]:
        """(T,) tokens of all pieces, one after the other; memory grows by the tokens only.

        Raises:
            BadParameter: half a surrogate pair, which is no character.
        """
        if not self.definition:
            found = [np.frombuffer(utf8(p), dtype=np.uint8).astype(self.dtype) for p in pieces]
        else:
            inner, left, found = self._inner, iter(pieces), []
            while batch := list(islice(left, _BATCH)):
                for piece in batch:
                    utf8(piece)
                for coded in inner.encode_batch_fast(batch, add_special_tokens=False):
                    found.append(np.array(coded.ids, dtype=self.dtype))
        return np.concatenate([np.empty(0, dtype=self.dtype), *found])

    def decode(self, tokens: Tensor | NDArray[Any] | Sequence[int]) -> str:
        """The text of some tokens, (T,).

        Bytes that are no UTF-8 (half a character) show as �, and so does every number that is no
        token: networks have more classes than there are tokens.

        Raises:
            BadParameter: not one row of tokens.
        """
        given = tokens if isinstance(tokens, Sequence) else tokens.tolist()
        try:
            ids = [index(i) for i in given]
        except TypeError:  # rows of rows, one bare number, fractions
            got = repr(given)[:60] if isinstance(tokens, Sequence) else f"shape {(*tokens.shape,)}"
            raise BadParameter(
                f"decode: one row of tokens (T,) is needed, whole numbers; got {got}. "
                "Decode windows one by one: [tokenizer.decode(row) for row in x]."
            ) from None
        return "".join(
            self._text(list(part)) if known else "\ufffd" * len(list(part))
            for known, part in groupby(ids, lambda i: 0 <= i < self.vocabulary)
        )

    def _text(self, ids: list[int]) -> str:
        if not self.definition:
            return bytes(ids).decode(errors="replace")
        return str(self._inner.decode(ids, skip_special_tokens=False))

    @cached_property
    def _inner(self) -> Any:
        from tokenizers import Tokenizer as Inner

        return Inner.from_str(self.definition)


BYTES = Tokenizer("bytes", 256)


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, pre_tokenizers

    inner = Inner(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def train_bpe(text: Text, vocabulary: int) -> Tokenizer:
    """A byte-level BPE trained on ``text``: the 256 bytes, then the most frequent merges.

    Arguments:
        text: the training text, and nothing else.
        vocabulary: at most so many tokens; a text that repeats little gives fewer.
    """
    from tokenizers import models, pre_tokenizers, trainers

    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(text.pieces(), trainer)
    return Tokenizer("bpe", inner.get_vocab_size(), inner.to_str())


# --- GPT-2's, and other published ones


def gpt2_files(root: Path) -> tuple[Path, ...]:
    """Its files: ``gpt2/tokenizer.json``, or ``gpt2/vocab.json`` and ``merges.txt``, below the data
    root; else Hugging Face's cache. Nothing is downloaded.

    Raises:
        MissingData: in none of these places.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = root / "gpt2"
    sets: Sequence[tuple[str, ...]] = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    for names in sets:
        if all((folder / name).is_file() for name in names):
            return tuple(folder / name for name in names)
    for repository in _GPT2_REPOSITORIES:
        for names in sets:
            found = [try_to_load_from_cache(repository, name) for name in names]
            if all(isinstance(path, str) for path in found):
                return tuple(Path(str(path)) for path in found)
    raise MissingData(
        f"The GPT-2 tokeniser is not in {folder} (tokenizer.json, or vocab.json and merges.txt), "
        f"nor in Hugging Face's cache. Get it with: hf download {_GPT2_REPOSITORIES[0]} "
        f"tokenizer.json --local-dir {folder}. Or train one on the text: tokenizer=bpe."
    )


def gpt2(root: Path) -> Tokenizer:
    """The published GPT-2 tokeniser, 50,257 tokens, from disk.

    Raises:
        MissingData: see :func:`gpt2_files`.
        CorruptData: its files cannot be read, or are not of GPT-2's size.
    """
    found = _read("gpt2", gpt2_files(root))
    if found.vocabulary != GPT2_VOCABULARY:
        raise CorruptData(
            f"{found.files[0]}: {found.vocabulary:,} tokens where GPT-2 has {GPT2_VOCABULARY:,}: "
            "another tokeniser."
        )
    return found


def own_file(place: str) -> Path:
    """The ``tokenizer.json`` of a folder, such as that of a network of ``transformers``.

    Raises:
        MissingData: there is none.
    """
    path = Path(place).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise MissingData(
            f"tokenizer={place}: there is no {path}. Where the network was published its tokeniser "
            "is, too, as tokenizer.json; without it tokens mean something else."
        )
    return path


def own(place: str) -> Tokenizer:
    """A published tokeniser, from a ``tokenizer.json`` or its folder.

    Raises:
        MissingData: see :func:`own_file`. CorruptData: the file cannot be read.
    """
    return _read("own", (own_file(place),))


def _read(name: str, files: tuple[Path, ...]) -> Tokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models

    try:
        if len(files) == 1:
            inner = Inner.from_str(files[0].read_text(encoding="utf-8"))
        else:
            inner = _byte_level(models.BPE.from_file(*map(str, files)))
        definition = inner.to_str()
    except Exception as error:  # tokenizers raises plain exceptions
        raise CorruptData(f"{files[0]}: cannot be read as a tokeniser ({error}).") from None
    return Tokenizer(name, inner.get_vocab_size(), definition, files)


# --- once per text: runs_root()/tokens/<SHA-256 of the text>/


def cached_survey(text: Text, sha256: str) -> Survey:
    """:func:`companion.data.corpus.count_text`, made once."""
    counts = _cached(sha256, "counts-v1", lambda: np.array(astuple(count_text(text)), dtype="<i8"))
    return Survey(*counts.tolist())


def cached_trained(text: Text, sha256: str, vocabulary: int) -> Tokenizer:
    """:func:`train_bpe`, once per text, vocabulary and version of ``tokenizers``."""
    import tokenizers

    def make() -> NDArray[Any]:
        return np.frombuffer(train_bpe(text, vocabulary).definition.encode(), dtype=np.uint8)

    name = f"bpe-{vocabulary}-tokenizers-{tokenizers.__version__}"
    definition = _cached(sha256, name, make).tobytes().decode()
    return Tokenizer("bpe", len(json.loads(definition)["model"]["vocab"]), definition)


def cached_tokens(text: Text, sha256: str, tokenizer: Tokenizer) -> NDArray[Any]:
    """(T,) tokens of a text, made once: uint16, or int32 for more than 65,536 tokens."""
    name = f"{tokenizer.name}-{tokenizer.digest[:16]}"
    return _cached(sha256, name, lambda: tokenizer.encode_all(text.pieces()))


def _cached(sha256: str, name: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    path = runs_root() / "tokens" / sha256 / f"{name}.npy"

    if (stored := stored_array(path)) is not None:
        return stored
    with _locked(path.parent):  # tokenising a large text takes minutes: once, not per worker
        return cached_array(path, make)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclusive across processes; where no lock can be written, without one."""
    from filelock import FileLock

    lock = FileLock(folder / ".lock")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
