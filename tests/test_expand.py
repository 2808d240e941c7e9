"""Shards by patterns, folders and lists: locally, and on a real S3-compatible server seen through a counting proxy."""

from __future__ import annotations

import os

import pytest

from copernicus.datasets import storage
from copernicus.datasets.expand import expand
from copernicus.datasets.sensors import InputError
from copernicus.datasets.storage import StoreError


@pytest.fixture
def four(tmp_path):
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / f"example-00000{i}.tar" for i in range(4)]
    for path in paths:
        path.write_bytes(b"shard")
    (tmp_path / "index.json").write_bytes(b"{}")
    (tmp_path / ".example-000009.tar").write_bytes(b"hidden")
    return [str(path) for path in paths]


def test_local(four, tmp_path, monkeypatch):
    assert expand(str(tmp_path)) == expand(tmp_path) == four
    assert expand(f"{tmp_path}/example-{{000001..000002}}.tar") == four[1:3]
    assert expand(f"{tmp_path}/example-*.tar") == expand(f"{tmp_path}/*.tar") == four
    assert expand([four[3], four[0]]) == [four[3], four[0]]
    assert expand(f"file://{four[1]}") == four[1:2]
    monkeypatch.chdir(tmp_path)
    assert expand(["example-000002.tar", "./example-000000.tar"]) == [four[2], four[0]]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/example-000002.tar") == [four[2]]


WRONG = [
    ("{}/example-{{000003..000004}}.tar", "example-000004.tar does not exist"),
    ("{}/nowhere", "nowhere does not exist"),
    ("{}/empty", "empty holds no shards"),
    ("{}/x*.tar", "no shard matches"),
    (["{}/example-000000.tar"] * 2, "example-000000.tar is named twice"),
    (["{}/example-000000.tar", "{}/*0.tar"], "example-000000.tar is named twice"),
    ("{}/example-{{000000..", "unbalanced braces"),
    ([], "no shards given"),
]


@pytest.mark.parametrize(("spec", "message"), WRONG)
def test_what_is_wrong_is_named(four, tmp_path, spec, message):
    with pytest.raises(InputError, match=message):
        expand(spec.format(tmp_path) if isinstance(spec, str) else [s.format(tmp_path) for s in spec])


@pytest.fixture
def remote(s3, four, tmp_path):
    found = s3.bucket.upload(tmp_path, "deep/folder/")
    s3.bucket.put("deep/folder/empty/index.json", b"{}")
    return f"s3://{s3.bucket.name}/deep/folder", [uri for uri in found if "/example" in uri]


def test_remote(s3, remote):
    folder, shards = remote
    for spec, requests in [
        (f"{folder}/example-{{000000..000003}}.tar", 1),
        (shards[::-1], 1),
        ([*shards[:2], f"{folder}/example-{{000002..000003}}.tar"], 1),
        (folder, 2),  # there is no object of that name
        (f"{folder}/", 1),
        (f"{folder}/*.tar", 1),
        (f"{folder}/example-00000[0-3].t?r", 1),
        (f"s3://{s3.bucket.name}/*/folder/*.tar", 3),
        (shards[0], 1),
    ]:
        s3.proxy.clear()
        assert expand(spec) == (shards[:1] if spec == shards[0] else shards[::-1] if spec == shards[::-1] else shards)
        assert len(s3.proxy.requests) == requests, spec
    assert expand([*shards[:1], str(os.path.abspath(__file__))]) == [shards[0], os.path.abspath(__file__)]


@pytest.mark.parametrize(("spec", "message"), WRONG)
def test_what_is_wrong_on_a_store_is_named(remote, spec, message):
    with pytest.raises(InputError, match=message):
        expand(spec.format(remote[0]) if isinstance(spec, str) else [s.format(remote[0]) for s in spec])


def test_a_bucket_that_may_be_read_but_not_listed(s3, remote):
    folder, shards = remote
    s3.proxy.fail("403", path="list-type")
    assert expand(shards) == shards
    with pytest.raises(InputError, match=r"shards s3://.*access denied"):
        expand(folder)


def test_a_bucket_closed_to_us_or_missing(s3, remote):
    s3.proxy.fail("403", methods=["GET", "HEAD"])
    for spec in (remote[0], remote[1], remote[1][0]):
        with pytest.raises(InputError, match=r"shards s3://.*access denied"):
            expand(spec)
    s3.proxy.heal()
    with pytest.raises(InputError, match="does not exist"):
        expand("s3://no-such-bucket/a-{0..3}.tar")


def test_a_store_that_does_not_answer_is_not_the_users_fault(s3, remote, monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (0.01,))
    s3.proxy.fail("500", methods=["GET", "HEAD"])
    for spec in (remote[0], remote[1]):
        with pytest.raises(StoreError, match="2 tries"):
            expand(spec)
    s3.proxy.heal()
    s3.proxy.fail("500", times=1, methods=["GET", "HEAD"])
    assert expand(remote[1]) == remote[1]


def test_credentials_in_a_pattern():
    with pytest.raises(InputError, match="leave user and password out") as caught:
        expand("s3://AKIA:hush@bucket/{0..3}.tar")
    assert "hush" not in str(caught.value)
