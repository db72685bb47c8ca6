"""Instruments for linear mode connectivity, and the substrate of the book that uses them.

Start with :mod:`companion.connectivity` (is the straight line between two networks low?) and
:mod:`companion.experiments.instability` (from which step on do two copies stay connected?). Every
instrument takes an ``nn.Module``, state dicts and a data split; none of them knows a chapter.
"""

__version__ = "0.1.0"
