"""Indexes of many clips: tables, packed rows, facts in files of lines, where tensors are."""

import json

import pytest

from gen_accel.lora.caching import index
from gen_accel.lora.caching.index import MISSING, Again, Homes, Memo, Packed, Table


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 5000])
def test_a_table_is_a_dict_of_numbers(count):
    table, known = Table(), {}
    for i in range(count):
        name = f"{i * 7919 % 3001}"
        table[name] = known[name] = i
    assert len(table) == len(known)
    for i in range(3001):
        name = f"{i}"
        assert table.get(name) == known.get(name, MISSING)
        assert (name in table) == (name in known)
    names = [f"{i}" for i in range(3001)]
    assert table.find(names).tolist() == [known.get(name, MISSING) for name in names]


def test_a_table_of_hashes_that_end_in_zeros(monkeypatch):
    """Which numpy leaves out of what it gives back."""
    names = {"a": b"x" * 15 + b"\0", "b": b"x" * 14 + b"\0\0", "c": bytes(16), "d": b"x" * 16}
    monkeypatch.setattr(index, "_name", names.__getitem__)
    table = Table()
    for number, name in enumerate("abc"):
        table[name] = number
    assert table.find([*"abcd"]).tolist() == [0, 1, 2, MISSING]
    assert [table.get(name) for name in "abcd"] == [0, 1, 2, MISSING]


def test_a_table_as_a_set():
    table = Table()
    assert [table.add(name) for name in "abab"] == [True, True, False, False]
    assert len(table) == 2


@pytest.mark.parametrize("count", [0, 255, 256, 700])
def test_packed_rows_come_back_as_they_were(count):
    rows = [(i, f"größer {i}", (1, None, ("a",)), {"x": [i, 0.1]}) for i in range(count)]
    packed = Packed(lambda row: row)
    for row in rows:
        packed.append(row)
    assert list(packed) == list(packed) == rows
    assert len(packed) == count
    assert packed[3:300:50] == tuple(rows[3:300:50])
    for place in range(-count, count, 97):
        assert packed[place] == rows[place]
    with pytest.raises(IndexError, match=f"rows are {count}"):
        packed[count]


def test_packed_rows_take_little_memory():
    packed = Packed(lambda row: row)
    for i in range(2560):
        packed.append((i, "a" * 64, "b" * 64, (480, 832)))
    assert sum(map(len, packed._parts)) < 20 * 2560


def test_what_is_made_again_each_time():
    made = Again(lambda: iter([1, 2]))
    assert list(made) == list(made) == [1, 2]


def test_homes_of_tensors():
    homes = Homes()
    homes.add("one", ["a.latents", "b.text", "b.mask"])
    homes.add("two", ["c.text", "b.image"])
    assert homes["a"] == {"latents": "one"}
    assert homes["b"] == {"text": "one", "mask": "one", "image": "two"}
    assert "d" not in homes
    assert homes.missing(["a", "d", "c", "e"]) == [1, 3]
    assert homes.shards(["a", "e"]) == {"one"}
    assert homes.shards(["b"]) == {"one", "two"}
    with pytest.raises(KeyError):
        homes["d"]


class TestMemo:
    def test_facts_are_there_in_the_next_run(self, tmp_path):
        memo = Memo(tmp_path / "memo")
        memo.put("a", {"frames": 3})
        memo.put("ä\udcff", None)
        memo.put("a", [1])
        assert memo.get("a") == [1]
        memo.flush()
        memo.put("b", "x")
        memo.flush()
        assert [memo.get(key) for key in "abc"] == [[1], "x", None]
        again = Memo(tmp_path / "memo")
        assert [again.get(key) for key in "abc"] == [[1], "x", None]
        again.put("a", 2)
        again.flush()
        assert Memo(tmp_path / "memo").get("a") == 2

    def test_a_known_fact_is_not_written_again(self, tmp_path):
        memo = Memo(tmp_path / "memo")
        memo.put("a", {"frames": 3})
        memo.flush()
        before = (tmp_path / "memo").read_bytes()
        memo.put("a", {"frames": 3})
        memo.flush()
        assert (tmp_path / "memo").read_bytes() == before

    @pytest.mark.parametrize("tail", [b'["b", 1', b"\xff\n", b"[1]\n", b"[" * 5000 + b"\n"])
    def test_a_line_that_is_not_whole_is_passed_over(self, tmp_path, tail):
        path = tmp_path / "memo"
        memo = Memo(path)
        memo.put("a", 1)
        memo.flush()
        path.write_bytes(path.read_bytes() + tail)
        memo = Memo(path)
        assert (memo.get("a"), memo.get("b")) == (1, None)
        memo.put("c", 3)
        memo.flush()
        again = Memo(path)
        assert [again.get(key) for key in "abc"] == [1, None, 3]

    def test_facts_are_written_while_a_run_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr(index, "SECONDS_TOGETHER", 0.0)
        memo = Memo(tmp_path / "memo")
        memo.put("a", 1)
        assert Memo(tmp_path / "memo").get("a") == 1

    def test_another_run_that_writes_the_file_anew(self, tmp_path):
        """Where folders cannot be locked: nothing comes back under another key."""
        path = tmp_path / "memo"
        for key in "abc":
            memo = Memo(path)
            memo.put(key, key)
            memo.flush()
        other = Memo(path)
        path.write_text(json.dumps(["c", "c"]) + "\n")
        held = [other.get(key) for key in "abc"]
        assert all(found in (key, None) for found, key in zip(held, "abc", strict=True))

    def test_what_nobody_asks_for_is_left_out(self, tmp_path):
        path = tmp_path / "memo"
        memo = Memo(path)
        for i in range(3000):
            memo.put(f"{i}", i)
        memo.shrink()
        assert len(path.read_bytes().splitlines()) == 3000
        memo = Memo(path)
        assert [memo.get(f"{i}") for i in range(10)] == list(range(10))
        memo.put("new", 1)
        memo.put("3", "other")
        memo.shrink()
        assert len(path.read_bytes().splitlines()) == 11
        for found in (memo, Memo(path)):
            assert [found.get(f"{i}") for i in (0, 3, 9, 10)] == [0, "other", 9, None]
            assert found.get("new") == 1
