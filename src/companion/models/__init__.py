"""The papers' networks by name, with width and norm as options, and the user's own beside them.

>>> build("resnet20:width=8,norm=group", (3, 32, 32), 10, Key("init", 1))
"""

from companion.models.layers import ChannelLayerNorm, PadShortcut, first_dropout, parameter_count
from companion.models.own import example_of, is_own, source_digest
from companion.models.spec import (
    build,
    canonical,
    describe,
    has_dropout,
    in_words,
    may_have_batchnorm,
    names,
    takes,
    title,
)

__all__ = [
    "ChannelLayerNorm",
    "PadShortcut",
    "build",
    "canonical",
    "describe",
    "example_of",
    "first_dropout",
    "has_dropout",
    "in_words",
    "is_own",
    "may_have_batchnorm",
    "names",
    "parameter_count",
    "source_digest",
    "takes",
    "title",
]
