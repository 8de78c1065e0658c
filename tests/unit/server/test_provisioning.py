"""A coordinator's folder is made whole or not at all, changed without loss, and says what is wrong with it, with numbers."""

import sqlite3
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from typer.testing import CliRunner

from client import credentials
from fedge import app
from protocol import certificates
from protocol.audit import read as read_audit
from protocol.audit import verify as verify_audit
from protocol.certificates import read_certificates
from protocol.enrolment import read_enrolment
from protocol.errors import ConfigurationError
from protocol.signature import make_key, write_pair
from protocol.signed_apps import verifications
from server import provisioning, superlink
from server.provisioning import check, enrol, provision, revoke

SECRETS = ("ca.key", "server.key", "identity", "release", "superexec.secret")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    provision(tmp_path / "c", ["fl.example.org"], "consortium", 365, 3650)
    return tmp_path / "c"


def node(folder: Path, name: str) -> Path:
    credentials.keygen(folder.parent / name, name)
    return folder.parent / name


def enrolled(folder: Path, name: str = "bank") -> Path:
    own = node(folder, name)
    enrol(folder, name, own / "identity.pub", auth_key=own / "auth.pub")
    return own


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_new_folder_holds_together_and_keeps_its_secrets(folder: Path) -> None:
    lines = check(folder, 360)
    assert "365 days" in lines[1]
    assert {(folder / name).stat().st_mode & 0o777 for name in SECRETS} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert set(read_enrolment(folder / "enrolled.yaml").coordinators) == {"consortium"}
    assert len((folder / "superexec.secret").read_bytes()) == 32


def test_nothing_is_written_over_or_left_half_made(folder: Path, tmp_path: Path) -> None:
    before = content(folder)
    with pytest.raises(ConfigurationError, match="its keys would be lost"):
        provision(folder, ["fl.example.org"], "consortium", 365, 3650)
    with pytest.raises(ConfigurationError, match="expected a host name"):
        provision(tmp_path / "new", ["http://fl.example.org"], "consortium", 365, 3650)
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_name_is_enrolled_with_its_keys_and_compared_with_what_its_owner_told(folder: Path) -> None:
    own = node(folder, "bank")
    identity, auth = (path / "identity.pub" for path in (own, own)), own / "auth.pub"
    key = next(iter(identity))
    told = enrol(folder, "bank", key, auth_key=auth).fingerprints
    assert told[1] == certificates.ssh_fingerprint(certificates.read_admission_key(auth))
    assert set(read_enrolment(folder / "enrolled.yaml").nodes) == {"bank"}
    assert set(provisioning.admission_keys(folder)) == {"bank"}
    other = node(folder, "clinic")
    before = content(folder)
    for expected in (told, told[:1], ("SHA256:guess",)):
        with pytest.raises(ConfigurationError, match="by another way than they came"):
            enrol(folder, "clinic", other / "identity.pub", auth_key=other / "auth.pub", expected=expected)
    assert content(folder) == before
    own_told = credentials.fingerprint(credentials.read_private(other / "identity").public_key())
    assert enrol(folder, "clinic", other / "identity.pub", expected=[own_told]).fingerprints == (own_told,)


@pytest.mark.parametrize(
    ("name", "key", "auth", "role", "said"),
    [
        ("bank", "clinic", "clinic", "node", "is enrolled already; --replace"),
        ("clinic", "bank", "clinic", "node", "has the key of bank"),
        ("clinic", "clinic", "bank", "node", "is the key of bank already"),
        ("clinic", "clinic", "clinic", "auditor", "leave it out for role auditor"),
        ("x" * 81, "clinic", "clinic", "node", "1 to 80 letters"),
        ("a\nb", "clinic", "clinic", "node", "that can be printed"),
    ],
)
def test_whom_one_cannot_enrol(folder: Path, name: str, key: str, auth: str, role, said: str) -> None:
    enrolled(folder)
    node(folder, "clinic")
    before = content(folder)
    keys = {each: folder.parent / each for each in ("bank", "clinic")}
    with pytest.raises(ConfigurationError, match=said):
        enrol(folder, name, keys[key] / "identity.pub", auth_key=keys[auth] / "auth.pub", role=role)
    assert content(folder) == before


@pytest.mark.parametrize("wrong", ["identity", "auth.pub", "superexec.secret", "nothing"])
def test_what_is_no_public_key_is_not_enrolled(folder: Path, wrong: str) -> None:
    own = node(folder, "bank")
    with pytest.raises(ConfigurationError):
        enrol(folder, "bank", own / wrong)
    with pytest.raises(ConfigurationError):
        enrol(folder, "bank", own / "identity.pub", auth_key=own / ("identity.pub" if wrong == "auth.pub" else wrong))
    assert not read_enrolment(folder / "enrolled.yaml").nodes


def test_a_revoked_key_stays_known_and_comes_back_under_no_name(folder: Path) -> None:
    own = enrolled(folder)
    revoke(folder, "bank")
    gone = read_enrolment(folder / "enrolled.yaml").revoked["bank"]
    assert gone.since in (date.today(), datetime.now(UTC).date())
    assert not provisioning.admission_keys(folder)
    with pytest.raises(ConfigurationError, match="was revoked on"):
        revoke(folder, "bank")
    with pytest.raises(ConfigurationError, match="not enrolled; enrolled are consortium"):
        revoke(folder, "court")
    for name in ("bank", "museum"):
        with pytest.raises(ConfigurationError, match="was revoked on"):
            enrol(folder, name, own / "identity.pub", replaces=True)
    new = node(folder, "new")
    assert enrol(folder, "bank", new / "identity.pub", replaces=True).replaced == credentials.fingerprint(gone.key)
    assert set(read_enrolment(folder / "enrolled.yaml").nodes) == {"bank"}


def test_a_line_that_somebody_wrote_by_hand_is_revoked_as_well(folder: Path) -> None:
    own = node(folder, "bank")
    with (folder / "enrolled.yaml").open("a") as file:
        file.write(f"bank: {(own / 'identity.pub').read_text()}")
    revoke(folder, "bank")
    assert read_enrolment(folder / "enrolled.yaml").revoked["bank"].role == "node"


def test_a_new_certificate_comes_from_the_same_authority_for_the_same_hosts(folder: Path) -> None:
    (before,) = read_certificates(folder / "server.crt")
    key = (folder / "server.key").read_bytes()
    provisioning.rotate_server(folder, [], 90)
    (after,) = read_certificates(folder / "server.crt")
    assert certificates.hosts_of(after) == certificates.hosts_of(before)
    assert (folder / "server.key").read_bytes() != key
    assert after.issuer == before.issuer
    with pytest.raises(ConfigurationError, match=r"other\.org: it was made for other hosts"):
        provisioning.rotate_server(folder, ["other.org"], 90)
    assert read_certificates(folder / "server.crt") == (after,)


def test_no_client_is_cut_off_while_the_authority_changes(folder: Path) -> None:
    """At each step the SuperLink's certificate holds for whoever has the file of this step or of the one before."""

    def holds(*files: tuple[x509.Certificate, ...]) -> bool:
        (server,) = read_certificates(folder / "server.crt")
        return all(certificates.defects(server, each) == [] for each in files)

    first = read_certificates(folder / "ca.crt")
    with pytest.raises(ConfigurationError, match="no old one to drop"):
        provisioning.drop_old_authority(folder)
    provisioning.rotate_authority(folder, [], 3650)
    second = read_certificates(folder / "ca.crt")
    assert holds(first, second)
    with pytest.raises(ConfigurationError, match="still from the old authority"):
        provisioning.drop_old_authority(folder)
    with pytest.raises(ConfigurationError, match="holds 2 authorities"):
        provisioning.rotate_authority(folder, [], 3650)
    provisioning.rotate_server(folder, [], 365)
    assert holds(second)
    assert not holds(first)
    provisioning.drop_old_authority(folder)
    third = read_certificates(folder / "ca.crt")
    assert holds(second, third)
    assert len(third) == 1


def test_an_authority_s_key_that_is_kept_elsewhere_is_missed_only_by_who_needs_it(folder: Path) -> None:
    for name in ("ca.key", "release"):
        (folder / name).unlink()
    check(folder)
    with pytest.raises(ConfigurationError, match="bring it back"):
        provisioning.rotate_server(folder, [], 9)


def swapped(folder: Path) -> None:
    (folder / "server.key").write_bytes((folder / "ca.key").read_bytes())


def strange_identity(folder: Path) -> None:
    (folder / "identity").unlink()
    (folder / "identity.pub").unlink()
    write_pair(folder / "identity", make_key())


def twice(folder: Path) -> None:
    enrolled(folder)
    (line,) = yaml.safe_load((folder / "supernodes.yaml").read_text()).values()
    (folder / "supernodes.yaml").write_text(yaml.safe_dump({"bank": line, "clinic": line}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "superexec.secret").unlink(), "superexec.secret: is missing"),
        (lambda folder: (folder / "identity").chmod(0o644), r"identity: others .*mode 644"),
        (lambda folder: (folder / "ca.key").chmod(0o640), r"ca.key: others .*mode 640"),
        (swapped, "server.key: is not the key of server.crt"),
        (strange_identity, "no coordinator in enrolled.yaml has this key"),
        (twice, "clinic is no node(.|\n)*clinic has the key of bank"),
        (lambda folder: (folder / "ca.crt").write_bytes(b"x"), "holds no certificate"),
        (lambda folder: (folder / "enrolled.yaml").write_text("bank: x\n"), "bank is no public Ed25519 key"),
        (lambda folder: (folder / "supernodes.yaml").write_text("[1]\n"), "expected lines such as"),
    ],
)
def test_a_check_says_what_is_wrong_and_the_verb_exits_with_2(folder: Path, spoil, said: str) -> None:
    spoil(folder)
    with pytest.raises(ConfigurationError, match=said):
        check(folder)
    for verb in ("check", "serve"):
        found = CliRunner().invoke(app, ["coordinator", verb, str(folder)])
        assert isinstance(found.exception, ConfigurationError)  # fedge.main makes 2 of it
        assert "flower-superlink" not in found.output


def test_days_are_counted(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expires on .*, in 365\.0 days; at least 400"):
        check(folder, 400)
    with pytest.raises(ConfigurationError, match=r"expired on .*, 35\.0 days ago"):
        check(folder, 0, datetime.now(UTC) + timedelta(400))
    with pytest.raises(ConfigurationError, match=r"not valid before .*, in 10\.0 days"):
        check(folder, 0, datetime.now(UTC) - timedelta(10))


def test_several_may_sign_an_app_and_a_superlink_gets_all_of_it(folder: Path, tmp_path: Path) -> None:
    """The table is Flower's (``fab``: its hash, content and verifications); an app may come before or after it is signed."""
    write_pair(tmp_path / "reviewer", make_key())
    digest, _ = provisioning.sign(folder, b"app")
    assert provisioning.sign(folder, b"app", tmp_path / "reviewer")[0] == digest
    (signatures,) = provisioning.signed_apps(folder).values()
    assert len(signatures) == 2
    database = tmp_path / "superlink.db"
    with pytest.raises(ConnectionError):
        superlink.attach_signatures(database, folder)
    late, _ = provisioning.sign(folder, b"late")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE fab (fab_hash VARCHAR PRIMARY KEY, content BLOB, verifications VARCHAR NOT NULL)")
        connection.execute("INSERT INTO fab VALUES (?, x'00', '{}')", (late,))
        connection.commit()
        superlink.attach_signatures(database, folder)
        superlink.attach_signatures(database, folder)
        put = (
            "INSERT INTO fab VALUES (?, x'00', '{}') ON CONFLICT (fab_hash) DO UPDATE SET "
            "content = excluded.content, verifications = excluded.verifications"
        )
        for _ in range(2):
            connection.executemany(put, [(digest,), (late,), ("0" * 64,)])
            found = dict(connection.execute("SELECT fab_hash, verifications FROM fab"))
            assert found[digest] == verifications(signatures)
            assert found[late] == verifications(provisioning.signed_apps(folder)[late])
            assert found["0" * 64] == "{}"


def test_a_superlink_is_started_the_safe_way(folder: Path) -> None:
    link, starter = superlink.commands(folder, "127.0.0.1", 8000)
    assert {"--enable-supernode-auth", "--ssl-certfile", "--disable-runtime-dependency-installation"} <= set(link)
    assert link[link.index("--isolation") + 1] == "process"
    assert "--insecure" not in link + starter
    secret = str(folder / "superexec.secret")
    assert (
        link[link.index("--superexec-auth-secret-file") + 1]
        == starter[starter.index("--superexec-auth-secret-file") + 1]
        == secret
    )
    assert "--insecure" in superlink.commands(folder, "127.0.0.1", 8000, tls=False)[0]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8000"),
        ("0.0.0.0", "127.0.0.1:8000"),  # noqa: S104
        ("::", "[::1]:8000"),
        ("2001:db8::7", "[2001:db8::7]:8000"),
        ("10.1.2.3", "10.1.2.3:8000"),
    ],
)
def test_its_own_processes_reach_a_superlink_wherever_it_listens(host: str, address: str) -> None:
    assert superlink.reachable(host, 8000) == address


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "fl.example.org"])  # noqa: S104
def test_others_reach_a_superlink_only_if_that_is_said_by_name(folder: Path, host: str) -> None:
    superlink.check_address("127.0.0.1", exposed=False)
    superlink.check_address(host, exposed=True)
    found = CliRunner().invoke(app, ["coordinator", "serve", str(folder), "--host", host, "--show"])
    assert "others could start runs there" in str(found.exception)


def test_a_coordinator_s_verbs_go_through_a_whole_life(tmp_path: Path) -> None:
    def said(*arguments: object) -> str:
        found = CliRunner().invoke(app, ["coordinator", *map(str, arguments)])
        assert found.exit_code == 0, found.exception
        return found.output

    folder = tmp_path / "c"
    told = said("provision", folder, "--host", "fl.example.org", "--host", "10.1.2.3")
    assert f"trust: {{enrolled: {folder}/enrolled.yaml, identity: {folder}/identity}}" in told
    own = node(folder, "bank")
    assert said("enrol", folder, "bank", own / "identity.pub", "--auth-key", own / "auth.pub").count("SHA256:") == 3
    assert "role: auditor" in (
        said("enrol", folder, "watch", folder / "release.pub", "--role", "auditor") and (folder / "enrolled.yaml").read_text()
    )
    assert "revoked bank" in said("revoke", folder, "bank")
    said("rotate", folder, "--authority")
    said("rotate", folder, "--days", 90)
    said("rotate", folder, "--drop-old")
    assert "revoked bank" in said("check", folder)
    events = [line.event for line in read_audit(folder / "audit.jsonl")]
    assert events == ["provisioned", "enrolled", "enrolled", "revoked", "rotated", "rotated", "dropped"]
    verify_audit(folder / "audit.jsonl", read_enrolment(folder / "enrolled.yaml").coordinators.values())
    assert said("serve", folder, "--show").startswith("flower-superlink --host 127.0.0.1 --port 8000")
