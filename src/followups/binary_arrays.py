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
from typing import TYPE_CHECKING, ClassVar

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

_HEADER = struct.Struct(">iiIii")
"""Number of dimensions, NULL flag, OID of the elements' type, number of elements, and lower bound."""
_BIGINT = struct.Struct(">iq")
_DOUBLE = struct.Struct(">id")
_UUID_LENGTH = struct.pack(">i", 16)
_NULL = struct.pack(">i", -1)


class UuidArray(bytes):
    """A parameter of the type ``uuid[]``."""

    __slots__ = ()


class BigintArray(bytes):
    """A parameter of the type ``bigint[]``."""

    __slots__ = ()


class DoubleArray(bytes):
    """A parameter of the type ``double precision[]``."""

    __slots__ = ()


def uuids(values: Iterable[UUID | None]) -> UuidArray:
    """Return an array of ids, in which None becomes NULL."""
    parts = [_UUID_LENGTH + one.int.to_bytes(16) if one else _NULL for one in values]
    return UuidArray(_HEADER.pack(1, 1, _Uuids.element, len(parts), 1) + b"".join(parts))


def bigints(values: Iterable[int]) -> BigintArray:
    """Return an array of whole numbers.

    Raises `struct.error` for a number outside the range of bigint.
    """
    parts = [_BIGINT.pack(8, one) for one in values]
    return BigintArray(_HEADER.pack(1, 0, _Bigints.element, len(parts), 1) + b"".join(parts))


def doubles(values: Iterable[float]) -> DoubleArray:
    """Return an array of floating-point numbers."""
    parts = [_DOUBLE.pack(8, one) for one in values]
    return DoubleArray(_HEADER.pack(1, 0, _Doubles.element, len(parts), 1) + b"".join(parts))


class _BinaryDumper(Dumper):
    """Returns a value unchanged, because it is already in PostgreSQL's binary format."""

    format = Format.BINARY
    element: ClassVar[int]
    """OID of the elements' type (pg_type.dat)."""

    def dump(self, obj: bytes) -> bytes:
        return obj


class _Uuids(_BinaryDumper):
    oid, element = 2951, 2950


class _Bigints(_BinaryDumper):
    oid, element = 1016, 20


class _Doubles(_BinaryDumper):
    oid, element = 1022, 701


for _kind, _dumper in ((UuidArray, _Uuids), (BigintArray, _Bigints), (DoubleArray, _Doubles)):
    psycopg.adapters.register_dumper(_kind, _dumper)
