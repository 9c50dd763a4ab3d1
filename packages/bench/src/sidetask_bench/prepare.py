"""Checking and decoding a data set's files before the first training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidetask_core import plugins

from sidetask_bench.assemble import blaming
from sidetask_bench.schema import ExperimentError, first_line


@dataclass(frozen=True)
class Prepared:
    """What is in the cache.

    Args:
        folder: of the data set's arrays.
        samples: number of them in each split of the files.
        bytes: of one sample, field by field, at rest.
    """

    folder: Path
    samples: Mapping[str, int]
    bytes: Mapping[str, int]


def prepare(
    dataset: str, root: Path, options: Mapping[str, Any], *, jobs: int | None = None, cache: Path | None = None
) -> Prepared:
    """Check every file of a data set and decode it, or find that it has been done.

    Args:
        dataset: name of one that is read from files.
        root: where they are.
        options: of the data set, as in an experiment.
        jobs: processes that decode, see `sidetask_datasets.cache.prepare`.
        cache: where caches are kept.

    Raises:
        ExperimentError: for an unknown data set or option, or one that has no files, or a cache that cannot be
            written.
        DataErrors: naming every file that something is wrong with.
    """
    from sidetask_datasets import DataError, DataErrors
    from sidetask_datasets.adapter import find_source
    from sidetask_datasets.cache import cache_folder
    from sidetask_datasets.cache import prepare as decode

    with blaming("dataset", dataset):
        factory = plugins.find("datasets", dataset)
    if "root" in options:
        raise ExperimentError("the root of the files is the second argument, not an option")
    try:
        source = find_source(factory, root, options)
        try:
            found = decode(source, cache, jobs=jobs)
        except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
            raise ExperimentError(f"cache {cache_folder(cache)}: cannot be written: {first_line(error)}") from error
    except DataErrors:
        raise
    except DataError as error:
        raise DataErrors([str(error)]) from error
    except (ValueError, TypeError) as error:
        raise ExperimentError(f"dataset {dataset!r}: {error}") from error
    samples = {split: len(rows) for split, rows in source.splits.items()}
    arrays = next(iter(found.arrays.values()))
    return Prepared(found.folder, samples, {name: array[:1].nbytes for name, array in arrays.items()})
