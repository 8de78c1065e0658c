"""Keys in files and signatures: OpenSSH agrees, one purpose is not another, and nothing but SignatureError is raised."""

import base64
import errno
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import SignatureError, UserError
from protocol.signature import (
    fingerprint,
    make_key,
    read_private,
    read_trusted,
    sign,
    verify,
    write_pair,
    write_private,
    write_public,
)

KEY, OTHER = make_key(), make_key()
PUBLIC = KEY.public_key()
needs_ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed here")
# RFC 8032: the order of the group; S + L would verify where S is not checked to be below it.
ORDER = 2**252 + 27742317777372353535851937790883648493


def raw(key):
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


@given(st.binary(max_size=300), st.from_regex(r"[a-z0-9-]{1,64}", fullmatch=True))
def test_a_signature_holds_for_its_bytes_and_names_its_key(content, purpose):
    assert raw(verify(sign(KEY, purpose, content), purpose, content, [OTHER.public_key(), PUBLIC])) == raw(PUBLIC)


def test_what_is_signed_is_as_the_docstring_says():
    """Oracle: Ed25519 itself over the bytes put together by hand."""
    made = sign(KEY, "bundle-manifest", b"\x00content")
    blob = base64.b64decode(PUBLIC.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).split()[1])
    assert made[:32] == hashlib.sha256(blob).digest()
    PUBLIC.verify(made[32:], b"fedge-signature-1\x00bundle-manifest\x00\x00content")
    assert made == sign(KEY, "bundle-manifest", b"\x00content")


@pytest.mark.parametrize("purpose", ["update", "bundle", "bundle-manifest2", "-bundle-manifest"])
def test_a_signature_for_one_purpose_is_none_for_another(purpose):
    with pytest.raises(SignatureError, match="does not hold"):
        verify(sign(KEY, purpose, b"x"), "bundle-manifest", b"x", [PUBLIC])


def test_purpose_and_content_cannot_be_shifted_against_each_other():
    """Without a separator "ab" + "c" and "a" + "bc" were one message."""
    with pytest.raises(SignatureError):
        verify(sign(KEY, "ab", b"c"), "a", b"bc", [PUBLIC])
    for wrong in ("", "A", "a\0b", "a" * 65, "ä", "a\n"):
        with pytest.raises(ValueError, match="purpose"):
            sign(KEY, wrong, b"")


def test_every_flipped_bit_of_a_signature_is_refused():
    made = sign(KEY, "a", b"content")
    for bit in range(8 * len(made)):
        wrong = bytearray(made)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SignatureError):
            verify(bytes(wrong), "a", b"content", [PUBLIC])


def test_the_same_signature_in_another_form_is_refused():
    made = sign(KEY, "a", b"content")
    shifted = int.from_bytes(made[64:], "little") + ORDER
    with pytest.raises(SignatureError, match="does not hold"):
        verify(made[:64] + shifted.to_bytes(32, "little"), "a", b"content", [PUBLIC])


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_a_signature(signature):
    with pytest.raises(SignatureError):
        verify(signature, "a", b"content", [PUBLIC])


def test_a_key_that_is_not_trusted_is_named_with_those_that_are():
    with pytest.raises(SignatureError) as told:
        verify(sign(OTHER, "a", b""), "a", b"", [PUBLIC])
    assert fingerprint(OTHER.public_key()) in str(told.value)
    assert fingerprint(PUBLIC) in str(told.value)
    with pytest.raises(SignatureError, match="trusted: none"):
        verify(sign(KEY, "a", b""), "a", b"", [])
    with pytest.raises(SignatureError):  # the id of a trusted key over the signature of another
        verify(sign(KEY, "a", b"")[:32] + sign(OTHER, "a", b"")[32:], "a", b"", [PUBLIC, OTHER.public_key()])


def test_keys_come_back_from_their_files_and_private_ones_are_their_owners(tmp_path):
    private, public = tmp_path / "keys" / "signing", tmp_path / "keys" / "signing.pub"
    write_private(private, KEY)
    write_public(public, PUBLIC, "head office\nssh-ed25519 AAAA\x1b[2J")
    assert private.stat().st_mode & 0o777 == 0o600
    assert raw(read_private(private).public_key()) == raw(PUBLIC)
    assert [raw(key) for key in read_trusted(public)] == [raw(PUBLIC)]
    assert len(public.read_text().splitlines()) == 1


def test_a_key_is_never_written_over(tmp_path):
    path = tmp_path / "key"
    write_private(path, KEY)
    before = path.read_bytes()
    for write in (lambda: write_private(path, OTHER), lambda: write_public(path, OTHER.public_key())):
        with pytest.raises(SignatureError, match="already"):
            write()
    assert path.read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match="already"):
        write_private(tmp_path / "link", KEY)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("failing", [1, 2], ids=["the private key", "the public key"])
def test_a_disk_that_is_full_leaves_no_key_and_a_later_try_makes_both(tmp_path, monkeypatch, failing):
    """Fault injection into the operating system: the bytes of one of both files never reach the disk."""
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_pair(tmp_path / "key", KEY)
    assert list(tmp_path.iterdir()) == []
    assert write_pair(tmp_path / "key", KEY, "us") == tmp_path / "key.pub"
    assert raw(read_private(tmp_path / "key").public_key()) == raw(read_trusted(tmp_path / "key.pub")[0]) == raw(PUBLIC)


def test_keys_are_written_whole_where_a_disk_knows_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_pair(tmp_path / "key", KEY)
    assert raw(read_private(tmp_path / "key").public_key()) == raw(PUBLIC)
    with pytest.raises(SignatureError, match="already"):
        write_pair(tmp_path / "key", OTHER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.pub"]
    assert raw(read_private(tmp_path / "key").public_key()) == raw(PUBLIC)


def test_half_a_pair_is_there_already_and_stays_as_it_is(tmp_path):
    write_public(tmp_path / "key.pub", PUBLIC)
    with pytest.raises(SignatureError, match=r"key\.pub: there is a file already"):
        write_pair(tmp_path / "key", OTHER)
    assert [path.name for path in tmp_path.iterdir()] == ["key.pub"]
    assert raw(read_trusted(tmp_path / "key.pub")[0]) == raw(PUBLIC)


def test_a_pipe_is_no_key_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_private, read_trusted):
        with pytest.raises(SignatureError, match="no ordinary file"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_private_key_that_others_may_touch_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    write_private(path, KEY)
    path.chmod(mode)
    with pytest.raises(SignatureError, match="chmod 600"):
        read_private(path)


def pem(key):
    forms = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(*forms)


def public_pem(key):
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_pem_keys_are_read_too(tmp_path):
    private, public = tmp_path / "key.pem", tmp_path / "pub.pem"
    private.write_bytes(pem(KEY))
    private.chmod(0o600)
    public.write_bytes(public_pem(PUBLIC))
    assert raw(read_private(private).public_key()) == raw(PUBLIC) == raw(read_trusted(public)[0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
        pem(ec.generate_private_key(ec.SECP256R1())),
        pem(ed448.Ed448PrivateKey.generate()),
        pem(x25519.X25519PrivateKey.generate()),
        pem(rsa.generate_private_key(65537, 2048)),
        KEY.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
        ),
        public_pem(PUBLIC),
        b"\xff" * 70_000,
    ],
)
def test_what_is_no_private_ed25519_key_is_refused(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SignatureError):
        read_private(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# only words\n\n",
        b"ssh-ed25519\n",
        b"ssh-ed25519 AAAA\n",
        b"ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ== x\n",
        public_pem(ec.generate_private_key(ec.SECP256R1()).public_key()),
        pem(KEY),
        b"\x00" * 10,
        b"x" * 70_000,
    ],
)
def test_what_holds_no_public_ed25519_key_is_refused(tmp_path, content):
    (tmp_path / "trusted").write_bytes(content)
    with pytest.raises(SignatureError):
        read_trusted(tmp_path / "trusted")


@given(st.binary(max_size=400))
def test_any_bytes_in_a_key_file_raise_only_a_signature_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    for read in (read_private, read_trusted):
        with pytest.raises(SignatureError):
            read(path)


def test_several_keys_are_trusted_while_one_takes_anothers_place(tmp_path):
    line = "{} {}\n".format
    keys = [key.public_key() for key in (KEY, OTHER)]
    lines = [key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode() for key in keys]
    (tmp_path / "trusted").write_text("# until the new year\n" + line(lines[0], "old") + "\n" + line(lines[1], "new"))
    trusted = read_trusted(tmp_path / "trusted")
    assert [raw(key) for key in trusted] == [raw(key) for key in keys]
    for key in (KEY, OTHER):
        verify(sign(key, "a", b"x"), "a", b"x", trusted)
    (tmp_path / "trusted").write_text(line(lines[1], "new"))
    with pytest.raises(SignatureError, match="not trusted"):
        verify(sign(KEY, "a", b"x"), "a", b"x", read_trusted(tmp_path / "trusted"))


def test_one_bad_line_spoils_a_file_of_trusted_keys(tmp_path):
    write_public(tmp_path / "trusted", PUBLIC)
    with (tmp_path / "trusted").open("a") as file:
        file.write("ssh-ed25519 nonsense\n")
    with pytest.raises(SignatureError, match="line 2"):
        read_trusted(tmp_path / "trusted")


def test_a_missing_key_is_a_mistake_that_its_user_can_mend(tmp_path):
    """Who has no key makes one; whom to trust is never made up on the spot."""
    for read, advice in ((read_private, "keygen makes one$"), (read_trusted, "public keys of those whom you trust")):
        with pytest.raises(UserError, match=advice):
            read(tmp_path / "none")
        with pytest.raises(SignatureError):
            read(tmp_path)


@needs_ssh_keygen
def test_openssh_reads_our_keys_prints_our_fingerprint_and_we_read_its_keys(tmp_path):
    def ssh_keygen(*options):
        return subprocess.run(["ssh-keygen", *options], capture_output=True, text=True, check=True).stdout

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_private(ours, KEY)
    write_public(Path(f"{ours}.pub"), PUBLIC)
    assert ssh_keygen("-lf", f"{ours}.pub").split()[1] == fingerprint(PUBLIC)
    assert ssh_keygen("-yf", str(ours)).split()[:2] == Path(f"{ours}.pub").read_text().split()
    ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", "a comment", "-f", str(theirs))
    verify(sign(read_private(theirs), "a", b""), "a", b"", read_trusted(Path(f"{theirs}.pub")))
    protected = tmp_path / "protected"
    ssh_keygen("-q", "-t", "ed25519", "-N", "secret", "-f", str(protected))
    with pytest.raises(SignatureError, match="passphrase"):
        read_private(protected)
