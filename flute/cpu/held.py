"""Parameters whose addresses the library was given: whether they are still the same."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import chain

from torch import Tensor

from flute.constant import Constant
from flute.cpu import library


class Held:
    """Parameters as they were, whose memory it keeps alive.

    Args:
        parameters: by name, of each of some modules.
    """

    def __init__(self, parameters: Iterable[dict[str, Tensor | None]]) -> None:
        self._moves, self._environment = Constant.moves, library.environment()
        self._parameters = tuple(chain.from_iterable(map(dict.values, parameters)))
        self._dense = [p for p in self._parameters if p is not None and not isinstance(p, Constant)]
        self._dense_at = [tensor.data_ptr() for tensor in self._dense]
        self._kept = [tensor.detach() for tensor in self._dense]

    def are(
        self, parameters: Iterable[dict[str, Tensor | None]], environment: library.Environment
    ) -> bool:
        """Tell whether these are the same parameters, in the same memory and environment.

        Why so: calls that stay in C; a block's weights have just gone through the caches when
        Python runs, so that each of its instructions takes several times as long as else.

        Args:
            parameters: by name, of the same modules in turn, as they are now.
            environment: as it is now.
        """
        now = chain.from_iterable(map(dict.values, parameters))
        return (
            Constant.moves == self._moves
            and all(map(operator.is_, now, self._parameters))
            and list(map(Tensor.data_ptr, self._dense)) == self._dense_at
            and environment == self._environment
        )
