"""Training with controlled SGD noise, and forks at step k (Frankle et al. 2020, Algorithm 1).

A :class:`Recipe` says how, a :class:`Run` which randomness, a :class:`Fork` from where, and a
:class:`Job` which states are wanted; :func:`train` makes them exist in the run store, many at
once, and :func:`load_weights` hands them out. Used in every chapter; explained in chapter 1.
"""

from companion.training.engine import entry_of, load_state, load_weights, made_by, train, train_one
from companion.training.engines import ENGINES, using
from companion.training.loop import State, advance, build, check_fit, make_optimizer, pruned
from companion.training.masking import load_mask, mask_entry, write_mask
from companion.training.recipe import (
    SEMANTICS,
    Fork,
    Job,
    MaskRecipe,
    Recipe,
    Run,
    lineage,
    merge_jobs,
    recipe_from,
)
from companion.training.replicas import advance_many
from companion.training.speed import Throughput, throughput

__all__ = [
    "ENGINES",
    "SEMANTICS",
    "Fork",
    "Job",
    "MaskRecipe",
    "Recipe",
    "Run",
    "State",
    "Throughput",
    "advance",
    "advance_many",
    "build",
    "check_fit",
    "entry_of",
    "lineage",
    "load_mask",
    "load_state",
    "load_weights",
    "made_by",
    "make_optimizer",
    "mask_entry",
    "merge_jobs",
    "pruned",
    "recipe_from",
    "throughput",
    "train",
    "train_one",
    "using",
    "write_mask",
]
