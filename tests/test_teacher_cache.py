"""The teacher's features on disk: a hit gives the same bits, and neither damage, kills nor others' files give wrong ones."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from dinov2 import save_dinov2
from hypothesis import given
from hypothesis import strategies as st

from copernicus.models.teacher import DinoTeacher, load_teacher
from copernicus.platform.schema import Distill
from copernicus.platform.teacher_cache import CachedTeacher, FeatureStore, open_teacher

DIM = 5


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(DIM).astype(np.float32)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.features"))


@given(
    keys=st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=20),
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=DIM, max_size=DIM),
    cuts=st.lists(st.integers(0, 20), max_size=3),
)
def test_what_was_put_is_found_bit_by_bit(tmp_path_factory, keys, bits, cuts):
    """Any keys (equal first halves and trailing zeros among them), any bits (NaN too), in any batches; before and after
    reopening."""
    folder = tmp_path_factory.mktemp("store")
    keys += [k[:8] + bytes(8) for k in keys[:3] if k[:8] + bytes(8) not in keys]
    stored = {k: (np.array(bits, np.uint32) + np.uint32(i)).view(np.float32) for i, k in enumerate(keys)}
    store = FeatureStore(folder, DIM)
    edges = [0, *sorted(cuts), len(keys)]
    for start, stop in itertools.pairwise(edges):
        if keys[start:stop]:
            store.put({k: stored[k] for k in keys[start:stop]})
    for opened in (store, FeatureStore(folder, DIM)):
        assert len(opened) == len(keys)
        for k, value in stored.items():
            assert opened.get(k).tobytes() == value.tobytes()
        assert opened.get(bytes(15) + b"x") is None or bytes(15) + b"x" in stored
        assert (opened.torn, opened.damaged) == (0, 0)


def test_records_are_key_vector_and_crc(tmp_path):
    """Read without the code that wrote them."""
    FeatureStore(tmp_path, DIM).put({key(7): vector(7), key(8): vector(8)})
    (path,) = files(tmp_path)
    data = path.read_bytes()
    assert len(data) == 2 * (16 + 4 * DIM + 4)
    for number, record in ((7, data[: len(data) // 2]), (8, data[len(data) // 2 :])):
        assert record[:16] == key(number)
        assert record[16:-4] == vector(number).astype("<f4").tobytes()
        assert int.from_bytes(record[-4:], "little") == zlib.crc32(record[:-4])


def test_an_unused_store_leaves_no_file(tmp_path):
    store = FeatureStore(tmp_path / "new" / "folder", DIM)
    assert store.get(key(0)) is None
    assert files(tmp_path) == []


@pytest.mark.parametrize("missing", range(1, 40))
def test_a_torn_last_record_is_ignored_and_counted(tmp_path, missing):
    FeatureStore(tmp_path, DIM).put({key(i): vector(i) for i in range(3)})
    (path,) = files(tmp_path)
    os.truncate(path, path.stat().st_size - missing)
    store = FeatureStore(tmp_path, DIM)
    assert store.torn == 1
    assert len(store) == 2
    assert store.get(key(2)) is None
    assert [store.get(key(i)).tobytes() for i in range(2)] == [vector(i).tobytes() for i in range(2)]
    store.put({key(2): vector(2)})  # into another file: nothing is appended to a torn one
    again = FeatureStore(tmp_path, DIM)
    assert [again.get(key(i)).tobytes() for i in range(3)] == [vector(i).tobytes() for i in range(3)]


def test_a_flipped_bit_anywhere_makes_a_record_absent_never_wrong(tmp_path):
    FeatureStore(tmp_path, DIM).put({key(i): vector(i) for i in range(3)})
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(whole), 150, replace=False).tolist():
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        store, hit = FeatureStore(tmp_path, DIM), bit // 8 // (16 + 4 * DIM + 4)
        for i in range(3):
            found = store.get(key(i))
            assert (found is None) == (i == hit)
            assert found is None or found.tobytes() == vector(i).tobytes()
        if bit // 8 % (16 + 4 * DIM + 4) >= 16:
            assert store.damaged == 1


def test_two_writers_share_a_folder(tmp_path):
    first, second = FeatureStore(tmp_path, DIM), FeatureStore(tmp_path, DIM)
    for i in range(10):
        (first if i % 2 else second).put({key(i): vector(i), key(100): vector(100)})
    assert len(files(tmp_path)) == 2
    third = FeatureStore(tmp_path, DIM)
    assert all(third.get(key(i)).tobytes() == vector(i).tobytes() for i in [*range(10), 100])
    assert first.get(key(0)) is None, "what the other adds is seen by who opens the folder later"


def test_a_full_disk_leaves_whole_records(tmp_path):
    """A limit on the size of files stands for it: the write stops in the middle of a record."""
    import resource

    store = FeatureStore(tmp_path, DIM)
    store.put({key(i): vector(i) for i in range(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            store.put({key(i): vector(i) for i in range(3, 9)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.get(key(3)) is None
    store.put({key(9): vector(9)})
    for opened in (store, FeatureStore(tmp_path, DIM)):
        assert opened.torn == 0
        assert [i for i in range(10) if opened.get(key(i)) is not None] == [0, 1, 2, 9]
        assert opened.get(key(9)).tobytes() == vector(9).tobytes()


WRITER = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_teacher_cache import DIM, key, vector
from copernicus.platform.teacher_cache import FeatureStore
store = FeatureStore(sys.argv[1], DIM)
for start in range(0, 10**9, 4):
    store.put({key(i): vector(i) for i in range(start, start + 4)})
    print(start + 4, flush=True)
"""


def test_a_killed_writer_loses_only_what_it_had_not_written(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        for _ in range(25):
            told = int(process.stdout.readline())
        time.sleep(0.05)
        process.kill()
        told = max([told, *(int(line) for line in process.stdout.read().splitlines() if line)])
    finally:
        process.kill()
        process.wait()
    store = FeatureStore(tmp_path, DIM)
    assert told >= 100
    assert len(store) >= told
    assert all(store.get(key(i)).tobytes() == vector(i).tobytes() for i in range(len(store)))


# --- In front of a teacher -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> tuple[Path, DinoTeacher, DinoTeacher]:
    folder = save_dinov2(tmp_path_factory.mktemp("teacher"))
    other = save_dinov2(tmp_path_factory.mktemp("other"), seed=1)
    return folder, load_teacher(str(folder)), load_teacher(str(other))


def images(rows: int, side: int = 28, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, 3, side, side), generator=torch.Generator().manual_seed(seed))


class Counting:
    """A teacher that counts the images it computes."""

    def __init__(self, teacher: DinoTeacher):
        self.teacher, self.identity, self.dim, self.images = teacher, teacher.identity, teacher.dim, 0

    def __call__(self, rgb: torch.Tensor) -> torch.Tensor:
        self.images += len(rgb)
        return self.teacher(rgb)


def cached(teacher: DinoTeacher, folder: Path) -> tuple[CachedTeacher, Counting]:
    counting = Counting(teacher)
    return CachedTeacher(counting, FeatureStore(folder / teacher.identity, teacher.dim)), counting  # type: ignore[arg-type]


def test_a_hit_is_bit_equal_and_computes_nothing(teachers, tmp_path):
    _, teacher, _ = teachers
    x = images(4)
    first, counting = cached(teacher, tmp_path)
    expected = teacher(x).mean(dim=1)
    assert torch.equal(first(x).mean(dim=1), expected)
    assert torch.equal(first(x)[:, 0], expected)
    assert counting.images == 4
    second, counting = cached(teacher, tmp_path)
    assert torch.equal(second(x[[3, 1, 1]]).mean(dim=1), expected[[3, 1, 1]])
    assert counting.images == 0
    assert (second.asked, second.found) == (3, 3)


def test_a_miss_computes_the_batch_as_it_came(teachers, tmp_path):
    """So that a row that was lost comes out with the bits it had: the product of fewer rows may round otherwise."""
    _, teacher, _ = teachers
    x = images(5)
    whole = teacher(x).mean(dim=1)
    cached(teacher, tmp_path / "part")[0](x[:2])
    part, counting = cached(teacher, tmp_path / "part")
    answer = part(x)[:, 0]
    assert counting.images == 5
    assert torch.equal(answer[2:], whole[2:])
    assert torch.equal(answer[:2], teacher(x[:2]).mean(dim=1)), "known rows keep what is stored"
    assert (part.asked, part.found) == (5, 2)
    assert len(part.store) == 5


def test_the_same_image_twice_in_a_batch_is_stored_once(teachers, tmp_path):
    _, teacher, _ = teachers
    x = torch.zeros(3, 3, 28, 28)
    first, _ = cached(teacher, tmp_path)
    answer = first(x)
    assert len(first.store) == 1
    assert torch.equal(answer[0], answer[2])
    assert torch.equal(cached(teacher, tmp_path)[0](x), answer)


def test_whatever_changes_the_feature_changes_the_key(teachers, tmp_path):
    _, teacher, other = teachers
    x = images(1)
    store = FeatureStore(tmp_path, teacher.dim)
    ours = CachedTeacher(teacher, store)
    seen = set(ours.keys(x))
    seen |= set(CachedTeacher(other, store).keys(x))
    nudged = x.clone()
    nudged[0, 2, 27, 27] = torch.nextafter(nudged[0, 2, 27, 27], torch.tensor(9.0))
    seen |= set(ours.keys(nudged))
    seen |= set(ours.keys(x.reshape(1, 3, 14, 56)))
    with torch.autocast("cpu", torch.bfloat16):
        seen |= set(ours.keys(x))
    assert len(seen) == 5
    assert ours.keys(x.double()) == ours.keys(x) == ours.keys(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))


def test_another_teacher_never_hits(teachers, tmp_path):
    """Not even if its files lie where another's are looked for."""
    _, teacher, other = teachers
    x = images(2)
    first, _ = cached(teacher, tmp_path)
    first(x)
    (path,) = files(tmp_path)
    (tmp_path / other.identity).mkdir()
    (tmp_path / other.identity / path.name).write_bytes(path.read_bytes())
    second, counting = cached(other, tmp_path)
    assert len(second.store) == 2
    assert torch.equal(second(x)[:, 0], other(x).mean(dim=1))
    assert counting.images == 2


def test_settings_open_the_teacher_with_and_without_a_cache(teachers, tmp_path):
    folder, teacher, _ = teachers
    cpu = torch.device("cpu")
    assert open_teacher(None, cpu) is None
    plain = open_teacher(Distill(str(folder)), cpu)
    kept = open_teacher(Distill(str(folder), cache=str(tmp_path)), cpu)
    assert isinstance(plain, DinoTeacher)
    assert isinstance(kept, CachedTeacher)
    x = images(2)
    assert torch.equal(kept(x).mean(dim=1), plain(x).mean(dim=1))
    assert [path.parent.name for path in files(tmp_path)] == [teacher.identity]
