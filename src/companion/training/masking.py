"""Masks of the run store: made once, by the rule that names them, read by all runs under them."""

from __future__ import annotations

import logging

import torch

from companion import data as datasets
from companion.core import closing
from companion.core.errors import CorruptData, CorruptEntry
from companion.core.masks import Mask, pack, unpack
from companion.core.runs import Entry, Store
from companion.training.recipe import MaskRecipe

log = logging.getLogger("companion")

_FILE = "mask.safetensors"


def mask_entry(mask: MaskRecipe, store: Store, device: str | torch.device) -> Entry:
    """The store's entry of ``mask``."""
    where = str(datasets.resolve_device(device))
    data = datasets.load(mask.jobs()[0].run.recipe.data, where)
    return store.entry(mask.identity(data.fingerprint, torch.device(where).type))


def load_mask(
    mask: MaskRecipe, *, store: Store | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """The mask, on the CPU: read if it is stored, else made, and the runs it needs trained.

    Returns:
        name in the state dict -> boolean tensor, True where the weight is kept.

    Raises:
        as :func:`companion.training.train`; BadParameter: what its rule refuses.
    """
    closing.refuse_work(what="a mask")
    store = store or Store()
    entry = mask_entry(mask, store, device)
    with entry.lock():
        try:
            if _FILE in entry:
                return unpack(entry.read_tensors(_FILE))
        except (CorruptEntry, CorruptData) as e:
            log.warning("%s; it is discarded and made again", e)
            entry.discard()
        data = datasets.load(mask.jobs()[0].run.recipe.data, datasets.resolve_device(device))
        made = dict(mask.make(data, store))
        write_mask(entry, made)
        return made


def write_mask(entry: Entry, mask: Mask) -> None:
    """Store a mask in its entry, one bit a weight."""
    entry.write_tensors(_FILE, pack(mask))
