"""A coordinator's folder: its authority, its SuperLink's certificate, its keys, and who is enrolled.

    ca.key, ca.crt            the authority; nodes get ca.crt, which may hold the next or the last authority, too
    server.key, server.crt    the SuperLink's
    identity, identity.pub    the coordinator's Ed25519 key: signs messages and released adapters
    release, release.pub      signs apps that nodes may run; belongs elsewhere than on the SuperLink's machine
    enrolled.yaml             who takes part, with keys and roles; nodes get it
    supernodes.yaml           under which key the SuperLink admits each node
    superexec.secret          what the SuperLink and its own processes share
    apps/                     signatures of apps; superlink.db: Flower's state
    audit.jsonl               what was done with the folder, chained and signed (protocol.audit)

Secrets have mode 0600 and never leave the folder. ``ca.key`` and ``release`` may be kept elsewhere between two uses.
"""

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from protocol import certificates
from protocol.audit import FILE as AUDIT
from protocol.audit import AuditLog
from protocol.certificates import Issued
from protocol.configuration import read_yaml
from protocol.enrolment import Enrolment, Role, read_enrolment
from protocol.errors import ConfigurationError, SignatureError, shown
from protocol.files import whole_folder, write_whole
from protocol.signature import fingerprint, key_id, make_key, read_private, read_trusted, write_pair
from protocol.signed_apps import sign_app

CA_KEY, CA, SERVER_KEY, SERVER = "ca.key", "ca.crt", "server.key", "server.crt"
IDENTITY, RELEASE, SECRET = "identity", "release", "superexec.secret"
ENROLLED, SUPERNODES, APPS = "enrolled.yaml", "supernodes.yaml", "apps"
_SECRETS: Final = (SERVER_KEY, IDENTITY, SECRET)
_KEPT_ELSEWHERE: Final = (CA_KEY, RELEASE)  # where they lie here, nobody else may read them either
_SECRET_BYTES = 32
_HEAD = "# name: key and role. Coordinator and nodes have the same list; fedge coordinator enrol and revoke write it.\n"


@dataclass(frozen=True)
class Enrolled:
    """What was enrolled under a name.

    Attributes:
        fingerprints: Of the new keys, the Ed25519 one first.
        replaced: Fingerprint of the key that counted before; empty where the name is new.
    """

    fingerprints: tuple[str, ...]
    replaced: str


def provision(folder: Path, hosts: Sequence[str], name: str, days: int, authority_days: int) -> list[str]:
    """Makes the whole folder, or nothing.

    Args:
        folder: A new one.
        hosts: Names and IP addresses under which nodes reach the SuperLink.
        name: What the coordinator is enrolled as.
        days: How long the SuperLink's certificate holds.
        authority_days: How long the authority does.

    Returns:
        As ``check``.

    Raises:
        ConfigurationError: There is something already; a host that is none.
    """
    authority = certificates.make_authority(name, hosts, authority_days)
    server = certificates.make_server(authority, hosts, days)
    try:
        with whole_folder(folder, replaces=False) as draft:
            certificates.write_issued(authority, draft / CA_KEY, draft / CA)
            certificates.write_issued(server, draft / SERVER_KEY, draft / SERVER)
            identity = make_key()
            public = write_pair(draft / IDENTITY, identity, name)
            write_pair(draft / RELEASE, make_key(), f"{name} release")
            write_whole(draft / SECRET, secrets.token_bytes(_SECRET_BYTES), certificates.OWNER_ONLY)
            _write_enrolled(draft, {name: {"key": public.read_text().strip(), "role": "coordinator"}})
            _write(draft / SUPERNODES, {})
            (draft / APPS).mkdir()
    except FileExistsError:
        raise ConfigurationError(
            str(folder), ["is there already, and its keys would be lost; choose another folder, or rotate what is in it"]
        ) from None
    folder.chmod(0o700)
    _record(folder, "provisioned", coordinator=name, authority=certificates.fingerprint(authority.certificate))
    return check(folder)


def enrol(
    folder: Path,
    name: str,
    key: Path,
    *,
    role: Role = "node",
    auth_key: Path | None = None,
    expected: Sequence[str] = (),
    replaces: bool = False,
) -> Enrolled:
    """Adds a name with its public keys, or gives new keys to one that is there.

    Args:
        folder: The coordinator's.
        name: How everybody calls it.
        key: Its public Ed25519 key.
        role: What it may do.
        auth_key: Its public EC key, under which the SuperLink admits a node.
        expected: Fingerprints that its owner has told by another way; where there are any, they must be exactly these.
        replaces: Whether the name may be there, also as a revoked one.

    Raises:
        ConfigurationError: A key that is none, another's or not the expected one; a name that is taken.
    """
    public = _public(key)
    admission = certificates.read_admission_key(auth_key) if auth_key else None
    found = (fingerprint(public), *((certificates.ssh_fingerprint(admission),) if admission else ()))
    if expected and set(expected) != set(found):
        raise ConfigurationError(
            f"the keys of {shown(name, 80)}",
            [f"found {', '.join(found)}; their owner told {', '.join(expected)}: ask again, by another way than they came"],
        )
    if admission and role != "node":
        raise ConfigurationError(str(auth_key), [f"a SuperLink admits nodes; leave it out for role {role}"])
    content = _entries(folder)
    was = content.get(name)
    if was is not None and not replaces:
        raise ConfigurationError(
            str(folder / ENROLLED), [f"{shown(name, 80)}: is enrolled already; --replace gives it new keys"]
        )
    before = read_enrolment(folder / ENROLLED)
    for other, gone in before.revoked.items():
        if key_id(gone.key) == key_id(public):
            raise ConfigurationError(str(key), [f"{before.why_not(other)}; its owner makes a new one"])
    replaced = _key_of(before, name)
    admitted = _admitted(folder)
    for other, line in admitted.items():
        if admission and other != name and line == certificates.ssh_line(admission):
            raise ConfigurationError(str(auth_key), [f"is the key of {shown(other, 80)} already; each node makes its own"])
    entry: dict[str, Any] = {"key": " ".join(key.read_text(encoding="utf-8").split()[:2]), "role": role}
    _write_enrolled(folder, content | {name: entry})
    admitted.pop(name, None)
    if admission:
        admitted[name] = certificates.ssh_line(admission)
    _write(folder / SUPERNODES, admitted)
    _record(folder, "enrolled", name=name, role=role, keys=list(found), replaced=replaced)
    return Enrolled(found, replaced)


def revoke(folder: Path, name: str) -> str:
    """From now on the key of a name counts no more, and the SuperLink admits its node no more.

    Returns:
        The fingerprint of the key.

    Raises:
        ConfigurationError: There is no such name, or it was revoked before.
    """
    content = _entries(folder)
    enrolment = read_enrolment(folder / ENROLLED)
    if name not in content:
        raise ConfigurationError(str(folder / ENROLLED), [f"{shown(name, 80)}: not enrolled; enrolled are {_names(enrolment)}"])
    if name in enrolment.revoked:
        raise ConfigurationError(str(folder / ENROLLED), [enrolment.why_not(name)])
    said = content[name]
    entry = dict(said) if isinstance(said, dict) else {"key": said, "role": "node"}
    _write_enrolled(folder, content | {name: entry | {"revoked": datetime.now(UTC).date()}})
    admitted = _admitted(folder)
    admitted.pop(name, None)
    _write(folder / SUPERNODES, admitted)
    _record(folder, "revoked", name=name, key=_key_of(enrolment, name))
    return _key_of(enrolment, name)


def rotate_server(folder: Path, hosts: Sequence[str], days: int) -> list[str]:
    """A new key and certificate for the SuperLink, from the authority that is there.

    Args:
        folder: The coordinator's.
        hosts: For whom; those of the old certificate without any.
        days: How long it holds.

    Raises:
        ConfigurationError: The authority's key is not here, is over, or may not vouch for a host.
    """
    authority = _authority(folder)
    (old,) = certificates.read_certificates(folder / SERVER)[:1]
    issued = certificates.make_server(authority, hosts or _public_hosts(old), days)
    certificates.write_issued(issued, folder / SERVER_KEY, folder / SERVER)
    _record(folder, "rotated", what="server", certificate=certificates.fingerprint(issued.certificate))
    return check(folder)


def rotate_authority(folder: Path, hosts: Sequence[str], days: int) -> list[str]:
    """A new authority beside the old one, which still vouches for the SuperLink; nodes need the new ``ca.crt`` before it does.

    Raises:
        ConfigurationError: There are two already.
    """
    known = certificates.read_certificates(folder / CA)
    if len(known) > 1:
        raise ConfigurationError(
            str(folder / CA), [f"holds {len(known)} authorities; drop the old one before there is another"]
        )
    (server,) = certificates.read_certificates(folder / SERVER)[:1]
    issued = certificates.make_authority(_coordinator(folder), hosts or _public_hosts(server), days)
    certificates.write_issued(issued, folder / CA_KEY, folder / CA, known)
    _record(folder, "rotated", what="authority", certificate=certificates.fingerprint(issued.certificate))
    return check(folder)


def drop_old_authority(folder: Path) -> list[str]:
    """Trusts the newest authority alone.

    Raises:
        ConfigurationError: The SuperLink's certificate is not yet from it.
    """
    newest, *old = certificates.read_certificates(folder / CA)
    (server,) = certificates.read_certificates(folder / SERVER)[:1]
    if not old:
        raise ConfigurationError(str(folder / CA), ["holds one authority; there is no old one to drop"])
    if problems := certificates.defects(server, [newest]):
        raise ConfigurationError(
            str(folder / SERVER),
            [*problems, "is still from the old authority; rotate it first, once every node has the new ca.crt"],
        )
    write_whole(folder / CA, certificates.pem([newest]))
    _record(folder, "dropped", what="authority", certificate=certificates.fingerprint(old[0]))
    return check(folder)


def check(folder: Path, least_days: int = 0, now: datetime | None = None) -> list[str]:
    """Whether everything that a SuperLink starts with holds; nothing is changed.

    Args:
        folder: The coordinator's.
        least_days: How many days its certificates must still hold.
        now: The time to look at; the clock's without it.

    Returns:
        What there is, a line each: fingerprints to compare, and until when.

    Raises:
        ConfigurationError: Every problem, with numbers.
    """
    problems = [
        f"{name}: is missing" for name in (*_SECRETS, CA, SERVER, ENROLLED, SUPERNODES) if not (folder / name).is_file()
    ]
    if problems:
        raise ConfigurationError(str(folder), [*problems, "expected a folder that fedge coordinator provision made"])
    there = [name for name in (*_SECRETS, *_KEPT_ELSEWHERE) if (folder / name).exists()]
    problems = [f"{name}: {why}" for name in there if (why := certificates.readable_by_others(folder / name))]
    authorities = certificates.read_certificates(folder / CA)
    server = certificates.read_certificates(folder / SERVER)[0]
    for key, certificate in ((CA_KEY, authorities[0]), (SERVER_KEY, server)):
        path = folder / key
        if not path.exists() or certificates.readable_by_others(path):
            continue
        if certificates.read_key(path).public_key() != certificate.public_key():
            problems.append(f"{key}: is not the key of {Path(key).stem}.crt; the two belong together")
    problems += certificates.defects(server, authorities, now, least_days)
    lines = [_told(f"authority{' (old)' if number else ''}", each, now) for number, each in enumerate(authorities)]
    lines += [_told("SuperLink", server, now), f"  for {', '.join(certificates.hosts_of(server))}"]
    enrolment = read_enrolment(folder / ENROLLED)
    problems += _unmatched(folder, enrolment)
    if problems:
        raise ConfigurationError(str(folder), problems)
    if (folder / f"{RELEASE}.pub").exists():
        lines.append(f"release key  {fingerprint(_public(folder / f'{RELEASE}.pub'))}")
    admitted = _admitted(folder)
    for role, keys in (("coordinator", enrolment.coordinators), ("auditor", enrolment.auditors), ("node", enrolment.nodes)):
        for name, public in keys.items():
            without = "  (no SuperNode key: not admitted)" if role == "node" and name not in admitted else ""
            lines.append(f"{role} {shown(name, 80)}  {fingerprint(public)}{without}")
    lines += [
        f"revoked {shown(name, 80)}  {fingerprint(gone.key)}  on {gone.since}" for name, gone in enrolment.revoked.items()
    ]
    return lines


def sign(folder: Path, app: bytes, key: Path | None = None) -> tuple[str, str]:
    """Signs an app, so that nodes which trust the key run it.

    Args:
        folder: The coordinator's.
        app: The FAB.
        key: Whose signature; the folder's release key without it. Several may sign the same app.

    Returns:
        The app's SHA-256, and the fingerprint of the signer.
    """
    private = read_private(key or folder / RELEASE)
    digest = hashlib.sha256(app).hexdigest()
    path = folder / APPS / f"{digest}.yaml"
    before = read_yaml(path) if path.exists() else {}
    _write(path, before | sign_app(app, private, int(time.time())))
    _record(folder, "signed", app=digest, key=fingerprint(private.public_key()))
    return digest, fingerprint(private.public_key())


def signed_apps(folder: Path) -> dict[str, dict[str, str]]:
    """The signatures of every app that was signed, by its SHA-256."""
    return {path.stem: dict(read_yaml(path)) for path in sorted((folder / APPS).glob("*.yaml"))}


def admission_keys(folder: Path) -> dict[str, ec.EllipticCurvePublicKey]:
    """Under which key the SuperLink is to admit each node that is enrolled and not revoked.

    Raises:
        ConfigurationError: A file that does not hold what it should.
    """
    enrolment = read_enrolment(folder / ENROLLED)
    return {name: _admission(folder, line) for name, line in _admitted(folder).items() if name in enrolment.nodes}


def _record(folder: Path, event: str, **facts: Any) -> None:
    AuditLog(folder / AUDIT, read_private(folder / IDENTITY)).write(event, **facts)


def _unmatched(folder: Path, enrolment: Enrolment) -> list[str]:
    """Names and keys that do not belong together."""
    problems = []
    own = (
        key_id(read_private(folder / IDENTITY).public_key()) if not certificates.readable_by_others(folder / IDENTITY) else b""
    )
    if own and own not in map(key_id, enrolment.coordinators.values()):
        problems.append(f"{IDENTITY}: no coordinator in {ENROLLED} has this key; nodes would refuse what it signs")
    seen: dict[str, str] = {}
    for name, line in _admitted(folder).items():
        told = shown(name, 80)
        if name not in enrolment.nodes:
            problems.append(f"{SUPERNODES}: {told} is no node in {ENROLLED}; revoke or enrol it")
        if (owner := seen.setdefault(line, name)) != name:
            problems.append(f"{SUPERNODES}: {told} has the key of {shown(owner, 80)}; each node makes its own")
        try:
            _admission(folder, line)
        except ConfigurationError as error:
            problems += error.problems
    return problems


def _admission(folder: Path, line: str) -> ec.EllipticCurvePublicKey:
    return certificates.parse_admission_key(line.encode(), folder / SUPERNODES)


def _authority(folder: Path) -> Issued:
    key = folder / CA_KEY
    if not key.exists():
        raise ConfigurationError(str(key), ["is not here; bring it back from where it is kept, for this one command"])
    issued = Issued(certificates.read_key(key), certificates.read_certificates(folder / CA)[0])
    if issued.key.public_key() != issued.certificate.public_key():
        raise ConfigurationError(str(key), [f"is not the key of {CA}; the two belong together"])
    return issued


def _public(path: Path) -> Any:
    try:
        keys = read_trusted(path)
    except SignatureError as error:
        raise ConfigurationError(str(path), [str(error).removeprefix(f"{path}: ")]) from None
    if len(keys) != 1:
        raise ConfigurationError(str(path), [f"holds {len(keys)} keys; expected the one of this name"])
    return keys[0]


def _key_of(enrolment: Enrolment, name: str) -> str:
    if gone := enrolment.revoked.get(name):
        return fingerprint(gone.key)
    found = {**enrolment.nodes, **enrolment.coordinators, **enrolment.auditors}.get(name)
    return fingerprint(found) if found else ""


def _names(enrolment: Enrolment) -> str:
    return ", ".join(shown(name, 80) for each in (enrolment.nodes, enrolment.coordinators, enrolment.auditors) for name in each)


def _coordinator(folder: Path) -> str:
    return next(iter(read_enrolment(folder / ENROLLED).coordinators), "coordinator")


def _public_hosts(certificate: Any) -> list[str]:
    hosts = certificates.hosts_of(certificate)
    return [host for host in hosts if host not in certificates.LOCAL] or hosts


def _told(what: str, certificate: Any, now: datetime | None) -> str:
    left = certificates.days_left(certificate, now)
    return f"{what}  {certificates.fingerprint(certificate)}  until {certificate.not_valid_after_utc:%Y-%m-%d}, {left:.0f} days"


def _entries(folder: Path) -> dict[str, Any]:
    read_enrolment(folder / ENROLLED)  # says every problem
    return dict(read_yaml(folder / ENROLLED))


def _admitted(folder: Path) -> dict[str, str]:
    path = folder / SUPERNODES
    content = read_yaml(path) if path.exists() else {}
    if not isinstance(content, dict) or not all(isinstance(each, str) for pair in content.items() for each in pair):
        raise ConfigurationError(str(path), ["expected lines such as bank: ecdsa-sha2-nistp384 AAAA..."])
    return content


def _write_enrolled(folder: Path, content: dict[str, Any]) -> None:
    """Only a list that can be read takes the place of the one that is there."""
    draft = folder / f".{ENROLLED}"
    write_whole(draft, _HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
    try:
        read_enrolment(draft)
    except ConfigurationError as error:
        raise ConfigurationError(str(folder / ENROLLED), error.problems) from None
    else:
        draft.replace(folder / ENROLLED)
    finally:
        draft.unlink(missing_ok=True)


def _write(path: Path, content: dict[str, str]) -> None:
    write_whole(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
