"""Pack what a GPU machine without git and without a network needs beside the working tree.

    python benchmarks/gpu_pack.py                     # or: make gpu-pack
    python benchmarks/gpu_pack.py --carry DIR         # for a second call: what the first one left

It makes one folder that git ignores: the data sets as an archive, the commit, and what a first call
brought back. Then it prints the command to run there (:mod:`on_gpu`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "gpu-pack"
DATA, COMMIT, CARRY = "data.tar", "commit", "carry.tar.gz"
LIMIT = 45_000_000
"""Bytes of the folder: it travels together with the tree."""

FILES = {
    "CIFAR-10 (JPEG copy)": ("cifar10-jpeg/train.parquet", "cifar10-jpeg/test.parquet"),
    "MNIST": tuple(
        f"MNIST/raw/{part}-{what}"
        for part in ("train", "t10k")
        for what in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    ),
    "WikiText-2": ("wikitext-2/valid.txt", "wikitext-2/test.txt"),
}
"""Data set -> its files below the data root."""


class Refused(Exception):
    """Something is missing, or too large. The message is for the person who typed the command."""


def pack(data: Path, folder: Path, commit: str, carry: Path | None = None) -> int:
    """Make the folder anew.

    Arguments:
        data: the data root; folder: to make; commit: of the code that travels.
        carry: the archive of a first call, or the folder that it came back in.

    Returns:
        its bytes.

    Raises:
        Refused: a file is missing, or all of it together is too large.
    """
    missing = [
        f"  {label}: {name}"
        for label, names in FILES.items()
        for name in names
        if not (data / name).is_file()
    ]
    if missing:
        raise Refused(
            f"gpu-pack: missing in {data} (COMPANION_DATA):\n" + "\n".join(missing) + "\nWhere "
            "each data set comes from: data/README.md, or `companion data list`."
        )
    if carry is not None and carry.is_dir():
        carry = carry / CARRY
    if carry is not None and not carry.is_file():
        raise Refused(f"gpu-pack: {carry} is not there; it is what on_gpu.py left in its --out.")
    kept = carry.read_bytes() if carry else None  # it may lie in the folder that is made anew
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DATA, COMMIT, CARRY):
        (folder / name).unlink(missing_ok=True)
    with tarfile.open(folder / DATA, "w") as tar:  # the files are compressed as they are
        for names in FILES.values():
            for name in names:
                tar.add(data / name, arcname=name, recursive=False)
    (folder / COMMIT).write_text(f"{commit}\n", encoding="utf-8")
    if kept is not None:
        (folder / CARRY).write_bytes(kept)
    made = [folder / name for name in (DATA, COMMIT, CARRY) if (folder / name).is_file()]
    size = sum(path.stat().st_size for path in made)
    if size > LIMIT:
        for path in made:
            path.unlink()
        raise Refused(
            f"gpu-pack: the data would have {size / 1e6:.0f} MB; {LIMIT / 1e6:.0f} MB can travel. "
            "Nothing was packed."
        )
    return size


def head(root: Path) -> tuple[str, bool]:
    """The commit of a checkout, and whether its files are as committed."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"gpu-pack: git {words[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    return git("rev-parse", "HEAD"), not git("status", "--porcelain")


def command(carry: bool) -> str:
    """What to run on the GPU machine, in the repository's root."""
    more = f" --carry {FOLDER}/{CARRY}" if carry else ""
    return f'python3 benchmarks/on_gpu.py --minutes 6 --out "$OUT"{more}'


def main(arguments: list[str] | None = None) -> None:
    """Pack and say what to run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--carry", type=Path, help="what a first call left in its --out")
    parser.add_argument("--folder", type=Path, default=ROOT / FOLDER)
    options = parser.parse_args(arguments)
    try:
        data = Path(os.environ.get("COMPANION_DATA") or ROOT / "data").expanduser().absolute()
        commit, clean = head(ROOT)
        size = pack(data, options.folder, commit if clean else f"{commit}-changed", options.carry)
    except Refused as error:
        sys.exit(str(error))
    if not clean:
        print("The working tree has changes that are not committed: records will say so.")
    print(
        f"Packed into {options.folder.name}/ ({size / 1e6:.1f} MB, commit {commit[:12]}).\n"
        "On the GPU machine, in the repository's root, with a limit of 7 minutes:\n\n"
        f"  {command(options.carry is not None)}\n\n"
        f"The folder {options.folder.name}/ is ignored by git and has to travel along (name it in "
        "`carry`).\nAfterwards, here:\n\n  python benchmarks/on_gpu.py --unpack DIR\n\n"
        f"and for a second call:  make gpu-pack CARRY=DIR"
    )


if __name__ == "__main__":
    main()
