"""A node's folder: the keys that it has made, and what it was given by its coordinator and has checked.

    identity, identity.pub    its Ed25519 key, under which it is enrolled and signs
    auth, auth.pub            its EC key, under which Flower's SuperLink admits it
    superexec.secret          what its SuperNode and the processes of its apps share
    vault.key                 seals what it keeps on disk (protocol.vault)
    ca.crt, enrolled.yaml     from the coordinator: the authority of its SuperLink, and who takes part
    trusted.yaml              whose signed apps may run here: what the institution has decided
    node.yaml                 its settings (client.node)

Private keys are made here and never leave; ``identity.pub`` and ``auth.pub`` are what the coordinator gets.
"""

import json
import os
import secrets
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import yaml
from cryptography import x509

from protocol import certificates
from protocol.configuration import read_yaml
from protocol.enrolment import Enrolment, read_enrolment
from protocol.errors import ConfigurationError, SignatureError, shown
from protocol.files import write_whole
from protocol.signature import fingerprint, key_id, make_key, read_private, read_public, read_trusted, write_pair
from protocol.signed_apps import signer_id, trusted_entities
from protocol.vault import make_key_file

IDENTITY, AUTH, SECRET, VAULT = "identity", "auth", "superexec.secret", "vault.key"
CA, ENROLLED, TRUSTED, SETTINGS = "ca.crt", "enrolled.yaml", "trusted.yaml", "node.yaml"
_SECRETS: Final = (IDENTITY, AUTH, SECRET, VAULT)
_SECRET_BYTES = 32
_HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True)
class Standing:
    """What a node's folder amounts to.

    Attributes:
        name: Under which its key is enrolled.
        lines: What there is: fingerprints to compare, and until when.
    """

    name: str
    lines: tuple[str, ...]


def keygen(folder: Path, name: str) -> tuple[str, str]:
    """Makes a node's keys in a folder that has none.

    Returns:
        The fingerprints of both, the Ed25519 one first.

    Raises:
        ConfigurationError: One is there already.
    """
    if there := [each for each in _SECRETS if (folder / each).exists()]:
        raise ConfigurationError(
            str(folder), [f"{each}: is there already, and would be lost; choose another folder" for each in there]
        )
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    identity = make_key()
    write_pair(folder / IDENTITY, identity, name)
    auth = certificates.write_admission_key(folder / AUTH, name)
    write_whole(folder / SECRET, secrets.token_bytes(_SECRET_BYTES), certificates.OWNER_ONLY)
    make_key_file(folder / VAULT)
    return fingerprint(identity.public_key()), certificates.ssh_fingerprint(auth.public_key())


def trust(folder: Path, key: Path, expected: str = "") -> str:
    """Lets this node run apps that a key has signed.

    Args:
        folder: The node's.
        key: The public Ed25519 key of whoever reads apps before they run.
        expected: Its fingerprint, as its owner told it by another way; not compared when empty.

    Returns:
        The fingerprint of the key.

    Raises:
        ConfigurationError: It is no key, or another one.
    """
    try:
        (public,) = read_trusted(key)
    except (SignatureError, ValueError) as error:
        raise ConfigurationError(str(key), [f"expected one public Ed25519 key: {shown(str(error))}"]) from None
    found = fingerprint(public)
    if expected not in ("", found):
        raise ConfigurationError(
            str(key), [f"found {found}; its owner told {expected}: ask again, by another way than it came"]
        )
    path = folder / TRUSTED
    trusted = _trusted(path) if path.exists() else {}
    write_whole(path, yaml.safe_dump(trusted | yaml.safe_load(trusted_entities([public]))))
    return found


def check(
    folder: Path,
    *,
    coordinator: str = "",
    least_days: int = 0,
    now: datetime | None = None,
    unsigned_apps: bool = False,
    own_vault: bool = False,
) -> Standing:
    """Whether everything that a SuperNode starts with holds; nothing is changed.

    Args:
        folder: The node's.
        coordinator: A coordinator's fingerprint as told by another way; not compared when empty.
        least_days: How many days the authorities must still hold.
        now: The time to look at; the clock's without it.
        unsigned_apps: Whether apps may run that nobody has signed.
        own_vault: Whether the key of its vault lies elsewhere.

    Raises:
        ConfigurationError: Every problem, with numbers.
    """
    private = tuple(name for name in _SECRETS if name != VAULT or not own_vault)
    needed = (*private, CA, ENROLLED, *(() if unsigned_apps else (TRUSTED,)))
    advice = {CA: "ask the coordinator for it", ENROLLED: "ask the coordinator for it", TRUSTED: "fedge node trust makes it"}
    problems = [
        f"{name}: is missing; {advice.get(name, 'fedge node keygen makes it')}"
        for name in needed
        if not (folder / name).is_file()
    ]
    if problems:
        raise ConfigurationError(str(folder), problems)
    problems = [f"{name}: {why}" for name in private if (why := certificates.readable_by_others(folder / name))]
    if problems:
        raise ConfigurationError(str(folder), problems)
    identity = read_private(folder / IDENTITY).public_key()
    auth = certificates.read_key(folder / AUTH).public_key()
    authorities = certificates.read_certificates(folder / CA)
    now = now or datetime.now(UTC)
    for number, authority in enumerate(authorities, 1):
        problems += _authority(f"{CA}, number {number}", authority, now, least_days)
    enrolment = read_enrolment(folder / ENROLLED)
    own = key_id(identity)
    names = [name for name, key in enrolment.nodes.items() if key_id(key) == own]
    gone = [name for name, entry in enrolment.revoked.items() if key_id(entry.key) == own]
    problems += [enrolment.why_not(name) for name in gone]
    if not names and not gone:
        problems.append(f"{ENROLLED}: no node has the key {fingerprint(identity)}; has the coordinator enrolled it?")
    problems += _coordinators(enrolment, coordinator)
    trusted = {} if unsigned_apps else _trusted(folder / TRUSTED)
    if problems:
        raise ConfigurationError(str(folder), problems)
    lines = [f"node {shown(names[0], 80)}  {fingerprint(identity)}", f"admitted with  {certificates.ssh_fingerprint(auth)}"]
    lines += [
        f"authority  {certificates.fingerprint(each)}  until {each.not_valid_after_utc:%Y-%m-%d}, "
        f"{certificates.days_left(each, now):.0f} days"
        for each in authorities
    ]
    lines += [f"coordinator {shown(name, 80)}  {fingerprint(key)}" for name, key in enrolment.coordinators.items()]
    signers = [read_public(line.encode(), folder / TRUSTED, name) for name, line in trusted.items()]
    lines += [f"runs apps signed by  {fingerprint(key)}" for key in signers] or ["runs every app that comes"]
    return Standing(names[0], tuple(lines))


def greet(address: str, folder: Path) -> x509.Certificate | None:
    """A handshake with the coordinator's SuperLink, or its proxy, before anything is sent.

    Args:
        address: HOST:PORT.
        folder: The node's, with the authority that vouches for it.

    Returns:
        Its certificate; None where nothing answers, which may be up later.

    Raises:
        ConfigurationError: It is not the one that the authority vouches for; with the reason.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigurationError("--superlink", [f"{shown(address, 80)}: expected HOST:PORT"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(folder / CA)
    try:
        plain = socket.create_connection((host.strip("[]"), int(port)), timeout=_HANDSHAKE_SECONDS)
    except OSError:
        return None
    try:
        with plain, context.wrap_socket(plain, server_hostname=host.strip("[]")) as secured:
            return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    except ssl.SSLCertVerificationError as error:
        why = f"its certificate does not hold here: {error.verify_message}"
    except ssl.SSLError as error:
        why = f"it does not speak TLS as expected ({error.reason or type(error).__name__})"
    except OSError as error:
        why = f"it broke off the handshake ({type(error).__name__})"
    raise ConfigurationError(
        shown(address, 80), [f"{why}; nothing was sent. Is somebody between, or was a certificate rotated?"]
    )


def commands(
    folder: Path, superlink: str, port: int, node_config: Path, *, tls: bool = True, unsigned_apps: bool = False
) -> list[list[str]]:
    """The SuperNode and the process that starts its apps.

    Args:
        folder: The node's.
        superlink: HOST:PORT of the coordinator.
        port: For the node's own processes, on this machine alone.
        node_config: Its settings, for Flower.
        tls: Without it nothing is encrypted, and it is nobody that the SuperLink knows.
        unsigned_apps: Whether it runs whatever comes.
    """
    secret = ["--superexec-auth-secret-file", str(folder / SECRET)]
    local = "127.0.0.1"
    supernode = ["flower-supernode", "--superlink", superlink, "--host", local, "--port", str(port), "--isolation", "process"]
    supernode += [*secret, "--node-config", str(node_config)]
    if tls:
        supernode += ["--root-certificates", str(folder / CA), "--auth-supernode-private-key", str(folder / AUTH)]
    else:
        supernode += ["--insecure"]
    if not unsigned_apps:
        supernode += ["--trusted-entities", str(folder / TRUSTED)]
    superexec = ["flower-superexec", "--runtime-api-address", f"{local}:{port}", "--insecure", *secret]
    return [supernode, [*superexec, "--parent-pid", str(os.getpid())]]


def write_node_config(path: Path, settings: dict[str, str | bool | int | float]) -> None:
    """A node's settings as Flower reads them: TOML of numbers and texts."""
    lines = [f"{name.replace('_', '-')} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()]
    write_whole(path, "".join(lines), certificates.OWNER_ONLY)


def _authority(what: str, authority: x509.Certificate, now: datetime, least_days: int) -> list[str]:
    try:
        is_one = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_one = False
    if not is_one:
        return [f"{what}: is no authority's certificate; ask the coordinator for ca.crt"]
    return certificates.dated(what, authority, now, least_days)


def _coordinators(enrolment: Enrolment, expected: str) -> list[str]:
    found = [fingerprint(key) for key in enrolment.coordinators.values()]
    if not found:
        return [f"{ENROLLED}: holds no coordinator; this node would do nothing that it is asked"]
    if expected not in ("", *found):
        return [f"{ENROLLED}: its coordinator has {', '.join(found)}; {expected} was told: do not use this list"]
    return []


def _trusted(path: Path) -> dict[str, str]:
    """Flower passes over an empty file, and would run whatever comes."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ConfigurationError(str(path), ["trusts nobody; fedge node trust adds a key"])
    problems = []
    for name, line in content.items():
        try:
            key = read_public(str(line).encode(), path, str(name))
        except SignatureError as error:
            problems.append(str(error))
            continue
        if name != signer_id(key) and not str(name).startswith("fpk_"):
            problems.append(f"{shown(str(name), 80)}: expected {signer_id(key)}")
    if problems:
        raise ConfigurationError(str(path), problems)
    return {str(name): str(line) for name, line in content.items()}
