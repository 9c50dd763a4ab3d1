"""What a dataset's files are, found and paired by name, before any of them is decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from sidetask_datasets.columns import Column, Kind
from sidetask_datasets.files import DataError

# What a field's reader is called with for one sample: the path of its file first.
Item = tuple[Any, ...]


@dataclass(frozen=True)
class Field:
    """How one input or target of every sample is read.

    Args:
        kind: of the `Column` that it becomes.
        shape: of one sample as it is stored, without the dimension of samples.
        dtype: as it is stored, by numpy's name; one that the kind allows.
        read: ``read(*item)`` gives one sample of that shape and type, checked, and raises `DataError`, beginning with
            the path, for whatever is wrong with the file. Processes have to be able to import it by name, so it is a
            function of a module or a `functools.partial` of one.
        mean, std, scale: of the `Column`.
        limits: of depth or disparity, the values at the ends of the ramp that it is drawn in.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., NDArray[Any]]
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    scale: float = 0.001
    limits: tuple[float, float] = (0.0, 1.0)

    def column(self, data: Tensor) -> Column:
        """The column of all samples as they are stored, ``[N, *shape]``."""
        return Column(data, self.kind, self.mean, self.std, self.scale)


@dataclass(frozen=True)
class Source:
    """Files of a dataset that are known to be there and to belong together.

    Args:
        name: of the dataset.
        root: the folder, or file, that it was found in.
        fields: what every sample has.
        splits: for each split its samples; for each sample and field what `Field.read` takes.
        settings: options on which the stored values depend (size, classes, ...); anything JSON can say.
        version: of the rules by which files are read; raise it whenever these change.
        problems: what was found wrong with the tree, each beginning with a path.
    """

    name: str
    root: Path
    fields: Mapping[str, Field]
    splits: Mapping[str, Sequence[Mapping[str, Item]]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1
    problems: Sequence[str] = ()

    def only(self, *fields: str) -> Source:
        """The same samples with some of their fields."""
        return replace(self, fields={name: self.fields[name] for name in fields})

    @property
    def layout(self) -> dict[str, Any]:
        """What decides how values are stored, whatever the files hold."""
        fields = {name: [f.kind, list(f.shape), f.dtype, f.scale] for name, f in self.fields.items()}
        counts = {name: len(samples) for name, samples in self.splits.items()}
        layout = {"name": self.name, "version": self.version, "fields": fields, "splits": counts}
        # As it reads back, so that tuples and lists are one.
        result: dict[str, Any] = json.loads(json.dumps({**layout, "settings": dict(self.settings)}))
        return result

    def fingerprint(self, split: str, start: int, stop: int) -> str:
        """What tells the files of some samples from others, or from an earlier or later state of the same files.

        Names, sizes and times of change (of the content, which can be set back, and of the file, which cannot), not
        contents: reading those is what a cache is to save.

        Raises:
            DataError: if a file is not there or cannot be reached.
        """
        digest = hashlib.sha256()
        for sample in self.splits[split][start:stop]:
            for name in self.fields:
                digest.update(repr((name, [self._state(part) for part in sample[name]])).encode())
        return digest.hexdigest()

    def _state(self, part: Any) -> Any:
        """What tells a file from others, or from itself earlier or later; anything else is what it is."""
        if not isinstance(part, Path):
            return part
        try:
            about = part.stat()
        except OSError as error:
            raise DataError(f"{part}: {error.strerror or error}") from error
        place = part.relative_to(self.root) if part.is_relative_to(self.root) else part
        return place.as_posix(), about.st_size, about.st_mtime_ns, about.st_ctime_ns
