"""The certificates of one consortium (X.509, RFC 5280): an authority of its own, and the SuperLink's that it signs.

An authority may vouch for the hosts that it was made for and for this machine's own addresses, and for nothing else (name
constraints): whoever steals its key can pretend to be the coordinator, and nobody else. A file of authorities may hold
several, so that everybody has the next one before the last one goes. Keys are of the curve P-384.
"""

import base64
import hashlib
import ipaddress
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from protocol.errors import ConfigurationError, shown
from protocol.files import write_whole

# Flower's own processes reach the SuperLink under these.
LOCAL: Final = ("localhost", "127.0.0.1", "::1")
OWNER_ONLY: Final = 0o600
_EARLIER = timedelta(minutes=5)  # clocks differ
_LONGEST_FILE = 2**16
_SERVER_USAGE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])


@dataclass(frozen=True)
class Issued:
    """A certificate with the private key that belongs to it."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def make_authority(name: str, hosts: Sequence[str], days: int, since: datetime | None = None) -> Issued:
    """A new authority that vouches for servers under ``hosts`` alone.

    Args:
        name: What the certificate is called; for people.
        hosts: Names and IP addresses. A name allows what ends with it, too.
        days: How long it holds.
        since: From when on; now without it.

    Raises:
        ConfigurationError: Every host that is none.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    since = since or datetime.now(UTC) - _EARLIER
    named = _named(f"{name} authority")
    permitted = [_constraint(host) for host in general_names([*hosts, *LOCAL])]
    certificate = (
        x509.CertificateBuilder(named, named, key.public_key(), x509.random_serial_number(), since, since + timedelta(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.NameConstraints(permitted, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return Issued(key, certificate)


def make_server(authority: Issued, hosts: Sequence[str], days: int, since: datetime | None = None) -> Issued:
    """A SuperLink's new key and certificate, for ``hosts`` and this machine's own addresses.

    Args:
        authority: Who signs.
        hosts: Names and IP addresses under which nodes reach it.
        days: How long it holds; never longer than its authority.
        since: From when on; now without it.

    Raises:
        ConfigurationError: Every host that is none, or that the authority may not vouch for.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    since = since or datetime.now(UTC) - _EARLIER
    until = min(since + timedelta(days), authority.certificate.not_valid_after_utc)
    names = general_names([*hosts, *LOCAL])
    if beyond := [text(name) for name in names if not _permits(authority.certificate, name)]:
        raise ConfigurationError(
            "authority", [f"{host}: it was made for other hosts and may not vouch for this one" for host in beyond]
        )
    if until <= since:
        raise ConfigurationError("authority", [f"expired on {authority.certificate.not_valid_after_utc:%Y-%m-%d}"])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    certificate = (
        x509.CertificateBuilder(
            authority.certificate.subject, _named(hosts[0]), key.public_key(), x509.random_serial_number(), since, until
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(_SERVER_USAGE, critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA384())
    )
    return Issued(key, certificate)


def general_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Names and IP addresses as certificates hold them, each once.

    Raises:
        ConfigurationError: Every one that is neither; none was given.
    """
    names: dict[str, x509.GeneralName] = {}
    problems = []
    for host in hosts:
        try:
            names.setdefault(host.lower(), x509.IPAddress(ipaddress.ip_address(host.strip("[]"))))
            continue
        except ValueError:
            pass
        labels = host.rstrip(".").split(".")
        fine = all(0 < len(label) <= 63 and label.replace("-", "a").isalnum() and label.isascii() for label in labels)
        if not fine or len(host) > 253 or labels[-1].isdigit():
            told = shown(host, 80)
            problems.append(f"{told!r}: expected a host name such as fl.example.org, or an IP address, without a port")
        else:
            names.setdefault(host.lower(), x509.DNSName(host.lower().rstrip(".")))
    if problems or not names:
        raise ConfigurationError("hosts", problems or ["none was given"])
    return list(names.values())


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate is for; this machine's own come last."""
    with suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return sorted(map(text, names), key=lambda host: host in LOCAL)
    return []


def text(name: x509.GeneralName) -> str:
    """A general name for people."""
    return str(name.value)


def fingerprint(certificate: x509.Certificate) -> str:
    """What two people compare, as ``openssl x509 -noout -fingerprint -sha256`` prints it."""
    return "SHA256:" + certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def defects(
    server: x509.Certificate, authorities: Sequence[x509.Certificate], now: datetime | None = None, least_days: int = 0
) -> list[str]:
    """What keeps clients from accepting a server, or soon will; with numbers. Empty where all is well.

    Args:
        server: Its certificate.
        authorities: Whom the clients trust.
        now: The time to look at; the clock's without it.
        least_days: How many days everything must still hold.
    """
    now = now or datetime.now(UTC)
    found = dated("server certificate", server, now, least_days)
    for number, authority in enumerate(authorities, 1):
        found += dated(f"authority {number}" if len(authorities) > 1 else "authority", authority, now, least_days)
    hosts = hosts_of(server)
    if not hosts:
        found.append("server certificate: names no host; expected one with subject alternative names")
    if found:
        return found
    verifier = PolicyBuilder().store(Store(list(authorities))).time(now)
    for host in hosts:
        try:
            verifier.build_server_verifier(general_names([host])[0]).verify(server, [])  # type: ignore[arg-type]
        except VerificationError as error:  # what is wrong for one is mostly wrong for all
            return [f"server certificate: no authority here vouches for it as {host} ({shown(str(error), 200)})"]
    return []


def dated(what: str, certificate: x509.Certificate, now: datetime, least_days: int = 0) -> list[str]:
    """Whether a certificate holds at a time, and for how long."""
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < since:
        return [f"{what}: not valid before {since:%Y-%m-%d %H:%M} UTC, in {_days(since - now):.1f} days; is the clock right?"]
    if now > until:
        return [f"{what}: expired on {until:%Y-%m-%d %H:%M} UTC, {_days(now - until):.1f} days ago; get or make a new one"]
    if (left := _days(until - now)) < least_days:
        return [f"{what}: expires on {until:%Y-%m-%d}, in {left:.1f} days; at least {least_days} were asked for"]
    return []


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """For how many days it still holds; negative when it is over."""
    return _days(certificate.not_valid_after_utc - (now or datetime.now(UTC)))


def read_certificates(path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates of a PEM file, in their order.

    Raises:
        ConfigurationError: There is none.
    """
    try:
        return tuple(x509.load_pem_x509_certificates(content(path)))
    except ValueError:
        raise ConfigurationError(str(path), ["holds no certificate; expected PEM"]) from None


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private EC key of a file that only its owner may read: PEM, or as OpenSSH writes it.

    Raises:
        ConfigurationError: There is none, or others may read it.
    """
    raw = content(path)
    if problem := readable_by_others(path):
        raise ConfigurationError(str(path), [problem])
    load = load_ssh_private_key if b"OPENSSH" in raw[:64] else load_pem_private_key
    try:
        key = load(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(str(path), ["no private EC key without a passphrase"])
    return key


def read_admission_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The public key under which a SuperLink admits a SuperNode: one line of OpenSSH, of a NIST curve.

    Raises:
        ConfigurationError: It is none.
    """
    return parse_admission_key(content(path), path)


def parse_admission_key(line: bytes, path: Path) -> ec.EllipticCurvePublicKey:
    """The same of a line that stands in ``path``."""
    try:
        key = load_ssh_public_key(line)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigurationError(
            str(path),
            ["no public EC key; expected the node's auth.pub: ecdsa-sha2-nistp384 AAAA..., as fedge node keygen makes it"],
        )
    return key


def write_admission_key(path: Path, comment: str) -> ec.EllipticCurvePrivateKey:
    """Makes the key under which a SuperLink admits this node; the public one lies beside it as ``PATH.pub``."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_whole(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), OWNER_ONLY)
    write_whole(path.with_name(f"{path.name}.pub"), f"{ssh_line(key.public_key())} {shown(comment, 200)}".strip() + "\n")
    return key


def ssh_line(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as OpenSSH writes it, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def ssh_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """What two people compare, as ``ssh-keygen -lf`` prints it."""
    digest = hashlib.sha256(base64.b64decode(ssh_line(key).split(" ")[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def write_issued(issued: Issued, key: Path, certificate: Path, others: Sequence[x509.Certificate] = ()) -> None:
    """Writes a key for its owner alone, and its certificate, before ``others``, for everybody."""
    write_whole(key, issued.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), OWNER_ONLY)
    write_whole(certificate, pem([issued.certificate, *others]))


def pem(certificates: Sequence[x509.Certificate]) -> bytes:
    """Certificates as a file holds them."""
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def readable_by_others(path: Path) -> str:
    """What is wrong with a secret's mode; empty where nothing is."""
    mode = path.stat().st_mode & 0o777
    return f"others than its owner may read it (mode {mode:o}); chmod 600 it" if mode & 0o077 else ""


def content(path: Path) -> bytes:
    """A small file.

    Raises:
        ConfigurationError: It cannot be read, or is no small file.
    """
    problem = "is missing" if not path.exists() else "is no ordinary file" if not path.is_file() else ""
    if not problem:
        try:
            with path.open("rb") as file:
                raw = file.read(_LONGEST_FILE + 1)
            if len(raw) <= _LONGEST_FILE:
                return raw
            problem = f"is longer than {_LONGEST_FILE:,} bytes"
        except OSError as error:
            problem = f"cannot be read ({type(error).__name__})"
    raise ConfigurationError(str(path), [problem])


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _constraint(name: x509.GeneralName) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_network(name.value)) if isinstance(name, x509.IPAddress) else name


def _permits(authority: x509.Certificate, name: x509.GeneralName) -> bool:
    """Whether its name constraints, if it has any, allow a name (RFC 5280, 4.2.1.10)."""
    try:
        constraints = authority.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return True
    allowed = [each.value for each in constraints.permitted_subtrees or () if type(each) is type(name)]
    if isinstance(name, x509.IPAddress):
        return any(name.value in network for network in allowed)
    return any(name.value == each or str(name.value).endswith(f".{each}") for each in allowed)


def _days(span: timedelta) -> float:
    return span / timedelta(days=1)
