"""Certificates hold for whom and when they say, as OpenSSL reads them; what is wrong with one is said with numbers."""

import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from protocol import certificates
from protocol.certificates import defects, make_authority, make_server
from protocol.errors import ConfigurationError

HOSTS = ["fl.example.org", "10.1.2.3", "2001:db8::7"]
NOW = datetime(2026, 11, 22, tzinfo=UTC)
AUTHORITY = make_authority("consortium", HOSTS, 3650, NOW)
SERVER = make_server(AUTHORITY, HOSTS, 365, NOW)


def openssl(*arguments: str) -> str:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def written(tmp_path: Path) -> Path:
    certificates.write_issued(AUTHORITY, tmp_path / "ca.key", tmp_path / "ca.crt")
    certificates.write_issued(SERVER, tmp_path / "server.key", tmp_path / "server.crt")
    return tmp_path


def test_openssl_verifies_a_server_for_its_hosts(written: Path) -> None:
    """Oracle: OpenSSL's own verification, strict, at a time when both hold."""
    at = str(int((NOW + timedelta(days=3)).timestamp()))
    common = ("verify", "-x509_strict", "-purpose", "sslserver", "-attime", at, "-CAfile", str(written / "ca.crt"))
    for kind, host in (("-verify_hostname", HOSTS[0]), ("-verify_ip", HOSTS[1]), ("-verify_ip", HOSTS[2])):
        assert openssl(*common, kind, host, str(written / "server.crt")).endswith("OK\n")
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*common, "-verify_hostname", "example.org", str(written / "server.crt"))


def test_a_fingerprint_is_what_openssl_prints(written: Path) -> None:
    told = openssl("x509", "-in", str(written / "server.crt"), "-noout", "-fingerprint", "-sha256")
    assert told.strip().split("=")[1] == certificates.fingerprint(SERVER.certificate).removeprefix("SHA256:")


def test_keys_are_for_their_owner_alone_and_belong_to_their_certificates(written: Path) -> None:
    for name in ("ca", "server"):
        assert (written / f"{name}.key").stat().st_mode & 0o777 == 0o600
        key = certificates.read_key(written / f"{name}.key")
        assert key.public_key() == certificates.read_certificates(written / f"{name}.crt")[0].public_key()
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(written / "server.crt", written / "server.key")
    (written / "ca.key").chmod(0o640)
    with pytest.raises(ConfigurationError, match=r"mode 640\); chmod 600"):
        certificates.read_key(written / "ca.key")


def test_an_authority_says_what_it_is_and_for_whom() -> None:
    """RFC 5280: basic constraints (4.2.1.9), key usage (4.2.1.3) and name constraints (4.2.1.10), all critical."""
    found = {extension.oid._name: extension for extension in AUTHORITY.certificate.extensions}
    for name in ("basicConstraints", "keyUsage", "nameConstraints"):
        assert found[name].critical
    assert found["basicConstraints"].value == x509.BasicConstraints(ca=True, path_length=0)
    assert found["keyUsage"].value.key_cert_sign
    assert not found["keyUsage"].value.digital_signature
    permitted = {str(each.value) for each in found["nameConstraints"].value.permitted_subtrees}
    assert permitted >= {"fl.example.org", "10.1.2.3/32", "2001:db8::7/128", "localhost"}


def test_a_server_is_no_authority() -> None:
    found = {extension.oid._name: extension.value for extension in SERVER.certificate.extensions}
    assert not found["basicConstraints"].ca
    assert not found["keyUsage"].key_cert_sign
    assert certificates.hosts_of(SERVER.certificate)[:3] == HOSTS


@pytest.mark.parametrize("host", ["other.org", "evilfl.example.org", "example.org", "10.1.2.4"])
def test_an_authority_signs_for_no_other_host(host: str) -> None:
    with pytest.raises(ConfigurationError, match="may not vouch for this one"):
        make_server(AUTHORITY, [host], 30, NOW)


def test_an_authority_signs_for_what_ends_with_its_hosts() -> None:
    server = make_server(AUTHORITY, ["eu.fl.example.org"], 30, NOW).certificate
    assert defects(server, [AUTHORITY.certificate], NOW + timedelta(1)) == []


def test_a_server_never_holds_longer_than_its_authority() -> None:
    server = make_server(AUTHORITY, HOSTS, 9999, NOW).certificate
    assert server.not_valid_after_utc == AUTHORITY.certificate.not_valid_after_utc
    with pytest.raises(ConfigurationError, match="expired on 2036-11-19"):
        make_server(AUTHORITY, HOSTS, 1, NOW + timedelta(3650))


@pytest.mark.parametrize(
    ("days", "least", "said"),
    [
        (0, 0, ""),
        (364, 0, ""),
        (335, 30, ""),
        (336, 30, "server certificate: expires on 2027-11-22, in 29.0 days; at least 30"),
        (366, 0, "server certificate: expired on 2027-11-22 00:00 UTC, 1.0 days ago"),
        (-2, 0, "server certificate: not valid before 2026-11-22 00:00 UTC, in 2.0 days; is the clock right"),
        (3651, 0, "authority: expired on 2036-11-19 00:00 UTC, 1.0 days ago"),
    ],
)
def test_what_is_over_or_has_not_begun_is_said_in_days(days: int, least: int, said: str) -> None:
    found = "\n".join(defects(SERVER.certificate, [AUTHORITY.certificate], NOW + timedelta(days), least))
    assert said in found
    assert bool(found) == bool(said)


def test_a_server_of_another_authority_of_the_same_name_is_a_defect() -> None:
    other = make_authority("consortium", HOSTS, 3650, NOW)
    assert "no authority here vouches" in defects(SERVER.certificate, [other.certificate], NOW + timedelta(1))[0]
    assert defects(SERVER.certificate, [other.certificate, AUTHORITY.certificate], NOW + timedelta(1)) == []


@pytest.mark.parametrize(
    "host", ["", "https://fl.example.org", "fl.example.org:443", "a b", "ä.org", "1.2.3", "x" * 64 + ".org", "*.org"]
)
def test_what_is_no_host_is_said_by_name(host: str) -> None:
    with pytest.raises(ConfigurationError, match="expected a host name"):
        make_authority("consortium", ["fl.example.org", host], 9)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"x" * 70_000]
)
def test_files_that_hold_no_key_or_certificate_are_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    path.chmod(0o600)
    for read in (certificates.read_certificates, certificates.read_key, certificates.read_admission_key):
        with pytest.raises(ConfigurationError, match=str(path)):
            read(path)
        with pytest.raises(ConfigurationError, match="is missing"):
            read(tmp_path / "nothing")


def test_an_admission_key_is_read_and_named_as_openssh_does(tmp_path: Path) -> None:
    key = certificates.write_admission_key(tmp_path / "auth", "bank")
    assert (tmp_path / "auth").stat().st_mode & 0o777 == 0o600
    assert certificates.read_key(tmp_path / "auth").public_key() == key.public_key()
    assert certificates.read_admission_key(tmp_path / "auth.pub") == key.public_key()
    told = subprocess.run(["ssh-keygen", "-lf", tmp_path / "auth.pub"], check=True, capture_output=True, text=True).stdout
    assert told.split() == ["384", certificates.ssh_fingerprint(key.public_key()), "bank", "(ECDSA)"]
