"""Two trainings that somebody published, checkpoint by checkpoint: is there a barrier between them?

What :mod:`companion.experiments.aligned` is for runs of the store, this is for folders as
``save_pretrained`` of ``transformers`` writes them, such as Pythia and PolyPythias, of which there
is one for each step and seed. Nothing is trained, and nothing is stored. ::

    found = along("pythia-14m-seed1", "pythia-14m-seed2", data)  # each with step0, step1, …
    {step: lines["weights"].height("test") for step, lines in found.items()}

Source: the question is that of Frankle et al. 2020, without a common start; our chapter 5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from companion import models
from companion.connectivity import Barrier, barrier
from companion.core.errors import BadParameter
from companion.core.fitting import fitted, in_type_of
from companion.core.reading import read_weights
from companion.core.seeds import Key
from companion.core.theta import Theta, check_theta, layout
from companion.data import Dataset
from companion.experiments.methods import Method, aligned
from companion.experiments.pairs import Evaluation
from companion.rebasin import Folding, Spec

Training = str | Path | Sequence[str | Path]
"""A folder with a sub-folder for each checkpoint, or the checkpoints' folders."""


def checkpoints(training: Training) -> dict[int, Path]:
    """Step -> folder, in order. The step is the last ``step`` with a number in the folder's name.

    Raises:
        BadParameter: no such folder, no checkpoint, a name without a step, or a step twice.
    """
    if isinstance(training, str | Path):
        root = Path(training).expanduser()
        if not root.is_dir():
            raise BadParameter(f"checkpoints: there is no folder {root}.")
        folders = [p for p in root.iterdir() if p.is_dir() and _step(p) is not None]
        if not folders:
            raise BadParameter(f"checkpoints: {root} has no sub-folders step0, step1000, ….")
    else:
        folders = [Path(p).expanduser() for p in training]
    found: dict[int, Path] = {}
    for folder in folders:
        step = _step(folder)
        if step is None or step in found:
            why = "names no step" if step is None else f"is step {step} once more"
            raise BadParameter(f"checkpoints: {folder} {why}. Name folders step0, step1000, ….")
        found[step] = folder
    return dict(sorted(found.items()))


def _step(folder: Path) -> int | None:
    numbers = re.findall(r"step[-_]?(\d+)", folder.name)
    return int(numbers[-1]) if numbers else None


def along(
    first: Training,
    second: Training,
    data: Dataset,
    *,
    methods: Sequence[Method | str] = ("naive", "weights"),
    evaluation: Evaluation | None = None,
    max_error: float | None = None,
) -> dict[int, dict[str, Barrier]]:
    """The barrier between two published trainings, at each step that both have.

    A network early in training errs like one that has learnt nothing; only at the last step do both
    have to have learnt (gate G0).

    Arguments:
        first, second: trainings of one architecture, whose ``config.json`` says which.
        data: a text in the networks' own tokens, as ``wikitext2?tokenizer=FOLDER`` has it, on the
            device to compute on.
        methods: ``naive``, and ways of bringing B to A.
        evaluation: points and windows of a line.
        max_error: percent; up to it a network counts as trained at the last step in any case.

    Returns:
        step -> name of the method -> barrier.

    Raises:
        BadParameter: no step in common, another architecture, tokens that the network does not
            have; whatever a method refuses.
    """
    one, other = checkpoints(first), checkpoints(second)
    steps = [step for step in one if step in other]
    if not steps:
        raise BadParameter(
            f"checkpoints: no step in common; the first has {[*one]}, the second {[*other]}."
        )
    how = evaluation or Evaluation()
    chosen = [Method(m) if isinstance(m, str) else m for m in methods]
    module = _architecture(one[steps[0]], data)
    example, splits = data.test.x[:2], how.splits(data)
    known: dict[bool, Spec | Folding] = {}  # whether a method folds -> what may move
    found: dict[int, dict[str, Barrier]] = {}
    for step in steps:
        a, b = (_weights(module, folder) for folder in (one[step], other[step]))
        found[step] = {}
        for method in chosen:
            ends = (module, a, b)
            if method.name != "naive":
                folds, key = method.kind.folds, Key("published", method.label)
                here = aligned(method, module, a, b, example, data.train, key, known.get(folds))
                known[folds], ends = here.symmetries, (here.module, here.a, here.b)
            limit = max_error if step == steps[-1] else 100.0
            found[step][method.name] = barrier(
                *(*ends, splits),
                classes=data.classes,
                max_error=limit,
                **how.keywords(data),
            )
    return found


def _architecture(folder: Path, data: Dataset) -> nn.Module:
    name = f"hf:{folder}"
    known = models.example_of(name)
    if known is None or len(known[0]) != 1 or data.text is None:
        raise BadParameter(f"checkpoints: {folder} is no language model, or {data.name} no text.")
    if data.text.vocabulary > known[1]:
        raise BadParameter(
            f"checkpoints: {data.name} has {data.text.vocabulary:,} tokens, {folder} only "
            f"{known[1]:,}. Take the network's own: tokenizer=FOLDER."
        )
    return models.build(name, data.in_shape, known[1], Key("published", "module"))


def _weights(module: nn.Module, folder: Path) -> Theta:
    done = fitted(module, read_weights(str(folder)).tensors, layout(module).ties)
    theta, _ = in_type_of(done.theta, module.state_dict())
    return check_theta(module, theta, str(folder))
