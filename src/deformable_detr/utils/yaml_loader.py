"""Read YAML of any origin: a few lines of aliases and merges could fill the memory."""

import os
from pathlib import Path
from typing import Any

import yaml

from .files import open_regular

MAX_BYTES, MAX_VALUES = 10 * 2**20, 50_000


class BoundedLoader(yaml.SafeLoader):
    """Refuse more than `MAX_VALUES` values, counted as often as aliases repeat them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._composed = 0
        self._sizes: dict[int, int] = {}  # number of values in each complete node, by its id: all nodes stay alive

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as PyYAML does, and count its values."""
        is_alias = self.check_event(yaml.AliasEvent)
        self._composed += 1
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias stands for a value that contains it")
        children = node.value if isinstance(node, yaml.CollectionNode) and not is_alias else ()
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        size = self._sizes.setdefault(id(node), 1 + sum(self._sizes[id(part)] for part in parts))
        if max(size, self._composed) > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES} values, counted as often as aliases repeat them")
        return node


def load_yaml(text: str, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """Return the value of a YAML text. Raises ValueError, with one line, if it is not valid or too large."""
    try:
        return yaml.load(text, loader)
    except Exception as error:  # constructors raise any for texts that do not fit their tags
        raise ValueError(" ".join((str(error) or type(error).__name__).split())[:300]) from None


def read_yaml(path: Path, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """Return the value of a YAML file. Raises ValueError as `load_yaml` does, and OSError if it cannot be read."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise ValueError(f"it has {size >> 20} MiB, too many for settings")
        return load_yaml(file.read().decode("utf-8-sig"), loader)
