"""Batches with named axes: what every array of a batch is, and its way to the mesh.

A loop declares a :class:`Field` for each array. The axes say which dimension counts rows of the
batch, which counts places of a sequence, and which are neither (None): sharding, accumulation and
the check of what a data source gives read nothing else. Arrays may have rows of their own number
(a pack of pictures beside a text): each is cut into the same number of equal parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from step_jax.core.errors import ConfigError, DataError

ROWS = "batch"


@dataclass(frozen=True)
class Field:
    """One array of a batch.

    Attributes:
      axes: a logical name for every dimension (``batch``: rows; ``sequence``: places of a text;
        see ``core.sharding``), None for one that no device cuts.
      shape: of the whole batch, over all processes.
      dtype: NumPy's name of it.
    """

    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.axes) != len(self.shape) or self.axes.count(ROWS) > 1:
            raise ValueError(f"axes {self.axes} do not name the dimensions of shape {self.shape}")

    @property
    def row_axis(self) -> int | None:
        """The dimension that counts rows; None for an array that every row shares."""
        return self.axes.index(ROWS) if ROWS in self.axes else None

    def part(self, count: int) -> tuple[int, ...]:
        """The shape of one of ``count`` equal parts of the rows.

        Raises:
          ConfigError: they do not divide.
        """
        axis = self.row_axis
        if axis is None:
            return self.shape
        if self.shape[axis] % count:
            raise ConfigError(
                f"{self.shape[axis]} rows do not divide into {count} equal parts: make them a "
                f"multiple of {count}"
            )
        return (*self.shape[:axis], self.shape[axis] // count, *self.shape[axis + 1 :])


Schema = Mapping[str, Field]


def schema_like(batch: Mapping[str, Any], axes: Mapping[str, tuple[str | None, ...]]) -> Schema:
    """The schema of a batch made on the devices, from its (abstract) arrays and their axes."""
    return {name: Field(axes[name], a.shape, np.dtype(a.dtype).name) for name, a in batch.items()}


def check(schema: Schema, batch: Mapping[str, Any], parts: int = 1) -> None:
    """Compares one of ``parts`` equal parts of a batch with its schema.

    Raises:
      DataError: arrays are missing or too many, or one has another shape or dtype; it says which
        array, what the schema asks for and what was found.
    """
    problems = [f"{name} is missing" for name in schema if name not in batch]
    problems += [f"{name} is not in the schema" for name in batch if name not in schema]
    for name, field in schema.items():
        found = batch.get(name)
        if found is None:
            continue
        expected = (field.part(parts), np.dtype(field.dtype).name)
        if (tuple(found.shape), np.dtype(found.dtype).name) != expected:
            problems.append(
                f"{name} has shape {tuple(found.shape)} and dtype {found.dtype}, expected "
                f"{expected[0]} ({', '.join(map(str, field.axes))}) and {expected[1]}"
            )
    if problems:
        raise DataError(f"the batch breaks its schema: {'; '.join(problems)}")
