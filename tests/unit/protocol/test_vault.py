"""Sealed files: they come back bit by bit, and open to nobody else, as nothing else, and never in part."""

import base64
import json
import os
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from protocol import vault
from protocol.errors import VaultError
from protocol.vault import Cost, Vault, identity_of, is_sealed, make_key_file, read_key_file

KEY = bytes(range(32))
WHAT = {"kind": "adapter", "federation": "hospitals", "round": 7}
CHEAP = Cost(log_n=10)
CHUNK = 2**18
TENSOR = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
CONTENT = save({"layers.0.q.lora_A": TENSOR})


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 77])
def test_bytes_of_any_length_come_back(length):
    content = random.Random(length).randbytes(length)
    sealed = Vault(KEY).seal(content, WHAT)
    assert Vault(KEY).open(sealed, WHAT) == content


@given(st.binary(max_size=300), st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=4))
def test_any_bytes_under_any_identity_come_back(content, what):
    assert Vault(KEY).open(Vault(KEY).seal(content, what), what) == content


def test_a_sealed_file_is_what_the_format_says():
    """The oracle opens it by the docstring's words alone."""
    content = random.Random(1).randbytes(CHUNK + 5)
    sealed = Vault(KEY).seal(content, WHAT)
    told = json.dumps(WHAT, sort_keys=True).encode()
    head = b"FEDGE-SEALED-1\n" + len(told).to_bytes(4, "little") + told
    assert sealed.startswith(head)
    salt, chunks = sealed[len(head) :][:32], sealed[len(head) + 32 :]
    cipher = AESGCM(HKDF(SHA256(), 32, salt, b"fedge sealed file 1").derive(KEY))
    first = cipher.decrypt(bytes(12), chunks[: CHUNK + 16], head + salt)
    last = cipher.decrypt(bytes(10) + b"\x01\x01", chunks[CHUNK + 16 :], head + salt)
    assert first + last == content


def test_the_same_bytes_are_never_sealed_alike():
    sealed = [Vault(KEY).seal(CONTENT, WHAT) for _ in range(20)]
    salts = {each[-(len(CONTENT) + 16) - 32 :][:32] for each in sealed}
    assert len(salts) == 20


def test_a_hundred_wrong_keys_and_identities_open_nothing():
    sealed, rng, refused = Vault(KEY).seal(CONTENT, WHAT), random.Random(2), 0
    for case in range(50):
        key = bytearray(KEY) if case % 2 else bytearray(rng.randbytes(32))
        key[case % 32] ^= 1 << case % 8
        with pytest.raises(VaultError, match="does not open"):
            Vault(bytes(key)).open(sealed, WHAT)
        refused += 1
    for case in range(50):
        other = [WHAT | {"round": case + 8}, WHAT | {"federation": f"f{case}"}, {"kind": "adapter"}, {}][case % 4]
        with pytest.raises(VaultError, match="expected"):
            Vault(KEY).open(sealed, other)
        # Whoever writes the other identity into the file has a file that does not open as that either.
        told = json.dumps(other, sort_keys=True).encode()
        rest = sealed[len(b"FEDGE-SEALED-1\n") + 4 + len(json.dumps(WHAT, sort_keys=True)) :]
        with pytest.raises(VaultError, match="does not open"):
            Vault(KEY).open(b"FEDGE-SEALED-1\n" + len(told).to_bytes(4, "little") + told + rest, other)
        refused += 1
    assert refused == 100


def test_every_flipped_byte_is_found():
    sealed = Vault(KEY).seal(CONTENT[:200], WHAT)
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1 << at % 8
        with pytest.raises(VaultError):
            Vault(KEY).open(bytes(changed), WHAT)


def test_every_cut_is_found():
    sealed = Vault(KEY).seal(CONTENT[:200], WHAT)
    for length in range(len(sealed)):
        with pytest.raises(VaultError):
            Vault(KEY).open(sealed[:length], WHAT)


def test_chunks_that_are_left_out_swapped_repeated_or_added_do_not_open():
    """Whole chunks carry their own valid tags: it is their number and the mark of the last one that tell."""
    sealed = Vault(KEY).seal(random.Random(3).randbytes(4 * CHUNK), WHAT)
    size = CHUNK + 16
    head, chunks = sealed[: -4 * size], [sealed[-4 * size :][at * size :][:size] for at in range(4)]
    another = Vault(KEY).seal(random.Random(3).randbytes(4 * CHUNK), WHAT)[-4 * size :][:size]
    orders = [[0, 1, 2], [0, 1], [1, 2, 3], [0, 2, 3], [0, 2, 1, 3], [0, 1, 1, 2, 3], [0, 1, 2, 3, 3], [3], []]
    for order in orders:
        with pytest.raises(VaultError):
            Vault(KEY).open(head + b"".join(chunks[at] for at in order), WHAT)
    with pytest.raises(VaultError):
        Vault(KEY).open(head + another + b"".join(chunks[1:]), WHAT)
    assert len(Vault(KEY).open(head + b"".join(chunks), WHAT)) == 4 * CHUNK


def test_a_sealed_file_shows_no_tensor_and_is_its_owners_alone(tmp_path):
    path = tmp_path / "adapter.sealed"
    Vault(KEY).write(path, CONTENT, WHAT)
    content = path.read_bytes()
    assert b"lora_A" not in content
    assert all(TENSOR.tobytes()[at : at + 16] not in content for at in range(0, TENSOR.nbytes, 16))
    assert path.stat().st_mode & 0o777 == 0o600
    assert is_sealed(path)
    assert identity_of(path) == WHAT
    assert Vault(KEY).read(path, WHAT) == CONTENT


def test_what_is_no_sealed_file_is_said_to_be_none(tmp_path):
    for content in (b"", b"FEDGE-SEALED-1\n", b"FEDGE-SEALED-1\n\xff\xff\xff\xff" + b"x" * 99, CONTENT, b"x" * 5000):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(VaultError, match=r"x: is (not sealed|cut off)"):
            Vault(KEY).read(tmp_path / "x", WHAT)
    with pytest.raises(VaultError, match="cannot be read"):
        Vault(KEY).read(tmp_path / "nothing", WHAT)
    with pytest.raises(VaultError, match="cannot be read"):
        Vault(KEY).read(tmp_path, WHAT)


# Folders --------------------------------------------------------------------------------------------------------------------


def a_folder(path):
    (path / "checkpoint" / "deep").mkdir(parents=True)
    (path / "checkpoint" / "empty").mkdir()
    (path / "checkpoint" / "weights").write_bytes(random.Random(4).randbytes(3 * CHUNK))
    (path / "checkpoint" / "deep" / "名.json").write_text("{}")
    return path / "checkpoint"


def test_a_folder_comes_back_whole_and_private(tmp_path):
    folder, target = a_folder(tmp_path), tmp_path / "again"
    target.mkdir()
    Vault(KEY).pack(folder, tmp_path / "sealed", WHAT)
    Vault(KEY).unpack(tmp_path / "sealed", target, WHAT)
    there = {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    again = target / "checkpoint"
    assert {path.relative_to(again): path.is_file() and path.read_bytes() for path in again.rglob("*")} == there
    assert {path.stat().st_mode & 0o777 for path in target.rglob("*")} == {0o700, 0o600}


def test_a_folder_whose_end_was_cut_off_is_refused_even_where_its_files_are_whole(tmp_path):
    folder = a_folder(tmp_path)
    Vault(KEY).pack(folder, tmp_path / "sealed", WHAT)
    content = (tmp_path / "sealed").read_bytes()
    for number, cut in enumerate([1, 17, 3000, CHUNK]):
        (tmp_path / "sealed").write_bytes(content[:-cut])
        target = tmp_path / str(number)
        target.mkdir()
        with pytest.raises(VaultError, match="does not open"):
            Vault(KEY).unpack(tmp_path / "sealed", target, WHAT)


def test_links_are_not_followed_and_bytes_are_no_folder(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(VaultError, match="neither file nor folder"):
        Vault(KEY).pack(folder, tmp_path / "sealed", WHAT)
    assert not (tmp_path / "sealed").exists()
    Vault(KEY).write(tmp_path / "bytes", b"no archive" * 100, WHAT)
    with pytest.raises(VaultError, match="holds no folder"):
        Vault(KEY).unpack(tmp_path / "bytes", folder, WHAT)


# Keys -----------------------------------------------------------------------------------------------------------------------


def test_a_key_file_gives_its_key_and_is_never_overwritten(tmp_path):
    make_key_file(tmp_path / "keys" / "key")
    key = read_key_file(tmp_path / "keys" / "key")
    assert len(key) == 32
    assert (tmp_path / "keys" / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(VaultError, match="there is a file already"):
        make_key_file(tmp_path / "keys" / "key")
    assert read_key_file(tmp_path / "keys" / "key") == key


def test_a_key_under_a_passphrase_opens_with_that_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "key"
    make_key_file(path, "correct horse bàttery", CHEAP)
    key = read_key_file(path, "correct horse bàttery")
    assert read_key_file(path, "correct horse ba\u0300ttery") == key  # the same letters, composed otherwise
    assert base64.b64encode(key) not in path.read_bytes()
    for wrong in ["correct horse battery", "correct horse bàttery ", "", None, "x" * 12]:
        with pytest.raises(VaultError, match="passphrase"):
            read_key_file(path, wrong)
    monkeypatch.setenv("VAULT_WORDS", "correct horse bàttery")
    assert Vault.at(path, "VAULT_WORDS").open(Vault(key).seal(b"x", WHAT), WHAT) == b"x"
    monkeypatch.delenv("VAULT_WORDS")
    with pytest.raises(VaultError, match="VAULT_WORDS is not set"):
        Vault.at(path, "VAULT_WORDS")


def test_a_short_passphrase_makes_no_key(tmp_path):
    with pytest.raises(VaultError, match="found 11 characters, expected 12"):
        make_key_file(tmp_path / "key", "12345678901", CHEAP)
    assert not (tmp_path / "key").exists()


def test_what_a_file_asks_of_scrypt_is_bounded_and_the_default_is_strong(tmp_path):
    """128 MiB a guess is OWASP's first choice; a file that asks for more than 1 GiB is refused before anything is computed."""
    assert Cost() == Cost(log_n=17, r=8, p=1)
    make_key_file(tmp_path / "key", "correct horse battery", CHEAP)
    line = (tmp_path / "key").read_text()
    for cost in ("24 8 1", "21 8 1", "10 99 1", "10 8 17", "1 8 1", "10 0 1"):
        (tmp_path / "key").write_text(line.replace("10 8 1", cost))
        with pytest.raises(VaultError, match="expected at most 1 GiB"):
            read_key_file(tmp_path / "key", "correct horse battery")
    for damaged in (line[:-9], line.replace("scrypt", "argon2"), line.replace("10 8 1", "11 8 1"), line[:30]):
        (tmp_path / "key").write_text(damaged)
        with pytest.raises(VaultError):
            read_key_file(tmp_path / "key", "correct horse battery")


def test_a_file_that_is_no_key_or_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "key"
    for content in (b"", b"x" * 44, b"\xff\xfe" * 30, base64.b64encode(bytes(31)), b"A" * 10_000):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(VaultError, match="no key"):
            read_key_file(path)
    path.chmod(0o640)
    with pytest.raises(VaultError, match="others than its owner may read this key"):
        read_key_file(path)
    with pytest.raises(VaultError, match="no readable key"):
        read_key_file(tmp_path / "nothing")
    with pytest.raises(VaultError, match="no ordinary file"):
        read_key_file(tmp_path)
    with pytest.raises(VaultError, match="found 31 bytes"):
        Vault(bytes(31))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for look in (vault.identity_of, lambda path: Vault(KEY).read(path, WHAT)):
        with pytest.raises(VaultError, match="no ordinary file"):
            look(tmp_path / "pipe")


def test_no_error_tells_what_was_sealed(tmp_path):
    canary = "CANARY-4711"
    sealed = Vault(KEY).seal(canary.encode(), WHAT)
    for wrong in (os.urandom(32), KEY):
        with pytest.raises(VaultError) as caught:
            Vault(wrong).open(sealed[:-1] if wrong == KEY else sealed, WHAT)
        assert canary not in str(caught.value)
    assert vault.SHORTEST_PASSPHRASE == 12
