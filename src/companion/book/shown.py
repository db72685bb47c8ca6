"""Commands on a page, with what they print and draw: run by the build, on small networks.

In the Markdown of a page around the chapters a block of this kind is run, and what it printed
stands below it; a picture that it drew follows with its caption::

    ```{shown}
    :figure: line.svg
    :alt: Two curves between A and B.
    The line from A to B.
    $ companion barrier a.safetensors b.safetensors --model mlp:widths=64x2 --data digits \\
          --plot line.svg
    ```

With ``:says: Same network? yes`` the build fails where the command does not say so, for a text that
rests on it. Networks come out of the run store (:func:`networks`; seconds where they are not there
yet), the commands of a page run one after the other in one folder and one process, and all of it
is kept until the page's commands or the package change.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from companion.book.finish import _scrub as scrub
from companion.book.layout import Book, BookError
from companion.core.seeds import Key
from companion.data import load
from companion.rebasin import derive
from companion.report import figures
from companion.training import Fork, Job, Recipe, Run, build, load_weights, train

NET, BATCHNORM = "mlp:widths=64x2", "mlp:norm=batch,widths=64x2"
GPT, TEXT = "gpt:layers=1,width=32", "pydoc"

WIDTH = 84
"""Columns that a page has room for."""
FILE = ".safetensors"

_BLOCK = re.compile(r"^```\{shown\}\n(.*?)^```$", re.M | re.S)
_DRIVER = """
import json, sys
from typer.testing import CliRunner
from companion.cli import app
found = []
for words in json.load(sys.stdin):
    done = CliRunner().invoke(app, words, prog_name="companion")
    found.append((done.exit_code, done.output if done.exit_code else done.stdout))
json.dump(found, open("outputs.json", "w"))
"""


@dataclass(frozen=True)
class Block:
    """One command of a page.

    Arguments:
        command: as it stands there, behind its ``$``.
        figure, alt, caption: a picture that it draws, "" if it draws none.
        says: what the text around it takes for granted that the command prints.
    """

    command: str
    figure: str = ""
    alt: str = ""
    caption: str = ""
    says: str = ""

    @classmethod
    def read(cls, text: str, where: str) -> Block:
        """From the inside of a block.

        Raises:
            BookError: no command of ours, or a picture without its words.
        """
        above, dollar, command = text.partition("$ ")
        options = dict(re.findall(r"^:(figure|alt|says): (.*)$", above, re.M))
        caption = " ".join(re.sub(r"^:.*$", "", above, flags=re.M).split())
        block = cls(command.strip(), caption=caption, **options)
        if not dollar or block.words[:1] != ["companion"]:
            raise BookError(f"{where}: a {{shown}} block needs a line `$ companion …`.")
        if block.figure and not (block.alt and block.caption):
            raise BookError(f"{where}: {block.figure} needs an :alt: and a caption.")
        return block

    @property
    def words(self) -> list[str]:
        """The command line, split."""
        return shlex.split(self.command.replace("\\\n", " "))


def shown(book: Book, name: str, text: str) -> tuple[str, dict[str, bytes]]:
    """A page's text with what its commands printed and drew.

    Arguments:
        name: of the page.
        text: its Markdown.

    Returns:
        the text, and the files that it refers to, by their name in the staged tree.

    Raises:
        BookError: a command failed; the message is its own.
    """
    blocks = [Block.read(found, f"{name}.md") for found in _BLOCK.findall(text)]
    if not blocks:
        return text, {}
    folder = _ran(book, name, blocks)
    outputs = iter(json.loads((folder / "outputs.json").read_text(encoding="utf-8")))
    files: dict[str, bytes] = {}
    each = iter(blocks)

    def instead(found: re.Match[str]) -> str:
        block, (_, output) = next(each), next(outputs)
        printed = "\n".join(map(_wrapped, scrub(output, book).strip("\n").split("\n")))
        out = f"```console\n$ {block.command}\n{printed}\n```\n"
        if block.figure:
            label = figures.label(f"{name}-{Path(block.figure).stem}")
            svg = (folder / block.figure).read_text(encoding="utf-8")
            files[f"files/{name}/{block.figure}"] = svg.encode()
            files[f"extra/dark/{name}/{label}.svg"] = figures.dark(svg).encode()
            out += (
                f"\n```{{figure}} files/{name}/{block.figure}\n:name: {label}\n"
                f":alt: {block.alt}\n\n{block.caption}\n```\n"
            )
        return out

    text = _BLOCK.sub(instead, text)
    for page in sorted(folder.glob("*.html")):
        files[f"extra/reports/{page.name}"] = page.read_bytes()
    return text, files


def networks(names: Collection[str]) -> dict[str, Mapping[str, Tensor]]:
    """Networks that the pages use, by the name of their file, out of the run store.

    ``a`` and ``b`` are independent; ``copy`` is ``a`` with its units in another order; ``tuned-1``
    and ``tuned-2`` are one young network, trained on, each on its own half of the data; ``bn-a``
    and ``bn-b`` have BatchNorm, and ``gpt-a`` and ``gpt-b`` are language models, independent too.

    Arguments:
        names: the wanted ones; others are left out.
    """
    plain = Recipe(net=NET, data="digits", steps=400, batch=60)
    norm = replace(plain, net=BATCHNORM, steps=200)
    text = Recipe(
        net=GPT, data=TEXT, steps=200, batch=16, optimizer="adamw", lr=3e-3, augment="shift"
    )
    first, young = Run(plain), Run(replace(plain, steps=60))
    halves = [replace(plain, data=f"digits@random-50-{n}", steps=200) for n in (0, 1)]
    leaves = Fork(young, young.last_step, schedule="restart")
    runs = {
        "a": first,
        "b": Run(plain, init=1, order=1),
        "copy": first,
        **{f"tuned-{n}": Run(half, order=n, fork=leaves) for n, half in enumerate(halves, 1)},
        **{f"bn-{end}": Run(norm, init=n, order=n) for n, end in enumerate("ab")},
        **{f"gpt-{end}": Run(text, init=n, order=n, augment=n) for n, end in enumerate("ab")},
    }
    wanted = {name: run for name, run in runs.items() if name in names}
    train([Job(run, weights=(run.last_step,)) for run in wanted.values()], label="small networks")
    found: dict[str, Mapping[str, Tensor]] = {n: load_weights(run) for n, run in wanted.items()}
    if "copy" in found:
        digits = load("digits")
        spec = derive(build(first, digits, digits.test.x.device), digits.test.x[:2])
        moved = spec.random(Key("book", "copy").generator())
        found["copy"] = spec.permute(found["copy"], moved)
    return found


def _wrapped(line: str) -> str:
    """A line that a page has room for: sentences are broken, tables are not as wide."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    if len(line) <= WIDTH or re.search(r"\S {2,}\S", line):
        return line
    return textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _ran(book: Book, name: str, blocks: list[Block]) -> Path:
    """The folder in which the commands of a page have run."""
    package = Path(__file__).parents[1]
    known = hashlib.sha256(json.dumps([[b.command, b.says] for b in blocks]).encode())
    for path in sorted(package.rglob("*.py")):
        known.update(path.read_bytes())
    kept = book.root / "build" / "shown" / name
    mark = kept / "key"
    if mark.is_file() and mark.read_text() == known.hexdigest():
        return kept
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    words = [word for block in blocks for word in block.words]
    named = {word.removesuffix(FILE) for word in words if word.endswith(FILE)}
    for stem, theta in networks(named).items():
        save_file({k: v.contiguous() for k, v in theta.items()}, kept / f"{stem}{FILE}")
    print(f"{name}.md: {len(blocks)} commands", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps([b.words[1:] for b in blocks]),
        text=True,
        cwd=kept,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise BookError(f"{name}.md: its commands could not be run.\n{done.stderr}")
    outputs = json.loads((kept / "outputs.json").read_text(encoding="utf-8"))
    for block, (code, output) in zip(blocks, outputs, strict=True):
        if code:
            raise BookError(f"{name}.md: `{block.command}` ended with {code}.\n{output}")
        if block.says not in output:
            raise BookError(
                f"{name}.md: `{block.command}` does not say {block.says!r}, on which the text "
                f"rests.\n{output}"
            )
    mark.write_text(known.hexdigest())
    return kept
