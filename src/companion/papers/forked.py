"""What the studies of forked copies share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion.training import Recipe


class Forked:
    """Copies of ``recipe``'s network that fork at ``ks``, sorted."""

    if TYPE_CHECKING:

        @property
        def recipe(self) -> Recipe: ...
        @property
        def ks(self) -> tuple[int, ...]: ...

    @property
    def steps(self) -> int:
        """T."""
        return self.recipe.steps

    @property
    def first(self) -> int:
        """The smallest fork step."""
        return self.ks[0]

    @property
    def last(self) -> int:
        """The largest fork step."""
        return self.ks[-1]
