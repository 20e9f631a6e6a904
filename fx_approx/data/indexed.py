"""A data set that says with each example which one it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset


class Indexed(Dataset[Any]):
    """Another data set with the number of each example added, so that its loss and its weight can be found.

    A dict gets the key ``index``; a tuple or list one more entry at its end; anything else becomes a pair.
    """

    def __init__(self, dataset: Any, key: str = "index") -> None:
        """Wraps ``dataset``.

        Args:
            dataset: Map-style: it has a length and gives an example for each number.
            key: Under which a dict gets the number.

        Raises:
            TypeError: ``dataset`` has no length or gives no examples by number.
        """
        numbered = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not numbered or isinstance(dataset, IterableDataset):
            raise TypeError(f"dataset: expected one with a length and numbered examples, got {type(dataset).__name__}")
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        example = self.dataset[index]
        if isinstance(example, Mapping):
            if self.key in example:
                raise ValueError(f"key: the examples have a {self.key!r} of their own; choose another name")
            return {**example, self.key: index}
        if isinstance(example, (tuple, list)):
            return (*example, index)
        return example, index
