"""Algorithm 1 in one call: from which step on do two copies stay connected?

What the README and the page "Use it on your own networks" import; the code is in
:mod:`companion.experiments.instability`.
"""

from companion.experiments.instability import Instability, analyse

__all__ = ["Instability", "analyse"]
