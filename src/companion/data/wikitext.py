"""WikiText-2 and WikiText-103 under the data root, in the layouts people have them.

Nothing is called WikiText that has not the published number of lines and words. Which text networks
are trained on, and which form it has, is in the dataset's name and in its label; one is never taken
for the other. Source: Merity et al. 2016 (the data); our chapter 5.
"""

from __future__ import annotations

from pathlib import Path

from companion.core.errors import CorruptData
from companion.data import corpus, tokens
from companion.data.corpus import Survey, Texts
from companion.data.textnames import Request

# Lines, and words with line ends, of the published files: Merity et al. 2016, table 1, counts both
# (its "tokens"); lines are the rows of Hugging Face's copy. The raw form has the same lines.
PUBLISHED = {
    "wikitext2": {
        "train": (36_718, 2_088_628),
        "valid": (3_760, 217_646),
        "test": (4_358, 245_569),
    },
    "wikitext103": {
        "train": (1_801_350, 103_227_021),
        "valid": (3_760, 217_646),
        "test": (4_358, 245_569),
    },
}
_LABELS = {"wikitext2": "WikiText-2", "wikitext103": "WikiText-103"}
_FOLDERS = {
    "tokens": ("wikitext-{}", "wikitext-{}-v1", "wikitext{}", "wikitext/wikitext-{}-v1"),
    "raw": ("wikitext-{}-raw", "wikitext-{}-raw-v1", "wikitext/wikitext-{}-raw-v1"),
}
_SUFFIXES = {"tokens": ("tokens", "txt", "parquet"), "raw": ("raw", "txt", "parquet")}
_SPLITS = {"train": corpus.TRAIN_NAMES, "valid": corpus.VALID_NAMES, "test": corpus.TEST_NAMES}


def label(request: Request) -> str:
    """``WikiText-2``, ``WikiText-2 (trained on its test text)``, ``WikiText-103 (raw)``, …"""
    said = ["raw"] * (request.options["form"] == "raw")
    said += ["trained on its test text"] * (request.options["train"] == "test")
    return _LABELS[request.base] + (f" ({', '.join(said)})" if said else "")


def hub(request: Request) -> tuple[str, str, str]:
    """Repository and configuration on Hugging Face's hub, and the folder they go to."""
    raw = "raw-" if request.options["form"] == "raw" else ""
    config = f"wikitext-{_number(request)}-{raw}v1"
    return "Salesforce/wikitext", config, config


def find(request: Request, root: Path) -> tuple[str, dict[str, list[Path]]]:
    """The folder below the data root, and each split's files: the fullest of those there are."""
    form = request.options["form"]
    found = [
        (folder, {s: corpus.find(root / folder, n, _SUFFIXES[form]) for s, n in _SPLITS.items()})
        for folder in _folders(request)
    ]
    needed = (request.options["train"], "valid")
    return max(found, key=lambda f: (all(f[1][s] for s in needed), any(f[1].values())))


def files(request: Request, root: Path) -> tuple[list[Path], list[str]]:
    """Those that are needed and there, and in words what is missing."""
    _, paths = find(request, root)
    needed = (request.options["train"], "valid")
    return [p for s in needed for p in paths[s]], [f"{s} text" for s in needed if not paths[s]]


def hint(request: Request, root: Path) -> str:
    """Where was looked, and what else what is there can be used as, if it is asked for."""
    suffixes = ", ".join(f".{suffix}" for suffix in _SUFFIXES[request.options["form"]])
    said = f"Looked in {', '.join(_folders(request))} for train, valid and test as {suffixes}."
    options = ({"form": f, "train": t} for f in ("tokens", "raw") for t in ("train", "test"))
    others = [other for o in options if not files(other := request.but(**o), root)[1]]
    if others:
        said += (
            f" What is there can be used as {' or '.join(o.canonical for o in others)}: that is "
            "another dataset, so it has to be asked for by this name, and its label says so."
        )
    return said


def read(request: Request, root: Path) -> Texts:
    """The text trained on and the validation text.

    Raises:
        CorruptData: not the published number of lines and words, or not the form asked for.
    """
    train, form = request.options["train"], request.options["form"]
    _, paths = find(request, root)
    # Hugging Face's copy has emptied the lines that hold one space: the published text has them.
    texts = {s: corpus.of_files(paths[s], blank=" \n") for s in (train, "valid")}
    for split, text in texts.items():
        _compare(request, split, tokens.cached_survey(text, text.sha256()), paths[split][0])
    return Texts(
        texts[train],
        texts["valid"],
        "its validation text",
        (*paths[train], *paths["valid"]),
        (
            f"form: {form}; lines{' and words' if form == 'tokens' else ''} as published",
            f"trained on its {'training' if train == 'train' else 'TEST'} text",
        ),
    )


def _compare(request: Request, split: str, found: Survey, path: Path) -> None:
    lines, words = PUBLISHED[request.base][split]
    of = f"the {split} text of {_LABELS[request.base]}"
    if found.lines != lines:
        raise CorruptData(
            f"{path}: {found.lines:,} lines where {of} has {lines:,}. Get it again, or load it as "
            f"text:{path.parent}."
        )
    if request.options["form"] == "tokens" and (n := found.words + found.lines) != words:
        raise CorruptData(
            f"{path}: {n:,} words and line ends where {of} has {words:,} in its tokenised form. If "
            f"this is the raw form, put it into a folder called wikitext-{_number(request)}-raw "
            "and ask for form=raw."
        )
    if request.options["form"] == "raw" and found.unknown * 1000 > found.words:
        raise CorruptData(
            f"{path}: this is the tokenised form ({found.unknown:,} times <unk>), not the raw one. "
            "Put it into a folder without 'raw' in its name, and leave form=raw out."
        )


def _folders(request: Request) -> list[str]:
    return [name.format(_number(request)) for name in _FOLDERS[request.options["form"]]]


def _number(request: Request) -> str:
    return request.base.removeprefix("wikitext")
