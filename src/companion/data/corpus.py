"""Texts as files: where they are, and reading them in pieces, so that memory stays small.

The pieces of a :class:`Text` do not depend on how the file was read, and end where a word ends and
white space begins. Every tokeniser here cuts there anyway, so the tokens of the pieces are those of
the whole; only a text without such a place for :data:`LONGEST` characters is cut inside a word.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from companion.core.errors import BadParameter, CorruptData, MissingData

BLOCK = 1 << 20  # bytes read at a time
PIECE = 1 << 16  # characters, at least; a piece ends at the next end of a word
LONGEST = 1 << 20  # characters, at most: for texts without spaces
NEAR = 1 << 12  # bytes on either side of where a file is to be cut, to find white space in
_WORD_END = re.compile(r"\S(?=[ \r\n])")
_MARK = codecs.BOM_UTF8  # byte order mark: some editors begin a file with it; it is no text

NAMES = {"train": ("train",), "valid": ("validation", "valid", "val"), "test": ("test",)}
"""Of a split's files, as people give them."""


@dataclass(frozen=True, eq=False)
class Text:
    """A UTF-8 text.

    Arguments:
        name: for messages: its file, or what it is.
        blocks: makes a new iterator over its bytes, in blocks of any size.
        begins: at which byte of its file, for messages.
    """

    name: str
    blocks: Callable[[], Iterator[bytes]]
    begins: int = 0

    @classmethod
    def of(cls, name: str, text: str) -> Text:
        """A text that is in memory.

        Raises:
            BadParameter: it holds half a surrogate pair, which is no character.
        """
        data = utf8(text, name)
        return cls(name, lambda: iter([data]))

    def sha256(self) -> str:
        """SHA-256 (hex) of its bytes."""
        h = hashlib.sha256()
        for block in self.blocks():
            h.update(block)
        return h.hexdigest()

    def pieces(self) -> Iterator[str]:
        """The text, cut at ends of words (see the module).

        Raises:
            CorruptData: it is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        held, at, read = "", 0, 0
        for block in chain(self.blocks(), [None]):  # None: the end
            try:
                held, at = held[at:] + decoder.decode(block or b"", final=block is None), 0
            except UnicodeDecodeError as error:
                place = self.begins + read - len(decoder.getstate()[0]) + error.start
                raise CorruptData(
                    f"{self.name}: not UTF-8 at byte {place:,} (counted from 0). Convert it to "
                    "UTF-8."
                ) from error
            read += len(block or b"")
            while (end := _cut(held, at)) is not None:
                yield held[at:end]
                at = end
        if at < len(held):
            yield held[at:]


def utf8(text: str, name: str = "text") -> bytes:
    """The bytes of a text.

    Raises:
        BadParameter: it holds half a surrogate pair, which is no character.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadParameter(
            f"{name}: character {error.start:,} (counted from 0) is half of a surrogate pair, "
            f"{text[error.start]!a}: no character, and UTF-8 has no bytes for it. Read the text "
            "with its own encoding, or leave such characters out."
        ) from None


def _cut(text: str, start: int) -> int | None:
    """Where the piece that begins at ``start`` ends; None: not without reading more."""
    if found := _WORD_END.search(text, start + PIECE, start + LONGEST):
        return found.end()
    return start + LONGEST if len(text) >= start + LONGEST else None


@dataclass(frozen=True, eq=False)
class Texts:
    """What networks are trained and evaluated on; in words, what ``test`` is and was checked."""

    train: Text
    test: Text
    evaluated_on: str
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What one reading of a text counts; ``unknown``: how often ``<unk>`` stands in it."""

    bytes: int
    characters: int
    words: int
    lines: int
    unknown: int


def count_text(text: Text) -> Survey:
    """Count a text. Words are what white space separates."""
    size = characters = words = lines = unknown = 0
    for piece in text.pieces():
        size += len(piece.encode())
        characters += len(piece)
        words += len(piece.split())
        lines += piece.count("\n")
        unknown += piece.count("<unk>")
    return Survey(size, characters, words, lines, unknown)


# --- files


def of_files(paths: Sequence[Path], blank: str = "\n") -> Text:
    """The text of one text file, or of the ``text`` column of parquet files, in their order.

    Arguments:
        paths: one text file, or parquet files.
        blank: what an empty row of a parquet file stands for: Hugging Face's copy of WikiText has
            emptied the lines that hold one space.
    """
    if paths[0].suffix == ".parquet":
        return Text(str(paths[0]), lambda: _rows(paths, blank, 0, None))
    first = _begin(paths[0])
    return Text(str(paths[0]), lambda: _bytes(paths[0], first, None), first)


def split_file(path: Path, percent: int) -> tuple[Text, Text]:
    """A file cut in two: train, and the last ``percent`` percent of it, test.

    A text is cut at the line end behind that place; where there is none (one long line), at the
    white space nearest to it; without any there, between two characters. Parquet: between rows.

    Raises:
        BadParameter: it is too short to be cut.
        CorruptData: it cannot be read.
    """
    rows = path.suffix == ".parquet"
    first = 0 if rows else _begin(path)
    whole = sum(_open_parquet(path)[1]) if rows else path.stat().st_size
    mark = first + (whole - first) * (100 - percent) // 100
    cut = mark if rows else _cut_of_file(path, first, mark, whole)
    if not first < cut < whole:
        raise BadParameter(
            f"{path}: too short to split off its last {percent} % ({whole - first:,} "
            f"{'rows' if rows else 'bytes'}). Give a folder with train.txt and valid.txt instead."
        )

    def part(name: str, start: int, stop: int | None) -> Text:
        if rows:
            return Text(f"{path} ({name})", lambda: _rows([path], "\n", start, stop))
        return Text(f"{path} ({name})", lambda: _bytes(path, start, stop), start)

    return part("train", first, cut), part("test", cut, None)


def _begin(path: Path) -> int:
    """Where the text of a file begins: behind its byte order mark, if it has one."""
    try:
        with path.open("rb") as file:
            return len(_MARK) if file.read(len(_MARK)) == _MARK else 0
    except OSError as error:
        raise CorruptData(f"{path}: cannot be read ({error.strerror}).") from None


def _cut_of_file(path: Path, first: int, mark: int, whole: int) -> int:
    """Where to cut a text near ``mark``; ``whole``, or ``first``, where it cannot be cut."""
    with path.open("rb") as file:
        file.seek(mark)
        line = file.readline(BLOCK)
        if line.endswith(b"\n") and mark + len(line) < whole:
            return mark + len(line)
        start = max(first, mark - NEAR)
        file.seek(start)
        around = file.read(2 * NEAR)
    # Neither white space nor a character's first byte ever is a later byte of another character.
    for found in (_SPACE, _CHARACTER):
        places = [start + m.start() for m in found.finditer(around)]
        if places := [p for p in places if first < p < whole]:
            return min(places, key=lambda p: abs(p - mark))
    return whole


_SPACE = re.compile(rb"(?<![ \t\r\n])[ \t\r\n]+(?=[^ \t\r\n])")
_CHARACTER = re.compile(rb"[^\x80-\xbf]")


def _bytes(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        left = (path.stat().st_size if stop is None else stop) - start
        while left > 0 and (block := file.read(min(BLOCK, left))):
            left -= len(block)
            yield block


def _open_parquet(path: Path) -> tuple[Callable[[int], list[str | None]], list[int]]:
    """A reader of the ``text`` column, by row group, and the rows of each group."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyarrow.types as types

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise CorruptData(f"{path}: cannot be read as parquet: {error}") from None

    def holds_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        strings = types.is_string(kind) or types.is_large_string(kind)
        return bool(strings or types.is_string_view(kind))

    names = [f.name for f in schema if holds_text(f.type)]
    if "text" in names:
        column = "text"
    elif len(names) == 1:
        column = names[0]
    else:
        raise CorruptData(
            f"{path}: no column of strings called text. Its columns: "
            f"{', '.join(f'{f.name} ({f.type})' for f in schema)}."
        )

    def read(group: int) -> list[str | None]:
        try:
            rows: list[str | None] = file.read_row_group(group, [column])[column].to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise CorruptData(f"{path}: cannot be read as parquet: {error}") from None
        return rows

    return read, [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]


def _rows(paths: Sequence[Path], blank: str, start: int, stop: int | None) -> Iterator[bytes]:
    """Rows ``start`` to ``stop`` as lines: a row without a line end gets one."""
    row = 0
    for path in paths:
        read, sizes = _open_parquet(path)
        for group, size in enumerate(sizes):
            first, row = row, row + size
            if row <= start or (stop is not None and first >= stop):
                continue
            chosen = read(group)[max(0, start - first) : None if stop is None else stop - first]
            lines = ((r if r.endswith("\n") else r + "\n") if r else blank for r in chosen)
            yield "".join(lines).encode()


# --- folders


def split_files(folder: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files of one split, by any of the names people give it; [] if there are none.

    ``train.txt``, ``wiki.train.tokens``; parquet also as ``train-00000-of-00002.parquet``, in
    ``data/`` or as ``train/*.parquet``.
    """
    for suffix in suffixes:
        for name in names:
            stems = [f"{name}.{suffix}", f"wiki.{name}.{suffix}"]
            if suffix == "parquet":
                stems += [f"{name}-*.parquet", f"data/{name}-*.parquet", f"{name}/*.parquet"]
            for stem in stems:
                if found := sorted(f for f in folder.glob(stem) if f.is_file()):
                    return found
    return []


def user_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Train's and test's files of ``text:PATH``; of one file: itself, and no file.

    Raises:
        MissingData: nothing there, or a folder without train and test.
    """
    if not path.exists():
        raise MissingData(f"text: {path} does not exist.")
    if path.is_file():
        return [path], []
    suffixes = ("txt", "tokens", "raw", "parquet")
    train = split_files(path, NAMES["train"], suffixes)
    test = split_files(path, NAMES["valid"], suffixes)
    test = test or split_files(path, NAMES["test"], suffixes)
    if not train or not test:
        raise MissingData(
            f"text: {path} holds no {'test' if train else 'train'} text. Expected: train.txt, and "
            "valid.txt or test.txt (or .tokens, .raw, .parquet); or name one file."
        )
    return train, test
