"""Arrays in PostgreSQL's binary format, as parameters for batches.

psycopg adapts a list slowly, in Python. A text array is faster, but PostgreSQL has to parse it. For a batch of 250
results, a binary array saves 1 ms of PostgreSQL's time and 0.5 ms of the worker's.

Only engines that were created after the import of this module accept binary arrays. `followups.database` creates the
service's engines, and therefore imports this module. A session that a caller passes to `followups.schedule` may have
another engine. A `Rule` therefore uses text arrays (`followups.store.leases.uuid_array`).

Format: https://github.com/postgres/postgres/blob/REL_18_STABLE/src/backend/utils/adt/arrayfuncs.c (array_recv)
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar, Self

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from psycopg.abc import AdaptContext

_HEADER = struct.Struct(">iiIii")
"""Number of dimensions, NULL flag, OID of the elements' type, number of elements, and lower bound."""
_BIGINT = struct.Struct(">iq")
_DOUBLE = struct.Struct(">id")
_UUID_LENGTH = struct.pack(">i", 16)
_NULL = struct.pack(">i", -1)


class _Array(bytes):
    """An array in PostgreSQL's binary format."""

    __slots__ = ()
    oid: ClassVar[int]
    """OID of the array's type (pg_type.dat)."""
    element: ClassVar[int]
    """OID of the elements' type."""

    @classmethod
    def of(cls, parts: Sequence[bytes]) -> Self:
        """Return the array of these elements, each with its length before it."""
        return cls(_HEADER.pack(1, 1, cls.element, len(parts), 1) + b"".join(parts))


class UuidArray(_Array):
    """A parameter of the type ``uuid[]``."""

    __slots__ = ()
    oid, element = 2951, 2950


class BigintArray(_Array):
    """A parameter of the type ``bigint[]``."""

    __slots__ = ()
    oid, element = 1016, 20


class DoubleArray(_Array):
    """A parameter of the type ``double precision[]``."""

    __slots__ = ()
    oid, element = 1022, 701


def uuids(values: Iterable[UUID | None]) -> UuidArray:
    """Return an array of ids, in which None becomes NULL."""
    return UuidArray.of([_UUID_LENGTH + one.int.to_bytes(16) if one else _NULL for one in values])


def bigints(values: Iterable[int]) -> BigintArray:
    """Return an array of whole numbers.

    Raises `struct.error` for a number outside the range of bigint.
    """
    return BigintArray.of([_BIGINT.pack(8, one) for one in values])


def doubles(values: Iterable[float]) -> DoubleArray:
    """Return an array of floating-point numbers."""
    return DoubleArray.of([_DOUBLE.pack(8, one) for one in values])


class _BinaryDumper(Dumper):
    """Returns an array unchanged, because it is already in PostgreSQL's binary format."""

    format = Format.BINARY

    def __init__(self, cls: type[_Array], context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        self.oid = cls.oid

    def dump(self, obj: bytes) -> bytes:
        return obj


psycopg.adapters.register_dumper(_Array, _BinaryDumper)
