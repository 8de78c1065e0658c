"""Between a node and its SuperLink nobody can stand: against a real SuperLink, and never without the good twin of each case.

A case counts only because its twin, the same call with the one thing mended, is accepted.
"""

import hashlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth.superexec import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.start_client_internal import _verify_fab
from middle import Middle, leaf, with_certificate

from client import credentials
from protocol import certificates
from protocol.certificates import Issued, make_authority, make_server, read_certificates, read_key
from protocol.errors import ConfigurationError, SecureSumError
from protocol.secure_sum.node import ADVERT, Node, check_adverts
from protocol.secure_sum.terms import Terms
from protocol.signature import make_key, sign
from protocol.signed_apps import sign_app, trusted_entities
from server import provisioning

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
REFUSED = (httpx.HTTPError, FlowerError, RuntimeError)
NODES = ("bank", "clinic", "court", "guest")


@dataclass
class Link:
    """A SuperLink that runs, with the folders of everybody."""

    folder: Path
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def authority(self) -> Path:
        return self.folder / "coordinator" / "ca.crt"

    def issuer(self) -> Issued:
        return Issued(read_key(self.authority.with_suffix(".key")), read_certificates(self.authority)[0])

    def key(self, name: str) -> ec.EllipticCurvePrivateKey:
        return read_key(self.folder / name / "auth")

    def until(self, said: str) -> None:
        deadline = time.monotonic() + 150
        while said not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    folder = tmp_path_factory.mktemp("link")
    coordinator = folder / "coordinator"
    provisioning.provision(coordinator, ["127.0.0.1", "127.0.0.2"], "coordinator", 30, 60)
    for name in NODES:
        credentials.keygen(folder / name, name)
        provisioning.enrol(coordinator, name, folder / name / "identity.pub", auth_key=folder / name / "auth.pub")
    for name in NODES:
        for file in ("ca.crt", "enrolled.yaml"):
            (folder / name / file).write_bytes((coordinator / file).read_bytes())
        credentials.trust(folder / name, coordinator / "release.pub")
    from test_superlink import free_ports

    (port,) = free_ports(1)
    log = folder / "log"
    env = {name: value for name, value in os.environ.items() if name not in ("FLWR_HOME", "http_proxy", "HTTP_PROXY")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [sys.executable, str(ROOT / "fedge.py"), "coordinator", "serve", str(coordinator), "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    running = Link(folder, port, log)
    try:
        running.until(f"admitted: {NODES[-1]}")
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


# Between: TLS -------------------------------------------------------------------------------------------------------------


def activate(link: Link, address: str, *, authority: bytes | None = b"", insecure: bool = False, name: str = "bank") -> int:
    """A SuperNode's first call, by Flower's own client, and its last: a node that is there cannot come."""
    pem = link.authority.read_bytes() if authority == b"" else authority
    with fleet(link, address, pem, insecure, Signed(link.key(name))) as client:
        node = client.ActivateNode(as_node(link.key(name))).node_id
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    return node


def fleet(link: Link, address: str, authority: bytes | None, insecure: bool, *interceptors) -> FleetHttpClient:
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    return FleetHttpClient.from_server_address(address, insecure, None if insecure else authority, [version, *interceptors])


def public(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def passing(link: Link, folder: Path, context: ssl.SSLContext | None, address: str = "127.0.0.1") -> tuple[int, bytes]:
    """The node id that a node gets through a man in the middle, and what he could read."""
    with Middle(link.port, link.authority, context, address) as middle:
        return activate(link, middle.address), middle.read


def another_authority(link: Link) -> Issued:
    return make_server(make_authority("coordinator", ["127.0.0.1"], 60), ["127.0.0.1"], 30)


def old_authority(link: Link) -> Issued:
    """Of the consortium, before it changed to the one of today; the name is the same."""
    old = make_authority("coordinator", ["127.0.0.1", "127.0.0.2"], 60, datetime.now(UTC) - timedelta(50))
    return make_server(old, ["127.0.0.1"], 30)


def superlinks(link: Link) -> Issued:
    server = link.folder / "coordinator" / "server.crt"
    return Issued(read_key(server.with_suffix(".key")), read_certificates(server)[0])


def from_a_server(link: Link) -> Issued:
    """The SuperLink's own key used as if it were an authority's."""
    return leaf(superlinks(link))


WRONG = {
    "of another authority of the same name": another_authority,
    "self-signed": lambda link: leaf(None),
    "self-signed as an authority": lambda link: leaf(None, is_authority=True),
    "of the old authority": old_authority,
    "expired": lambda link: leaf(link.issuer(), since=-9, until=-1),
    "expired a minute ago": lambda link: leaf(link.issuer(), since=-9, until=-1 / 1440),
    "not yet valid": lambda link: leaf(link.issuer(), since=1, until=9),
    "for another name": lambda link: leaf(link.issuer(), ("localhost",)),
    "for another address": lambda link: leaf(link.issuer(), ("127.0.0.2",)),
    "without an alternative name": lambda link: leaf(link.issuer(), ()),
    "for clients": lambda link: leaf(link.issuer(), usage=ExtendedKeyUsageOID.CLIENT_AUTH),
    "signed by the SuperLink's key": from_a_server,
}


def test_a_relay_that_has_the_superlink_s_own_key_is_let_through(link: Link, tmp_path: Path) -> None:
    """The good twin of every certificate: a proxy of the coordinator's, which is what docs/deployment.md describes."""
    node, read = passing(link, tmp_path, with_certificate(tmp_path, superlinks(link)))
    assert node
    assert b"POST /v1/fleet/activate-node" in read
    mended, _ = passing(link, tmp_path, with_certificate(tmp_path, leaf(link.issuer())))
    assert mended == node


@pytest.mark.parametrize("wrong", WRONG)
def test_a_certificate_is_refused_before_anything_is_sent(link: Link, tmp_path: Path, wrong: str) -> None:
    issued = WRONG[wrong](link)
    beside = read_certificates(link.folder / "coordinator" / "server.crt") if "SuperLink's key" in wrong else ()
    with Middle(link.port, link.authority, with_certificate(tmp_path, issued, *beside)) as middle:
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            activate(link, middle.address)
        with pytest.raises(ConfigurationError, match=r"does not hold here: .*nothing was sent"):
            credentials.greet(middle.address, link.folder / "bank")
        assert middle.read == b""


@pytest.mark.parametrize(("begins", "said"), [(-20, "expired"), (1, "not yet valid")])
def test_an_authority_that_is_trusted_is_not_believed_out_of_its_time(
    link: Link, tmp_path: Path, begins: int, said: str
) -> None:
    """It holds for ten days; its twin began yesterday."""
    for since in (-1, begins):
        authority = make_authority("coordinator", ["127.0.0.1"], 10, datetime.now(UTC) + timedelta(since))
        trusted = certificates.pem([authority.certificate])
        with Middle(link.port, link.authority, with_certificate(tmp_path, leaf(authority))) as middle:
            if since == -1:
                assert activate(link, middle.address, authority=trusted)
                continue
            with pytest.raises(httpx.ConnectError, match=said):
                activate(link, middle.address, authority=trusted)
            assert middle.read == b""


def test_an_authority_cannot_vouch_for_a_host_that_it_was_not_made_for(link: Link, tmp_path: Path) -> None:
    stolen = link.issuer()
    for address, refused in (("127.0.0.3", True), ("127.0.0.2", False)):
        context = with_certificate(tmp_path, leaf(stolen, (address,)))
        with Middle(link.port, link.authority, context, address) as middle:
            if refused:
                with pytest.raises(httpx.ConnectError, match="permitted subtree violation"):
                    activate(link, middle.address)
                assert middle.read == b""
            else:
                assert activate(link, middle.address)


def tls_1_1(context: ssl.SSLContext) -> None:
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_1


def anonymous(context: ssl.SSLContext) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")


def unencrypted(context: ssl.SSLContext) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("eNULL:@SECLEVEL=0")


@pytest.mark.parametrize("weaken", [tls_1_1, anonymous, unencrypted])
def test_a_connection_is_not_talked_down(link: Link, tmp_path: Path, weaken) -> None:
    own = leaf(link.issuer())
    context = with_certificate(tmp_path, own)
    assert passing(link, tmp_path, context)[0]
    weaken(context)
    with Middle(link.port, link.authority, context) as middle:
        with pytest.raises(httpx.TransportError):
            activate(link, middle.address)
        with pytest.raises(ConfigurationError, match="nothing was sent"):
            credentials.greet(middle.address, link.folder / "bank")
        assert middle.read == b""


def test_whoever_takes_the_encryption_away_reads_no_request(link: Link, tmp_path: Path) -> None:
    assert passing(link, tmp_path, with_certificate(tmp_path, leaf(link.issuer())))[0]
    with Middle(link.port, link.authority, None) as middle:
        with pytest.raises(httpx.TransportError):
            activate(link, middle.address)
        assert middle.paths == []
        assert b"fleet" not in middle.read


def test_a_plaintext_client_gets_nothing_from_a_superlink_with_tls(link: Link) -> None:
    assert activate(link, link.address)
    with pytest.raises(httpx.HTTPError):
        activate(link, link.address, insecure=True)


@pytest.mark.parametrize("trusting", ["the system's authorities", "another consortium's authority", "a node's own certificate"])
def test_a_node_that_trusts_others_reaches_nobody(link: Link, trusting: str) -> None:
    assert activate(link, link.address)
    authority = {
        "the system's authorities": None,
        "another consortium's authority": certificates.pem([make_authority("coordinator", ["127.0.0.1"], 9).certificate]),
        "a node's own certificate": certificates.pem([leaf(None).certificate]),
    }[trusting]
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        activate(link, link.address, authority=authority)


def test_a_superlink_is_not_believed_under_an_address_that_it_does_not_have(link: Link, tmp_path: Path) -> None:
    own = superlinks(link)
    with Middle(link.port, link.authority, with_certificate(tmp_path, own), "127.0.0.2") as middle:
        assert activate(link, middle.address)
    with Middle(link.port, link.authority, with_certificate(tmp_path, own), "127.0.0.9") as middle:
        with pytest.raises(httpx.ConnectError, match="IP address mismatch"):
            activate(link, middle.address)
        assert middle.read == b""


# Who calls: a node's key --------------------------------------------------------------------------------------------------


@dataclass
class Signed:
    """Flower's headers of a node, or others in their place."""

    key: ec.EllipticCurvePrivateKey
    shown: bytes | None = None
    signed_at: str = ""
    told: str = ""

    def intercept(self, context, call_next):
        at = self.signed_at or datetime.now(UTC).isoformat()
        context.request.headers.update(
            {
                FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.shown or public(self.key)).decode(),
                "flwr-timestamp": self.told or at,
                FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(self.key, at.encode())).decode(),
            }
        )
        return call_next(context)


def ask(link: Link, request, *headers, method: str = "ActivateNode"):
    with fleet(link, link.address, link.authority.read_bytes(), False, *headers) as client:
        return getattr(client, method)(request)


def as_node(key: ec.EllipticCurvePrivateKey, shown: bytes | None = None) -> ActivateNodeRequest:
    return ActivateNodeRequest(public_key=shown or public(key), heartbeat_interval=30)


def pull(link: Link, node: int, signed: "Signed"):
    return ask(link, PullMessagesRequest(node=FlowerNode(node_id=node)), signed, method="PullMessages")


def test_a_node_with_its_own_key_is_admitted(link: Link) -> None:
    """The good twin of what follows: the same calls, each with a node's own key, number and time."""
    node = activate(link, link.address)
    for minutes in (0, 4):  # Flower allows five
        at = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()
        assert not pull(link, node, Signed(link.key("bank"), signed_at=at)).messages_list


def under_another_s_name(link):
    return as_node(link.key("clinic"), public(link.key("bank"))), Signed(link.key("clinic"))


def with_another_s_public_key(link):
    return as_node(link.key("bank")), Signed(link.key("clinic"), shown=public(link.key("bank")))


def recorded(link):
    return as_node(link.key("bank")), Signed(link.key("bank"), signed_at=(datetime.now(UTC) - timedelta(minutes=6)).isoformat())


def ahead(link):
    return as_node(link.key("bank")), Signed(link.key("bank"), signed_at=(datetime.now(UTC) + timedelta(minutes=1)).isoformat())


def time_changed(link):
    at = (datetime.now(UTC) - timedelta(minutes=6)).isoformat()
    return as_node(link.key("bank")), Signed(link.key("bank"), signed_at=at, told=datetime.now(UTC).isoformat())


def another_kind_of_key(link):
    key = make_key()
    return as_node(link.key("bank"), public(key)), Signed(link.key("bank"), shown=public(key))


@pytest.mark.parametrize(
    "forged",
    [under_another_s_name, with_another_s_public_key, recorded, ahead, time_changed, another_kind_of_key],
)
def test_a_call_that_a_node_s_own_key_did_not_sign_now_is_refused(link: Link, forged) -> None:
    request, signed = forged(link)
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        ask(link, request, signed)
    assert activate(link, link.address)


def test_a_key_that_is_not_enrolled_is_refused(link: Link) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(httpx.HTTPStatusError, match="412"):
        ask(link, as_node(key), Signed(key))


def test_a_call_without_a_signature_is_refused(link: Link) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        ask(link, as_node(link.key("bank")))


def test_nobody_reads_another_node_s_messages(link: Link) -> None:
    own, other = (activate(link, link.address, name=name) for name in ("bank", "clinic"))
    assert not pull(link, own, Signed(link.key("bank"))).messages_list
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        pull(link, other, Signed(link.key("bank")))


def test_nobody_enrols_himself(link: Link) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(httpx.HTTPStatusError, match=r"4\d\d"):
        ask(link, RegisterNodeFleetRequest(public_key=public(key)), Signed(key), method="RegisterNode")
    with pytest.raises(httpx.HTTPStatusError, match="412"):
        ask(link, as_node(key), Signed(key))


def test_nobody_takes_a_node_away_from_outside(link: Link) -> None:
    node = activate(link, link.address)
    with pytest.raises(httpx.HTTPStatusError, match=r"4\d\d"):
        ask(link, UnregisterNodeFleetRequest(node_id=node), Signed(link.key("bank")), method="UnregisterNode")
    assert activate(link, link.address) == node


def test_a_revoked_node_is_turned_away_and_its_key_comes_back_under_no_name(link: Link) -> None:
    coordinator, key = link.folder / "coordinator", link.key("guest")
    assert activate(link, link.address, name="guest")
    provisioning.revoke(coordinator, "guest")
    link.until("no longer admitted: guest")
    with pytest.raises(REFUSED):
        ask(link, as_node(key), Signed(key))
    for name in ("guest", "museum"):
        with pytest.raises(ConfigurationError, match="was revoked on"):
            provisioning.enrol(coordinator, name, link.folder / "guest" / "identity.pub", replaces=True)
    # Nor does the SuperLink admit the old key for a new identity.
    credentials.keygen(link.folder / "museum", "museum")
    auth = link.folder / "guest" / "auth.pub"
    provisioning.enrol(coordinator, "museum", link.folder / "museum" / "identity.pub", auth_key=auth)
    link.until("not admitted: museum")
    with pytest.raises(REFUSED):
        ask(link, as_node(key), Signed(key))


# Who starts apps: the shared secret ---------------------------------------------------------------------------------------


@dataclass
class Secret:
    """SuperExec's headers."""

    headers: dict[str, str]

    def intercept(self, context, call_next):
        context.request.headers.update(self.headers)
        return call_next(context)


def acquire(link: Link, headers: dict[str, str], request: AcquireTaskRequest | None = None) -> object:
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    with RuntimeHttpClient.from_server_address(
        link.address, False, link.authority.read_bytes(), interceptors=[version, Secret(headers)]
    ) as client:
        return client.AcquireTask(request or AcquireTaskRequest())


def secret_of(link: Link, secret: bytes | None = None) -> dict[str, str]:
    secret = secret or (link.folder / "coordinator" / "superexec.secret").read_bytes()
    method = "/flwr.proto.Runtime/AcquireTask"
    return create_superexec_auth_metadata(auth_secret=derive_auth_secret(secret), method=method, request=AcquireTaskRequest())


@pytest.mark.parametrize("case", ["none", "another secret", "a node's", "heard before", "for another request"])
def test_tasks_are_given_to_those_who_share_the_secret(link: Link, case: str) -> None:
    headers = secret_of(link)
    assert acquire(link, headers) is not None
    request = AcquireTaskRequest(agentapp_fab_hashes=["0" * 64]) if case == "for another request" else None
    forged = {
        "none": dict,
        "another secret": lambda: secret_of(link, b"guess"),
        "a node's": lambda: secret_of(link, (link.folder / "bank" / "superexec.secret").read_bytes()),
        "heard before": lambda: headers,
        "for another request": lambda: secret_of(link),
    }[case]()
    with pytest.raises(REFUSED):
        acquire(link, forged, request)


# What runs: signatures of apps, as Flower's SuperNode checks them -----------------------------------------------------------


def fab(app: bytes, signatures: dict[str, str]) -> Fab:
    return Fab(hashlib.sha256(app).hexdigest(), app, {**signatures, "valid_license": "fedge"})


def changed(signatures: dict[str, str], **told) -> dict[str, str]:
    return {who: json.dumps(json.loads(said) | told) for who, said in signatures.items()}


@pytest.mark.parametrize(
    "case", ["none", "a stranger's", "under a trusted name", "of another app", "of another time", "a byte more"]
)
def test_an_app_runs_only_with_a_trusted_signature(case: str) -> None:
    import yaml

    release, other = make_key(), make_key()
    trusted = yaml.safe_load(trusted_entities([release.public_key()]))
    good = sign_app(b"app", release, 1_700_000_000)
    assert _verify_fab(fab(b"app", good), trusted)
    (name,) = good
    forged = {
        "none": fab(b"app", {}),
        "a stranger's": fab(b"app", sign_app(b"app", other, 1_700_000_000)),
        "under a trusted name": fab(b"app", {name: next(iter(sign_app(b"app", other, 1_700_000_000).values()))}),
        "of another app": fab(b"app", sign_app(b"bad", release, 1_700_000_000)),
        "of another time": fab(b"app", changed(good, signed_at=1_700_000_001)),
        "a byte more": fab(b"app.", good),
    }[case]
    assert not _verify_fab(forged, trusted)


# What is summed: adverts of keys ---------------------------------------------------------------------------------------------

TERMS = Terms("federation", "run", 1, 0, 4, 1.0, ("bank", "clinic", "court"))


@pytest.mark.parametrize(
    "case", ["swapped", "signed by the middle", "another node's", "of another run", "of another round", "a key too few"]
)
def test_keys_for_a_sum_that_the_middle_touches_stop_it(case: str) -> None:
    keys = {name: make_key() for name in TERMS.nodes}
    enrolled = {name: key.public_key() for name, key in keys.items()}

    def adverts(terms: Terms = TERMS) -> dict:
        return {name: Node(name, terms, key, enrolled).advertise() for name, key in keys.items()}

    good, mine = adverts(), make_key()
    check_adverts(TERMS, good, enrolled)
    middle = Node("bank", TERMS, mine, enrolled).advertise()
    forged = {
        "swapped": replace(good["bank"], masking=middle.masking),
        "signed by the middle": replace(middle, signature=sign(mine, ADVERT, middle.content(TERMS.digest, "bank"))),
        "another node's": adverts()["clinic"],
        "of another run": adverts(replace(TERMS, run="run-2"))["bank"],
        "of another round": adverts(replace(TERMS, round=2))["bank"],
        "a key too few": replace(good["bank"], masking=b""),
    }[case]
    with pytest.raises(SecureSumError):
        check_adverts(TERMS, good | {"bank": forged}, enrolled)


# Which paths a proxy lets through ------------------------------------------------------------------------------------------


def test_all_that_nodes_call_is_below_one_path_and_nothing_else_is() -> None:
    paths = {path for _, path in PROTOBUF_REQUEST_TYPES}
    fleet_paths = {path for path in paths if path.startswith("/v1/fleet/")}
    assert len(fleet_paths) == 12
    assert {path.split("/")[2] for path in paths - fleet_paths} == {"control", "runtime"}
