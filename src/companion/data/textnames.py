"""Names of texts and their options: ``pydoc?vocab=1024&window=128``.

| option | allowed | default |
|---|---|---|
| ``tokenizer`` | ``bpe`` (trained on the training text), ``gpt2`` (from disk), ``bytes`` | bpe |
| ``vocab`` | tokens of ``bpe``, at least 257 | 512; WikiText-2 4096, WikiText-103 16384 |
| ``window`` | tokens a network sees at once | 64 |
| ``form`` | WikiText: ``tokens`` (rare words are ``<unk>``) or ``raw`` | tokens |
| ``train`` | WikiText: ``test`` trains on the test text, and every label says so | train |
| ``test`` | ``text:FILE``: percent of the file that are the test text, its end | 10 |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.core.errors import BadParameter, one_of
from companion.data.tokens import SMALLEST, TOKENIZERS

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
_SMALLEST = {"vocab": SMALLEST, "window": 1, "test": 1}
_LARGEST = {"vocab": 1 << 24, "window": 1 << 24, "test": 90}


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

    def but(self, **options: Any) -> Request:
        """The same with other options."""
        return Request(self.base, {**self.options, **options}, self.given | options.keys())


def parse(name: str) -> Request:
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
    if key in _CHOICES:
        return one_of(f"{name}: {key}", value, _CHOICES[key])
    least, most = _SMALLEST[key], _LARGEST[key]
    if not re.fullmatch(r"[1-9][0-9]{0,8}", value, re.ASCII) or not least <= int(value) <= most:
        what = "percent of the file" if key == "test" else "tokens"
        raise BadParameter(
            f"{name}: {key} is a number of {what} from {least:,} to {most:,}, not {value!r}."
        )
    return int(value)


def canonical(name: str) -> str:
    """One spelling for one dataset: options sorted, defaults left out.

    ``pydoc?window=64&vocab=1024`` is ``pydoc?vocab=1024``; names of images stay as they are.

    Raises:
        BadParameter: as :func:`source`.
    """
    return parse(name).canonical if is_text(name) else name
