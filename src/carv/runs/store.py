"""Records on disk: one line of JSON each, appended, never changed.

A record is whole once its newline is on the disk. A process that dies while it writes leaves at most one torn last
line, which the next writer cuts off.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

RECORDS = "records.jsonl"

Record: TypeAlias = dict[str, Any]


class RecordStore:
    """The records of one folder. Reading needs nothing; writing needs the store to be open, by one writer at a time:

        with RecordStore(folder) as store:
            store.append(record)

    Opening it makes the folder, takes a lock that ends with the process, and cuts off a torn last line.

    Args:
        folder: holds `records.jsonl`.
        say: told what was cut off.

    Raises:
        ValueError: from `with`, another writer.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.path = Path(folder) / RECORDS
        self._say = say or (lambda line: None)
        self._file: int | None = None
        self._kept: list[Record] = []

    def __enter__(self) -> RecordStore:
        if self._file is not None:
            raise ValueError(f"{self.path} is already open for writing")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock(file)
            _sync_folder(self.path.parent)
            data = self.path.read_bytes()
            self._kept, end = _parse(data, self.path)
            if end < len(data):
                os.ftruncate(file, end)
                os.fsync(file)
                self._say(f"{self.path}: the last line was torn ({len(data) - end} bytes); it is cut off and redone")
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file, self._kept = None, []

    def records(self, kind: str | None = None) -> list[Record]:
        """All whole records, in the order in which they were written.

        Args:
            kind: only those of one kind, e.g. "cell".

        Raises:
            ValueError: a damaged line that is not the last one, by its number.
        """
        if self._file is not None:
            found = self._kept
        else:
            found = _parse(self.path.read_bytes(), self.path)[0] if self.path.exists() else []
        return [record for record in found if kind in (None, record["kind"])]

    def hashes(self, kind: str = "cell") -> set[str]:
        """The hashes of all records of one kind."""
        return {record["hash"] for record in self.records(kind)}

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record; when this returns, it is on the disk.

        Raises:
            ValueError: a store that is not open; a record without a kind or a hash, or that JSON cannot hold.
            OSError: a full disk; the file is left as it was.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is not open for writing: use `with RecordStore(folder) as store`")
        try:
            line = json.dumps(record, allow_nan=False)
            kept = _record(line)
        except (TypeError, ValueError) as error:
            raise ValueError(f"this is no record: {error}") from error
        _write(self._file, line.encode() + b"\n")
        self._kept.append(kept)

    def check_compatible(self, planned: Iterable[Mapping[str, Any]], mix: bool = False) -> None:
        """Refuses to put records side by side that were not made alike.

        Compared are carv's version and source, torch's version, the device, the problem's settings and fingerprint,
        the seed and the stop rule, each where both sides have it.

        Args:
            planned: records that are to be added, or parts of them ("cell", "provenance", "fingerprint").
            mix: allow it.

        Raises:
            ValueError: what differs, and both values.
        """
        if mix:
            return
        known: list[dict[str, Any]] = []
        for record in self.records():
            if (there := _context(record)) not in known:
                known.append(there)
        for new in planned:
            here = _context(new)
            found = next((text for text in (_differences(there, here) for there in known) if text), None)
            if found is not None:
                raise ValueError(
                    f"{self.path} holds records that were made differently: {'; '.join(found)}. Use another folder, or "
                    "put them side by side knowingly: mix=True, on the command line --mix"
                )
            if here not in known:
                known.append(here)

    def _lock(self, file: int) -> None:
        import fcntl  # not on Windows, where records can still be read

        try:
            # flock, not lockf: a lockf lock ends as soon as this process closes any handle of the file.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing to {self.path}: wait for it to end, or use another folder"
            ) from error
        except OSError:
            self._say(f"{self.path}: this file system has no locks; make sure that only one process writes here")


def _parse(data: bytes, path: Path) -> tuple[list[Record], int]:
    """The whole records, and where they end."""
    *lines, tail = data.split(b"\n")
    records, end = [], 0
    for number, line in enumerate(lines, 1):
        try:
            records.append(_record(line.decode()))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not tail and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                break  # torn too: a newline reached the disk, but not all that was before it
            raise ValueError(
                f"{path}, line {number}, is damaged ({error}); mend it, or delete it and its record is made again"
            ) from error
        end += len(line) + 1
    return records, end


def _record(line: str) -> Record:
    found = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("kind", "hash")):
        raise ValueError('a record is a JSON object with a "kind" and a "hash"')
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _write(file: int, line: bytes) -> None:
    """All of it or nothing: without the rest, the next record would be glued to a torn one."""
    before = os.fstat(file).st_size
    try:
        while line:
            line = line[os.write(file, line) :]
        os.fsync(file)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, before)
        raise


def _sync_folder(folder: Path) -> None:
    """So that a new file's name survives a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _context(record: Mapping[str, Any]) -> dict[str, Any]:
    """What has to agree between records that are compared with each other, as far as this one says it."""
    found: dict[str, Any] = {}
    for part, names in (("provenance", ("carv", "source", "torch", "device")), ("cell", ("problem", "seed", "stop"))):
        known = record.get(part)
        if isinstance(known, Mapping):
            found |= {name: known[name] for name in names if name in known}
    if "fingerprint" in record:
        found["fingerprint"] = record["fingerprint"]
    return found


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {old!r} there and {new!r} here"
        for shared in here
        if shared in there
        for name, old, new in _leaves(shared, there[shared], here[shared])
        if old != new
    ]


def _leaves(name: str, there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys([*there, *here]):
            yield f"{name}.{key}", there.get(key), here.get(key)
    else:
        yield name, there, here
