"""The store of records: appended whole, read back, locked by one writer, and never mixed with other settings."""

import json
import os
import signal
import subprocess
import sys

import pytest

from carv.runs.store import RecordStore

from toy_cells import cell, fill, record


def test_records_come_back_as_they_went_in_and_kinds_are_told_apart(tmp_path):
    given = [record("a", x=0.1 + 0.2), record("b", y="\u2028 \n"), {"kind": "cost", "hash": "a", "seconds": 1e-300}]
    store = fill(tmp_path / "new" / "folder", *given)
    assert store.records() == given
    assert store.hashes() == {"a", "b"}
    assert store.hashes("cost") == {"a"}
    with RecordStore(store.path.parent) as again:
        again.append(record("c"))
        assert again.hashes() == {"a", "b", "c"}
    assert store.records()[:3] == given
    assert RecordStore(tmp_path / "none").records() == []
    assert not (tmp_path / "none").exists()


def test_a_file_cut_at_any_byte_keeps_exactly_the_whole_records_and_can_be_completed(tmp_path):
    """Exhaustive over the bytes, with a line break and a non-ASCII letter inside a record."""
    given = [record("a", x=1.5), record("b", text="\n\u00e9"), record("c", nested={"y": [1, None]})]
    whole = fill(tmp_path / "whole", *given).path.read_bytes()
    path = tmp_path / "cut" / "records.jsonl"
    path.parent.mkdir()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept, said = whole[:size].count(b"\n"), []
        assert RecordStore(path.parent).records() == given[:kept]
        assert path.stat().st_size == size  # reading changes nothing
        with RecordStore(path.parent, said.append) as store:
            assert store.records() == given[:kept]
            assert len(said) == (size > 0 and whole[size - 1 : size] != b"\n")
            for one in given:
                if one["hash"] not in store.hashes():
                    store.append(one)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("end", [b"\x00\x00\x00", b"\x00\x00\n", b'{"kind": "ce\n', b"\xff\xfe\n"])
def test_a_last_line_that_is_no_json_is_torn_too_and_is_told_once(tmp_path, end):
    path = fill(tmp_path, record("a")).path
    before = path.read_bytes()
    path.write_bytes(before + end)
    said = []
    assert [one["hash"] for one in RecordStore(tmp_path).records()] == ["a"]
    with RecordStore(tmp_path, said.append):
        pass
    with RecordStore(tmp_path, said.append):
        pass
    assert path.read_bytes() == before
    assert len(said) == 1
    assert f"{len(end)} bytes" in said[0]


@pytest.mark.parametrize(
    "line", [b'{"kind": "cell"', b"", b"[1]", b'{"kind": "cell"}', b'{"kind":"c","hash":"h","x":NaN}']
)
def test_a_damaged_line_before_the_last_is_an_error_with_its_number(tmp_path, line):
    path = fill(tmp_path, record("a"), record("b")).path
    first, second = path.read_bytes().splitlines()
    damaged = b"\n".join([first, line, second, b""])
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2, is damaged"):
        RecordStore(tmp_path).records()
    with pytest.raises(ValueError, match="line 2"), RecordStore(tmp_path):
        pass
    assert path.read_bytes() == damaged
    path.write_bytes(first + b"\n" + line + b"\n{")  # one write cannot tear two lines
    with pytest.raises(ValueError, match="line 2"):
        RecordStore(tmp_path).records()
    path.write_bytes(first + b"\n")
    with RecordStore(tmp_path) as store:  # the error has given the lock back
        assert store.hashes() == {"a"}


def test_a_last_line_that_is_json_but_no_record_is_not_thrown_away(tmp_path):
    path = fill(tmp_path, record("a")).path
    path.write_bytes(path.read_bytes() + b'{"somebody": "else"}\n')
    with pytest.raises(ValueError, match="line 2"), RecordStore(tmp_path):
        pass


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path):
    with RecordStore(tmp_path) as first:
        first.append(record("a"))
        # Also after the file was read and closed in this process, which would end a lock of the other kind.
        assert RecordStore(tmp_path).hashes() == {"a"}
        with pytest.raises(ValueError, match="another process is writing to"), RecordStore(tmp_path):
            pass
        code = "import sys; from pathlib import Path; from carv.runs.store import RecordStore\n"
        code += "with RecordStore(Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "another process is writing to" in done.stderr
        with pytest.raises(ValueError, match="already open"), first:
            pass
    with RecordStore(tmp_path) as second:
        assert second.hashes() == {"a"}


def test_a_store_that_is_not_open_or_a_thing_that_is_no_record_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not open for writing"):
        RecordStore(tmp_path).append(record("a"))
    with RecordStore(tmp_path) as store:
        for wrong in ({"kind": "cell"}, {"hash": "a"}, record("a", x=float("nan")), record("a", x={1, 2})):
            with pytest.raises(ValueError, match="this is no record"):
                store.append(wrong)
    assert store.path.read_bytes() == b""


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    store = fill(tmp_path, record("a"))
    before, write = store.path.read_bytes(), os.write

    def half(file, line):
        if len(line) < 20:
            raise OSError(28, "No space left on device")
        return write(file, line[: len(line) // 2])

    with RecordStore(tmp_path) as store:
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            store.append(record("b" * 40))
        monkeypatch.undo()
        assert store.path.read_bytes() == before
        assert store.hashes() == {"a"}
        store.append(record("c"))
    assert store.hashes() == {"a", "c"}


def test_a_record_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    with RecordStore(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
        store.append(record("a"))
        assert synced == [store.path.stat().st_size]


def test_a_writer_that_is_killed_leaves_whole_records_and_no_lock(tmp_path):
    """kill -9 in the middle of writing, twice into one file."""
    code = """if True:
        import sys
        from pathlib import Path
        from carv.runs.store import RecordStore
        with RecordStore(Path(sys.argv[1])) as store:
            for i in range(len(store.records()), 10**9):
                store.append({"kind": "cell", "hash": str(i), "ballast": "x" * 20000})
                print(i, flush=True)"""
    last = -1
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            for _ in range(20):
                last = int(process.stdout.readline())
            os.kill(process.pid, signal.SIGKILL)
            last = max([last, *(int(line) for line in process.stdout if line.endswith("\n"))])
        with RecordStore(tmp_path) as store:
            found = [int(one["hash"]) for one in store.records()]
            assert found == list(range(len(found)))
            assert len(found) in (last + 1, last + 2)  # what was announced is there, and at most one more


def compatible(tmp_path, **changes):
    """A store with one toy record, against a planned one with changes at dotted names."""
    stored = {
        "cell": cell().to_dict(),
        "fingerprint": {"module": "abc"},
        "provenance": {"carv": "1", "source": "s", "torch": "2", "device": "cpu (x)", "threads": 1},
    }
    planned = json.loads(json.dumps(stored))
    for name, value in changes.items():
        *path, last = name.split("__")
        part = planned
        for key in path:
            part = part[key]
        if value is None:
            del part[last]
        else:
            part[last] = value
    return fill(tmp_path, record("a", **stored)), planned


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("provenance__source", "t", "source is 's' there and 't' here"),
        ("provenance__carv", "2", "carv is '1' there and '2' here"),
        ("provenance__torch", "3", "torch is '2' there and '3' here"),
        ("provenance__device", "cuda (y)", r"device is 'cpu \(x\)' there and 'cuda \(y\)' here"),
        ("cell__problem__t_min", 5, r"problem\.t_min is 20 there and 5 here"),
        ("cell__problem__steps", 5, r"problem\.steps is None there and 5 here"),
        ("cell__problem__t_max", None, r"problem\.t_max is 980 there and None here"),
        ("fingerprint__module", "abd", r"fingerprint\.module is 'abc' there and 'abd' here"),
        ("fingerprint__module", None, r"fingerprint\.module is 'abc' there and None here"),
        ("cell__seed", 3, "seed is 0 there and 3 here"),
        ("cell__stop__cap", 200, r"stop\.cap is 120 there and 200 here"),
    ],
)
def test_records_that_were_made_differently_are_refused_by_name(tmp_path, name, value, words):
    store, planned = compatible(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=words + r"\. Use another folder.*mix=True.*--mix"):
        store.check_compatible([planned])
    with pytest.raises(ValueError, match=words):
        store.check_compatible([compatible(tmp_path / "other")[1], planned])
    store.check_compatible([planned], mix=True)
    with pytest.raises(ValueError, match="made differently"):
        RecordStore(tmp_path / "empty").check_compatible([compatible(tmp_path / "third")[1], planned])


def test_what_does_not_matter_or_is_not_known_yet_is_no_difference(tmp_path):
    for i, changes in enumerate(
        [
            {},
            {"provenance__threads": 8},
            {"cell__design__renders": 4},
            {"provenance__device": None},
            {"fingerprint": None},
        ]
    ):
        store, planned = compatible(tmp_path / str(i), **changes)
        store.check_compatible([planned])
        store.check_compatible([{"kind": "cost", "hash": "h"}])
