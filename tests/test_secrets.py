"""Credentials are found where others would see them, named without being repeated, and what is none is left alone."""

import pytest

from copernicus.platform.secrets import find_secrets, scrub

HUB = "hf_" + "Ab1" * 11
AWS = "AKIA" + "IOSFODNN7EXAMPL0"[:16]
SECRETS = [
    ("tracking: {uri: postgresql://me:hunter2@db.example/mlflow}", "hunter2", "password in a URI"),
    ("uri: http://me:p@ss/w:rd@host:5000", "p@ss/w:rd", "password in a URI"),
    ("data: s3://KEYOFMINE:verysecret@bucket/bench", "verysecret", "password in a URI"),
    ("uri: postgresql+psycopg2://:hunter2@host/db", "hunter2", "password in a URI"),
    ("uri: postgresql://host/db?user=me&password=hunter2&sslmode=require", "hunter2", "in a URI"),
    ("shards: [https://store.example/a.tar?sig=Abc%2Bd]", "Abc%2Bd", "in a URI"),
    ("aws_secret_access_key: wJalrXUtnFEMI/K7MDENG", "wJalrXUtnFEMI/K7MDENG", "password or key"),
    ('{"password": "hunter2"}', "hunter2", "password or key"),
    (f"# export HF_TOKEN={HUB}", HUB, "Hugging Face"),
    (f"key: {AWS}", AWS, "AWS"),
    ("token: ghp_" + "a1" * 20, "ghp_" + "a1" * 20, "GitHub"),
    ("token: AIza" + "x" * 35, "AIza" + "x" * 35, "Google"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE", "private key"),
]
NONE = [
    "uri: sqlite:///mlflow.db",
    "uri: http://127.0.0.1:5000",
    "page: http://host:5000/runs/a@b",
    "weights: hf://wangyi111/Copernicus-FM@main/CopernicusFM_ViT_base_varlang_e100.pth",
    "uri: postgresql://me:${oc.env:DB_PASSWORD}@host/db",
    "uri: postgresql://me:***@host/db",
    "data: s3://bucket/copernicus-bench",
    "# the password is set in the environment of the head",
    "shards: [/data/hf_cache/example-{000000..002255}.tar]",
    "name: sk_small_token_study",
]


@pytest.mark.parametrize(("text", "secret", "what"), SECRETS)
def test_credentials_are_found_and_taken_out(text, secret, what):
    found = find_secrets(f"name: mine\n{text}\n")
    assert found
    assert any(what in kind for _, kind in found)
    assert all(where == "line 2" for where, _ in found)
    assert secret not in str(found)
    assert secret not in scrub(text)
    assert "***" in scrub(text)


@pytest.mark.parametrize("text", NONE)
def test_what_is_none_is_left_alone(text):
    assert find_secrets(text) == []
    assert scrub(text) == text


def test_in_mappings_the_key_is_named():
    tree = {"tracking": {"uri": "http://me:hunter2@host"}, "sweep": {"encoders": [{"weights": HUB}]}, "seed": 3}
    assert find_secrets(tree) == [
        ("tracking.uri", "a password in a URI"),
        ("sweep.encoders[0].weights", "an access token of Hugging Face"),
    ]
    assert [where for where, _ in find_secrets(tree, passwords=False)] == ["sweep.encoders[0].weights"]


def test_the_experiments_that_ship_hold_none():
    from pathlib import Path

    for file in (Path(__file__).parents[1] / "experiments").glob("*.yaml"):
        assert find_secrets(file.read_text()) == [], file
