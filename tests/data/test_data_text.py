"""Texts as datasets: windows, tokenisers, layouts, options, and what may never be mixed up.

The tests of real text run where COMPANION_DATA names a data root that has it.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import data
from companion.core.errors import BadParameter, CorruptData, MissingData
from companion.core.runs import Store
from companion.data import Split, corpus, registry, text, tokens

REAL = os.environ.get("COMPANION_DATA")
LINE = " The quick brown fox of line {} jumps over <unk> lazy dogs , café and naïve . \n"
BLANK = " \n"
BPE = tokens.train_bpe(corpus.Text.of("sample", LINE * 50), 300)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root for every test."""
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "data"


def lines(n: int, seed: int = 0) -> str:
    """A text in WikiText's tokenised form: every fifth line holds one space."""
    return "".join(BLANK if i % 5 == 4 else LINE.format(i * 7 + seed) for i in range(n))


SIZES = {"train": 60, "valid": 20, "test": 30}
WIKI = {split: lines(n, seed) for seed, (split, n) in enumerate(SIZES.items())}
RAW = {split: body.replace("<unk>", "sleepy") for split, body in WIKI.items()}
SMALL = "?vocab=300&window=16"


@pytest.fixture
def published(monkeypatch):
    """As if our small files were the published ones."""
    counts = {s: (n, n + len(WIKI[s].split())) for s, n in SIZES.items()}
    monkeypatch.setattr(text, "PUBLISHED", {"wikitext2": counts, "wikitext103": counts})


def write(folder: Path, texts: dict[str, str], pattern: str = "{}.txt", **renamed: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, body in texts.items():
        path = folder / pattern.format(renamed.get(split, split))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")
    return folder


def parquet(path: Path, body: str, column: str = "text", group: int = 7) -> None:
    """As Hugging Face keeps WikiText: a row per line, and blank lines emptied."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = ["" if line == BLANK else line for line in body.splitlines(keepends=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: rows}), path, row_group_size=group)


# --- windows


def test_windows_are_views_and_y_is_the_next_token():
    stream = torch.arange(100)
    split = Split.windows(stream, 8)
    assert (len(split), split.window, split.tokens, split.kind) == (12, 8, 96, "text")
    assert split.stream is stream
    assert torch.equal(split.y, split.x + 1) and torch.equal(split.x.flatten(), stream[:96])
    for part in (split.x, split.y):
        assert part.untyped_storage().data_ptr() == stream.untyped_storage().data_ptr()
    assert split.to("cpu") is split
    moved = split.to("meta")
    assert moved.stream is not None and moved.stream.shape == (100,) and moved.window == 8
    head = split.head(5)
    assert head.stream is None and torch.equal(head.y, head.x + 1) and head.window == 8
    assert torch.equal(split.head(9).x[:5], head.x) and head.x[:, 0].tolist() != [0, 8, 16, 24, 32]


@given(st.integers(2, 300), st.integers(1, 40))
def test_windows_cover_the_stream(n, window):
    if n <= window:
        with pytest.raises(BadParameter, match=f"windows of 1 to {n - 1}"):
            Split.windows(torch.arange(n), window)
        return
    split = Split.windows(torch.arange(n), window)
    assert n - window <= split.tokens + 1 <= n  # the rest is shorter than a window
    assert int(split.y[-1, -1]) == split.tokens


def test_images_have_no_windows():
    split = data.load("digits").train
    assert (split.kind, split.window, split.stream, split.tokens) == ("images", None, None, 0)
    assert data.load("digits").kind == "images" and data.load("digits").text is None
    with pytest.raises(BadParameter, match="holds images"):
        text.windows_digest(split)


def test_splits_that_do_not_fit():
    x = torch.zeros(3, 4, dtype=torch.int64)
    for bad in (
        (x, x[:, :3]),
        (x, x[:2]),
        (x, x.int()),
        (x.int(), x),
        (x, x.float()),
    ):
        with pytest.raises(BadParameter):
            Split(*bad)
    for stream in (x, x[0].float()):
        with pytest.raises(BadParameter, match=r"\(T,\) int64"):
            Split.windows(stream, 1)
    with pytest.raises(BadParameter, match="at least 1 token"):
        Split.windows(x[0], 0)


def test_windows_digest_and_store(store: Store):
    stream = torch.arange(50) % 9
    split = Split.windows(stream, 5)
    digest = text.windows_digest(split)
    same = Split(split.x.clone(), split.y.clone())
    assert text.windows_digest(same) == digest
    other = stream.clone()
    other[13] += 1
    flipped = Split(split.x.flip(0), split.y.flip(0))
    changed = (split.head(4), Split.windows(stream, 4), Split.windows(other, 5), flipped)
    assert len({digest, *map(text.windows_digest, changed)}) == 5
    # By hand: a line, then x, then y.
    by_hand = b"windows v1 9 5\n" + b"".join(t.numpy().tobytes() for t in (split.x, split.y))
    assert digest == hashlib.sha256(by_hand).hexdigest()
    with pytest.raises(BadParameter, match="not in the run store"):
        text.load_windows(digest, store)
    assert text.save_windows(split, store) == text.save_windows(same, store) == digest
    (entry,) = store.entries()
    assert entry.identity == {"kind": "windows", "windows": digest} and not entry.verify()
    found = text.load_windows(digest, store)
    assert torch.equal(found.x, split.x) and torch.equal(found.y, split.y)


# --- tokenisers


@settings(deadline=None)
@given(st.text(max_size=80))
def test_every_text_comes_back(body):
    for tokenizer in (BPE, tokens.BYTES):
        ids = tokenizer.encode(body)
        assert tokenizer.decode(ids) == body
        assert len(ids) == 0 or int(ids.max()) < tokenizer.vocabulary
    assert tokens.BYTES.encode(body).tolist() == list(body.encode())
    assert len(BPE.encode(body)) <= len(body.encode())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["word", "it's", " ", "  ", "\n", "\n\n", "9", "…", "é", "<unk>"])))
def test_tokens_of_pieces_are_tokens_of_the_whole(parts):
    body = "".join(parts) * 3
    blocks = [body.encode()[i : i + 3] for i in range(0, len(body.encode()), 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 4)
        pieces = list(corpus.Text.of("whole", body).pieces())
        assert pieces == list(corpus.Text("blocks", lambda: iter(blocks)).pieces())
    assert "".join(pieces) == body
    assert BPE.encode_all(pieces).tolist() == BPE.encode(body).tolist()
    found = corpus.count_text(corpus.Text.of("whole", body))
    assert (found.bytes, found.characters) == (len(body.encode()), len(body))
    assert (found.words, found.lines) == (len(body.split()), body.count("\n"))


def test_a_text_without_spaces_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 10)
    monkeypatch.setattr(corpus, "LONGEST", 25)
    body = "é" * 103
    pieces = list(corpus.Text.of("long", body).pieces())
    assert "".join(pieces) == body and max(map(len, pieces)) == 25


def test_training_is_deterministic_and_uses_the_text_only():
    again = tokens.train_bpe(corpus.Text.of("again", LINE * 50), 300)
    assert again.definition == BPE.definition and again.vocabulary == 300
    other = tokens.train_bpe(corpus.Text.of("other", LINE.replace("quick", "slow") * 50), 300)
    assert other.digest != BPE.digest


def test_the_tokeniser_never_sees_the_test_text(tmp_path):
    folder = write(tmp_path / "own", {"train": lines(60), "valid": lines(20)})
    before = data.load(f"text:{folder}{SMALL}")
    definition = text.tokenizer(f"text:{folder}{SMALL}").definition
    write(folder, {"valid": "Quite another vocabulary , xylophones zigzag quizzically . \n" * 40})
    after = data.load(f"text:{folder}{SMALL}")
    assert text.tokenizer(f"text:{folder}{SMALL}").definition == definition
    assert torch.equal(after.train.stream, before.train.stream)
    assert after.fingerprint != before.fingerprint


def gpt2_like(folder: Path, merges: int, split: bool) -> None:
    """A tokeniser of GPT-2's size: every pair of bytes up to ``merges`` is a merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][:merges]
    vocabulary = [*letters, *("".join(p) for p in pairs), "<|endoftext|>"]
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=pairs)
    folder.mkdir(parents=True, exist_ok=True)
    if split:
        model.save(str(folder))
        return
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))


def test_the_published_gpt2_tokeniser_comes_from_disk_only(root, tmp_path):
    name = "pydoc?tokenizer=gpt2"
    with pytest.raises(MissingData, match=r"gpt2.*hf download openai-community/gpt2") as error:
        data.load(name)
    assert str(root / "gpt2") in str(error.value)
    gpt2_like(root / "gpt2", 50_000, split=False)
    dataset = data.load(name)
    assert (dataset.classes, dataset.text.vocabulary, dataset.text.tokenizer) == (
        50304,
        50257,
        "gpt2",
    )
    assert dataset.train.stream.max() < 50257
    assert data.check_dataset(name).files[-1].path == root / "gpt2/tokenizer.json"
    (root / "gpt2/tokenizer.json").unlink()
    snapshot = tmp_path / "hub/models--openai-community--gpt2/snapshots/1"
    gpt2_like(snapshot, 50_000, split=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("1")
    again = data.load(name)
    assert torch.equal(again.train.stream, dataset.train.stream)
    assert again.fingerprint == dataset.fingerprint
    gpt2_like(root / "gpt2", 40_000, split=False)
    with pytest.raises(CorruptData, match="40,257 tokens where GPT-2 has 50,257"):
        data.load(name)
    (root / "gpt2/tokenizer.json").write_text("{")
    with pytest.raises(CorruptData, match="cannot be read as a tokeniser"):
        data.load(name)


# --- pydoc


def test_pydoc():
    dataset = data.load("pydoc")
    assert dataset.kind == "text" and (dataset.classes, dataset.in_shape) == (512, (64,))
    assert dataset.label == f"reference text of Python {sys.version_info[0]}.{sys.version_info[1]}"
    facts = dataset.text
    assert (facts.tokenizer, facts.vocabulary) == ("bpe", 512)
    assert 1.8 < facts.train.bytes_per_token < 2.6
    assert 0.08 < facts.test.bytes / (facts.train.bytes + facts.test.bytes) < 0.3
    assert facts.train.tokens == len(dataset.train.stream)
    assert dataset.train.tokens <= facts.train.tokens - 1
    assert torch.equal(dataset.train.x[:, 1:], dataset.train.y[:, :-1])
    assert data.load("pydoc") is dataset and data.load("pydoc?vocab=512&window=64") is dataset
    with pytest.raises(BadParameter, match="no black pixel"):
        _ = dataset.black
    moved = dataset.to("meta")
    assert moved.test.stream.device.type == "meta" and moved.text == facts


def test_no_paragraph_of_pydocs_test_text_is_in_its_training_text():
    texts = text._texts(text.parse_text_name("pydoc"), Path())
    train, test = ("".join(t.pieces()) for t in (texts.train, texts.test))

    def paragraphs(body: str) -> list[str]:
        found = [" ".join(p.split()) for p in body.split("\n\n")]
        return [p for p in found if p]

    assert not set(paragraphs(train)) & set(paragraphs(test))
    both = paragraphs(train + test)
    assert len(set(both)) == len(both)
    from pydoc_data.topics import topics

    everything = " ".join(" ".join(t.split()) for t in topics.values())
    assert all(p in everything for p in both)  # and nothing was made up
    assert text.tokenizer("pydoc").decode(data.load("pydoc").train.stream) == train


@pytest.mark.slow
def test_pydoc_is_the_same_in_another_process_and_on_one_core(tmp_path):
    code = "from companion import data; d = data.load('pydoc'); "
    code += "from companion.data.text import windows_digest as w; print(d.fingerprint, w(d.test))"
    env = {**os.environ, "COMPANION_RUNS": str(tmp_path / "other"), "PYTHONHASHSEED": "7"}
    env["RAYON_NUM_THREADS"] = "1"  # of tokenizers: training counts in parallel
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True)
    dataset = data.load("pydoc")
    expected = f"{dataset.fingerprint} {text.windows_digest(dataset.test)}"
    assert done.stdout.decode().strip() == expected


def test_tokens_are_cached_and_a_damaged_cache_is_made_again(runs_root, monkeypatch):
    registry._load.cache_clear()
    dataset = data.load("pydoc")
    folders = list((runs_root / "tokens").iterdir())
    assert len(folders) == 2
    files = {p.name.partition("-")[0]: p for p in folders[0].glob("*.npy")}

    def broken(*args):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        for name in ("train_bpe", "count_text"):
            patch.setattr(tokens, name, broken)
        patch.setattr(tokens.Tokenizer, "encode_all", broken)
        registry._load.cache_clear()
        assert data.load("pydoc").fingerprint == dataset.fingerprint
    content = bytearray(files["bpe"].read_bytes())
    content[200] ^= 1
    files["bpe"].write_bytes(content)
    registry._load.cache_clear()
    again = data.load("pydoc")
    assert torch.equal(again.train.stream, dataset.train.stream)
    monkeypatch.setenv("COMPANION_RUNS", str(files["bpe"]))  # no folder: nothing can be cached
    registry._load.cache_clear()
    assert data.load("pydoc").fingerprint == dataset.fingerprint


@pytest.mark.parametrize("made", [BPE, tokens.BYTES], ids=["bpe", "bytes"])
def test_decoding_says_what_it_cannot_show(made):
    row = torch.tensor(made.encode("a fox").tolist())
    beyond = torch.tensor([made.vocabulary, -1, made.vocabulary + 63])
    shown = made.decode(torch.cat([row, beyond, row]))
    assert shown == "a fox" + 3 * "\N{REPLACEMENT CHARACTER}" + "a fox"
    assert made.decode(row.numpy()) == made.decode(row.tolist()) == "a fox"
    for wrong in (row[None], row[0], row.float(), [row.tolist()]):
        with pytest.raises(BadParameter, match=r"one row of tokens \(T,\) is needed"):
            made.decode(wrong)
    with pytest.raises(BadParameter, match=r"character 2 .*half of a surrogate pair"):
        made.encode("ab\ud800c")
    with pytest.raises(BadParameter, match="mine: character 0"):
        corpus.Text.of("mine", "\udfff")


def test_a_tokeniser_is_read_once(monkeypatch):
    import tokenizers

    made = tokens.Tokenizer(BPE.name, BPE.vocabulary, BPE.definition)
    made.encode("one")
    monkeypatch.setattr(tokenizers, "Tokenizer", None)
    assert made.decode(made.encode("two")) == "two"


# --- names and options


def test_canonical_names():
    for name, expected in {
        "pydoc?window=64&vocab=512": "pydoc",
        "pydoc?window=32&vocab=600": "pydoc?vocab=600&window=32",
        "wikitext2?train=test&form=tokens&vocab=4096": "wikitext2?train=test",
        "text:/a/b.txt?test=10": "text:/a/b.txt",
        "digits@split-a": "digits@split-a",
        "images:/x?size=3": "images:/x?size=3",
    }.items():
        assert data.canonical_data(name) == expected
        assert data.canonical_data(expected) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pydoc?colour=1", "'colour' is not known.*tokenizer, vocab, window"),
        ("pydoc?train=test", "'train' is not known"),
        ("pydoc?tokenizer=word", "Allowed: bpe, gpt2, bytes"),
        ("pydoc?vocab=256", "vocab is a number of tokens from 257"),
        ("pydoc?vocab=many", "not 'many'"),
        ("pydoc?window=0", "window is a number of tokens from 1"),
        ("pydoc?window=32&window=32", "window is given twice"),
        ("pydoc?vocab=512&tokenizer=bytes", "vocab is for tokenizer=bpe"),
        ("wikitext2?train=valid", "Allowed: train, test"),
        ("text:", "needs a path"),
        ("text:x?test=95", "from 1 to 90"),
        ("wikitex2", "Did you mean 'wikitext2'"),
        ("pydoc?window=20000", "not one window of 20000"),
    ],
)
def test_names_that_make_no_sense(name, message):
    with pytest.raises(BadParameter, match=message):
        data.load(name)


def test_fingerprints(tmp_path):
    body = lines(200)
    path = write(tmp_path / "a", {"book": body}) / "book.txt"

    def found(name: str) -> str:
        return data.load(name).fingerprint

    first = found(f"text:{path}{SMALL}")
    for other in ("?vocab=301&window=16", "?vocab=300&window=17", f"{SMALL}&test=20"):
        assert found(f"text:{path}{other}") != first
    assert found(f"text:{path}?tokenizer=bytes&window=16") != first
    moved = path.rename(tmp_path / "moved.text")
    assert found(f"text:{moved}{SMALL}") == first  # its place does not count
    os.utime(moved, (1, 1))
    assert found(f"text:{moved}{SMALL}") == first
    moved.write_text(body.replace("line 0", "line 1", 1))  # a byte of it does
    assert found(f"text:{moved}{SMALL}") != first


# --- WikiText


LAYOUTS = {
    "tokens": ["wikitext-2", "wikitext-2-v1", "wikitext2", "wikitext/wikitext-2-v1"],
    "raw": ["wikitext-2-raw", "wikitext-2-raw-v1", "wikitext/wikitext-2-raw-v1"],
}


@pytest.mark.parametrize("form", LAYOUTS)
def test_every_layout_gives_the_same_dataset(root, published, form):
    texts = WIKI if form == "tokens" else RAW
    name = "wikitext2" + SMALL + ("&form=raw" if form == "raw" else "")
    suffix = "tokens" if form == "tokens" else "raw"
    found = set()
    for folder in LAYOUTS[form]:
        for pattern in ("{}.txt", f"wiki.{{}}.{suffix}", "parquet", "shards"):
            place = root / folder
            if pattern == "parquet":
                for split, body in texts.items():
                    parquet(place / f"{split.replace('valid', 'validation')}.parquet", body)
            elif pattern == "shards":
                for split, body in texts.items():
                    rows = body.splitlines(keepends=True)
                    for i, part in enumerate((rows[:11], rows[11:])):
                        parquet(place / f"{split}-0000{i}-of-00002.parquet", "".join(part))
            else:
                write(place, texts, pattern)
            dataset, report = data.load(name), data.check_dataset(name)
            assert report.where == place and report.fingerprint == dataset.fingerprint
            found.add((dataset.fingerprint, dataset.label))
            for path in [*place.iterdir()]:
                path.unlink()
            place.rmdir()
    ((_, label),) = found
    assert label == ("WikiText-2" if form == "tokens" else "WikiText-2 (raw)")
    assert dataset.text.evaluated_on == "its validation text"
    assert dataset.text.train.bytes == len(texts["train"].encode())
    assert dataset.text.test.words == len(texts["valid"].split())


def test_training_on_the_test_text_is_never_silent(root, published):
    write(root / "wikitext-2", {s: WIKI[s] for s in ("valid", "test")})
    name = "wikitext2?train=test&vocab=300&window=16"
    with pytest.raises(MissingData) as error:
        data.load("wikitext2")
    said = str(error.value)
    for part in ("train text missing", str(root / "wikitext-2"), "companion data get wikitext2"):
        assert part in said
    assert "can be used as wikitext2?train=test" in said
    dataset = data.load(name)
    assert dataset.label == "WikiText-2 (trained on its test text)"
    assert dataset.name == "wikitext2?train=test&vocab=300&window=16"
    assert dataset.text.train.bytes == len(WIKI["test"].encode())
    report = data.check_dataset(name)
    assert report.label == dataset.label and "trained on its TEST text" in report.notes
    write(root / "wikitext-2", {"train": WIKI["train"]})
    whole = data.load(f"wikitext2{SMALL}")
    assert whole.label == "WikiText-2" and whole.fingerprint != dataset.fingerprint
    assert data.load(name).fingerprint == dataset.fingerprint  # still what was asked for
    assert whole.text.train.bytes == len(WIKI["train"].encode())


def test_what_is_missing_of_a_text_is_reported_too(root, tmp_path):
    book = write(tmp_path / "own", {"train": lines(9)})
    for name, said in {
        f"text:{tmp_path / 'none'}": "does not exist",
        f"text:{book}": "holds no test text",
        "pydoc?tokenizer=gpt2": "GPT-2 tokeniser is not in",
    }.items():
        report = data.check_dataset(name)
        assert not report.present and report.missing and said in report.notes[0]
        told = run("data", "check", name, code=1).output
        assert said in " ".join(told.split()) and "not in None" not in told


def test_one_form_is_never_taken_for_the_other(root, published):
    write(root / "wikitext-2-raw-v1", RAW)
    with pytest.raises(MissingData, match=r"wikitext2\?form=raw"):
        data.load("wikitext2")
    write(root / "wikitext-2", RAW)
    longer = {s: body.replace("sleepy", "sleepy old") for s, body in RAW.items()}
    write(root / "wikitext-2", longer)
    with pytest.raises(CorruptData, match=r"words and line ends where the train text.*form=raw"):
        data.load(f"wikitext2{SMALL}")
    write(root / "wikitext-2-raw-v1", WIKI)
    with pytest.raises(CorruptData, match="this is the tokenised form"):
        data.load(f"wikitext2{SMALL}&form=raw")
    write(root / "wikitext-2", {**WIKI, "valid": WIKI["valid"] + LINE})
    with pytest.raises(CorruptData, match=r"valid.txt: 21 lines where the valid text .* has 20"):
        data.load(f"wikitext2{SMALL}")


def test_what_is_missing_is_reported(root):
    report = data.check_dataset("wikitext103?form=raw")
    assert not report.present and report.missing == ("train text", "valid text")
    assert report.where == root / "wikitext-103-raw" and report.label == "WikiText-103 (raw)"
    assert "wikitext-103-raw-v1" in report.notes[0]
    told = run("data", "check", "wikitext2", code=1).output
    assert "train text, valid text missing" in told
    assert not root.exists()


# --- the user's text


def test_one_file_is_cut_at_a_line_end(tmp_path):
    body = lines(100)
    path = write(tmp_path, {"book": body}) / "book.txt"
    dataset = data.load(f"text:{path}{SMALL}")
    assert dataset.label == "text: book" and dataset.text.evaluated_on == "its last 10 %"
    facts = dataset.text
    assert facts.train.bytes + facts.test.bytes == len(body.encode())
    assert math.isclose(facts.test.bytes / len(body.encode()), 0.1, abs_tol=0.02)
    texts = text._texts(text.parse_text_name(f"text:{path}"), tmp_path)
    train, test = ("".join(t.pieces()) for t in (texts.train, texts.test))
    assert train + test == body and train.endswith("\n")
    larger = data.load(f"text:{path}{SMALL}&test=50").text
    assert math.isclose(larger.test.bytes / len(body.encode()), 0.5, abs_tol=0.02)
    parquet(tmp_path / "book.parquet", body.replace(BLANK, "\n"), column="body")
    rows = data.load(f"text:{tmp_path / 'book.parquet'}{SMALL}")
    assert rows.text.test.words == len("".join(body.splitlines(True)[90:]).split())


def halves(path: Path, percent: int) -> list[str]:
    return ["".join(part.pieces()) for part in corpus.split_file(path, percent)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("one line " * 99, 0.9),
        ("äöü€𝄞" * 70, 0.9),  # no white space: between two characters
        ("x" * 995 + " end", 0.9),  # white space far from the mark, but near enough
        ("word " * 150 + "\n", 0.9),  # a line end, with nothing behind it
    ],
)
def test_a_text_on_one_line_is_cut_at_white_space(tmp_path, body, expected):
    path = write(tmp_path, {"book": body}) / "book.txt"
    train, test = halves(path, 10)
    assert train + test == body and train.strip() and test.strip()
    if " " in body:
        assert test[0].isspace() and not train[-1].isspace()
    if body[0] != "x":
        assert len(train.encode()) / len(body.encode()) == pytest.approx(expected, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(st.text("aé€𝄞 \n\r\t", min_size=2, max_size=60), st.integers(1, 90))
def test_however_a_text_is_cut_nothing_is_lost(tmp_path_factory, body, percent):
    path = tmp_path_factory.mktemp("cut") / "book.txt"
    path.write_bytes(body.encode())
    train, test = halves(path, percent)
    assert train + test == body and train and test


def test_a_long_line_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 64)
    monkeypatch.setattr(corpus, "NEAR", 16)
    path = write(tmp_path, {"book": "word " * 200 + "\n" + "end " * 10}) / "book.txt"
    train, test = halves(path, 50)
    assert len(train) == pytest.approx(520, abs=5), "not at the line end far behind"
    assert train + test == path.read_text()


def test_a_byte_order_mark_is_no_text(tmp_path):
    bare, marked = (write(tmp_path / n, {"book": lines(40)}) / "book.txt" for n in "ab")
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    assert halves(marked, 10) == halves(bare, 10)
    a, b = (data.load(f"text:{path}{SMALL}") for path in (bare, marked))
    assert a.fingerprint == b.fingerprint
    assert "".join(corpus.of_files([marked]).pieces()) == bare.read_text()
    cut = corpus.split_file(marked, 10)[1].begins
    marked.write_bytes(marked.read_bytes() + b"\xff")
    at = marked.stat().st_size - 1
    for part in (corpus.of_files([marked]), corpus.Text("t", lambda: iter([b"\xff"]), at)):
        with pytest.raises(CorruptData, match=f"at byte {at:,} "):
            list(part.pieces())
    assert cut > 3


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_the_byte_that_is_no_text_is_named(block):
    body = "aé€𝄞".encode() + b"\xe2\x82!" + b"more"
    blocks = [body[i : i + block] for i in range(0, len(body), block)]
    with pytest.raises(CorruptData, match=r"at byte 10 "):
        list(corpus.Text("t", lambda: iter(blocks)).pieces())


def test_windows_line_ends_end_words(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 8)
    assert list(corpus.Text.of("t", "sentences\r\nlines").pieces()) == ["sentences", "\r\nlines"]


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string"])
def test_columns_of_strings(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
        "string_view": pa.string_view(),
        "large_string": pa.large_string(),
    }
    path, rows = tmp_path / "book.parquet", lines(40).splitlines(keepends=True)
    pq.write_table(pa.table({"id": range(40), "text": pa.array(rows).cast(types[kind])}), path)
    assert "".join(corpus.of_files([path]).pieces()) == "".join(rows)
    pq.write_table(pa.table({"id": range(3), "text": range(3)}), path)
    with pytest.raises(CorruptData, match=r"no column of strings .*id \(int64\), text \(int64\)"):
        corpus.split_file(path, 10)


def test_a_folder_with_its_own_split(tmp_path):
    folder = write(tmp_path / "own", {"train": lines(80), "test": lines(20, 5)})
    dataset = data.load(f"text:{folder}{SMALL}")
    assert dataset.text.evaluated_on == "its test.txt" and dataset.label == "text: own"
    write(folder, {"val": lines(25, 9)})
    other = data.load(f"text:{folder}{SMALL}")
    assert other.text.evaluated_on == "its val.txt" and other.fingerprint != dataset.fingerprint
    with pytest.raises(BadParameter, match=r"has a val.txt of its own"):
        data.load(f"text:{folder}?test=10")


def test_texts_that_cannot_be_used(tmp_path):
    def fails(kind, message, path, options=SMALL):
        with pytest.raises(kind, match=message):
            data.load(f"text:{path}{options}")

    fails(MissingData, "does not exist", tmp_path / "none")
    fails(MissingData, "no train text", write(tmp_path / "a", {"test": "x"}))
    fails(MissingData, "no test text", write(tmp_path / "b", {"train": "x"}))
    for body in ("", "x", "é"):
        fails(BadParameter, "too short to split", write(tmp_path / "c", {"x": body}) / "x.txt")
    fails(BadParameter, "not one window", write(tmp_path / "c", {"x": "a few words"}) / "x.txt")
    parquet(tmp_path / "row.parquet", LINE)
    fails(BadParameter, r"too short .*\(1 rows\)", tmp_path / "row.parquet")
    short = write(tmp_path / "d", {"train": lines(9), "valid": "few"})
    fails(
        BadParameter,
        r"valid.txt has 3 tokens: not one window of 16",
        short,
        "?tokenizer=bytes&window=16",
    )
    (short / "valid.txt").write_bytes(b"good " * 30 + b"\xff\xfe" + b" bad" * 30)
    fails(CorruptData, r"valid.txt: not UTF-8 at byte 150 ", short)
    (short / "valid.txt").write_bytes("half é".encode()[:-1])
    fails(CorruptData, r"valid.txt: not UTF-8 at byte 5 ", short)
    (tmp_path / "e.parquet").write_bytes(b"no parquet")
    fails(CorruptData, "cannot be read as parquet", tmp_path / "e.parquet")


def test_files_that_change_are_read_again(tmp_path):
    path = write(tmp_path, {"book": lines(100)}) / "book.txt"
    before = data.load(f"text:{path}{SMALL}")
    path.write_text(lines(120, 3))
    after = data.load(f"text:{path}{SMALL}")
    assert after.fingerprint != before.fingerprint and len(after.train) > len(before.train)


# --- Hugging Face's datasets


def fake_datasets(monkeypatch, answer) -> list[tuple[str, str]]:
    calls = []

    class Rows:
        def __init__(self, body: str):
            self.body = body

        def to_parquet(self, path: str) -> None:
            parquet(Path(path), self.body)

    def load_dataset(repository: str, configuration: str, revision: str) -> dict[str, Rows]:
        assert len(revision) == 40, "a commit: what is downloaded today is what was yesterday"
        calls.append((repository, configuration))
        if isinstance(answer, Exception):
            raise answer
        return {s.replace("valid", "validation"): Rows(body) for s, body in answer.items()}

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]  # a made-up module
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_get_writes_what_the_hub_has(root, published, monkeypatch):
    calls = fake_datasets(monkeypatch, WIKI)
    assert data.download("wikitext2") == data.download("wikitext2") == root / "wikitext-2-v1"
    assert calls == [("Salesforce/wikitext", "wikitext-2-v1")]
    names = {p.name for p in (root / "wikitext-2-v1").iterdir()}
    assert names == {"train.parquet", "validation.parquet", "test.parquet", "texts.sha256"}
    here = data.load(f"wikitext2{SMALL}")
    write(root / "wikitext-2", WIKI)
    assert data.check_dataset(f"wikitext2{SMALL}").where == root / "wikitext-2"
    assert data.load(f"wikitext2{SMALL}").fingerprint == here.fingerprint  # the published bytes
    calls = fake_datasets(monkeypatch, RAW)
    data.download("wikitext103?form=raw")
    assert calls == [("Salesforce/wikitext", "wikitext-103-raw-v1")]


def test_what_the_hub_has_stays_what_it_was_at_first(root, published, monkeypatch):
    """With the published numbers of lines and words, and one word changed."""
    fake_datasets(monkeypatch, WIKI)
    folder = data.download("wikitext2")
    lines_there = (folder / "texts.sha256").read_text().splitlines()
    said = dict(reversed(line.split()) for line in lines_there)
    assert said == {s: hashlib.sha256(body.encode()).hexdigest() for s, body in WIKI.items()}
    changed = {**WIKI, "train": WIKI["train"].replace("quick", "quiet", 1)}
    fake_datasets(monkeypatch, changed)
    (folder / "train.parquet").unlink()
    with pytest.raises(
        CorruptData, match=r"train.parquet: not the text that was .* first \(SHA-256"
    ):
        data.download("wikitext2")
    with pytest.raises(CorruptData, match=r"texts\.sha256 beside it says"):
        data.load(f"wikitext2{SMALL}")
    fake_datasets(monkeypatch, WIKI)
    (folder / "train.parquet").unlink()
    parquet(folder / "train.parquet", WIKI["train"], group=3)  # another file, the same text
    assert data.load(f"wikitext2{SMALL}").fingerprint and data.download("wikitext2") == folder
    (folder / "texts.sha256").write_bytes(b"\xff")
    with pytest.raises(CorruptData, match=r"texts\.sha256: cannot be read"):
        data.check_dataset(f"wikitext2{SMALL}")


def test_get_without_library_or_network(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingData, match=r"pip install 'companion\[hub\]'") as error:
        data.download("wikitext2")
    assert str(root / "wikitext-2-v1") in str(error.value)
    fake_datasets(monkeypatch, ConnectionError("no route"))
    with pytest.raises(MissingData, match=r"(?s)no route.*Without a network"):
        data.download("wikitext2")
    assert not root.exists()
    for name in ("pydoc", "text:/x"):
        with pytest.raises(BadParameter, match="nothing to download"):
            data.download(name)


# --- the command line


def test_the_command_line_shows_tokens():
    shown = run("data", "check", "pydoc?window=32").output
    for part in ("windows of 32 tokens", "bytes per token", "512 tokens in its", "fingerprint"):
        assert part in shown
    assert "images" not in shown
    listed = run("data", "list").output
    assert "wikitext103" in listed and "text:PATH" in listed


# --- real text


def test_real_wikitext2(monkeypatch):
    if REAL is None:
        pytest.skip("COMPANION_DATA is not set: no real data to test")
    monkeypatch.setenv("COMPANION_DATA", REAL)
    name = "wikitext2?train=test&tokenizer=bytes"
    if not data.check_dataset(name).present:
        pytest.skip("WikiText-2 is not under COMPANION_DATA")
    dataset = data.load(name)  # and it has the published number of lines and words
    assert dataset.label == "WikiText-2 (trained on its test text)"
    assert dataset.text.train.words == 241_211 and dataset.text.test.words == 213_886
    body = bytes(dataset.test.stream.tolist())
    assert body.startswith(b" \n = Homarus gammarus = \n")
    assert hashlib.sha256(body).hexdigest().startswith("f0737ed31fc1")
