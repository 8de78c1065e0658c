"""Flower's SuperLink, started the safe way, and kept in step with the coordinator's folder.

It listens to this machine alone: Flower's Control API, on which runs are started, is open on the port of the Fleet API that
nodes call, so that a proxy must stand before it (docs/deployment.md). Its apps run in processes of their own that share a
secret with it, nodes need a key that is enrolled, and its state outlives it.
"""

import ipaddress
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from protocol.certificates import read_certificates
from protocol.errors import ConfigurationError, shown
from protocol.signed_apps import verifications
from server.provisioning import APPS, CA, ENROLLED, SECRET, SERVER, SERVER_KEY, SUPERNODES, admission_keys, signed_apps

DATABASE = "superlink.db"
_EVERY_SECONDS = 2.0
# An app that is stored without signatures gets those that are known of it: Flower's SuperLink takes them from its hub only.
_SIGNED: Final = """
CREATE TABLE IF NOT EXISTS fedge_signed_app (fab_hash TEXT PRIMARY KEY, verifications TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS fedge_signed_insert AFTER INSERT ON fab WHEN NEW.verifications = '{}' BEGIN
  UPDATE fab SET verifications = (SELECT verifications FROM fedge_signed_app WHERE fab_hash = NEW.fab_hash)
  WHERE fab_hash = NEW.fab_hash AND EXISTS (SELECT 1 FROM fedge_signed_app WHERE fab_hash = NEW.fab_hash);
END;
CREATE TRIGGER IF NOT EXISTS fedge_signed_update AFTER UPDATE OF verifications ON fab WHEN NEW.verifications = '{}' BEGIN
  UPDATE fab SET verifications = (SELECT verifications FROM fedge_signed_app WHERE fab_hash = NEW.fab_hash)
  WHERE fab_hash = NEW.fab_hash AND EXISTS (SELECT 1 FROM fedge_signed_app WHERE fab_hash = NEW.fab_hash);
END;
"""


def commands(folder: Path, host: str, port: int, *, tls: bool = True) -> list[list[str]]:
    """The SuperLink and the process that starts its apps.

    Args:
        folder: The coordinator's.
        host: Where it listens.
        port: On which port.
        tls: Without it nothing is encrypted and anybody is admitted.
    """
    secret = ["--superexec-auth-secret-file", str(folder / SECRET)]
    files = [
        "--ssl-ca-certfile",
        str(folder / CA),
        "--ssl-certfile",
        str(folder / SERVER),
        "--ssl-keyfile",
        str(folder / SERVER_KEY),
    ]
    superlink = ["flower-superlink", "--host", host, "--port", str(port), "--isolation", "process", *secret]
    superlink += ["--database", str(folder / DATABASE), "--disable-runtime-dependency-installation"]
    superlink += [*files, "--enable-supernode-auth"] if tls else ["--insecure"]
    superexec = ["flower-superexec", "--runtime-api-address", reachable(host, port), *secret, "--parent-pid", str(os.getpid())]
    superexec += ["--root-certificates", str(folder / CA)] if tls else ["--insecure"]
    return [superlink, superexec]


def reachable(host: str, port: int) -> str:
    """HOST:PORT under which this machine reaches what listens at ``host``."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{local}]:{port}" if ":" in local else f"{local}:{port}"


def check_address(host: str, *, exposed: bool) -> None:
    """That only this machine reaches the SuperLink, unless that was asked for.

    Raises:
        ConfigurationError: Others would reach it.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not exposed:
        raise ConfigurationError(
            "--host",
            [f"{shown(host, 80)}: others could start runs there; put a proxy before it, or say --expose-control-api"],
        )


class InStep:
    """Keeps a running SuperLink as the coordinator's folder says: call it again and again.

    Args:
        folder: The coordinator's.
        address: HOST:PORT under which this machine reaches the SuperLink.
        say: Takes a line on what was done.
    """

    def __init__(self, folder: Path, address: str, say: Callable[[str], None]) -> None:
        self._folder, self._address, self._say = folder, address, say
        self._seen: object = None
        self._next = 0.0

    def __call__(self) -> None:
        """Looks, every two seconds at most, and follows what has changed."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY_SECONDS
        now = self._state()
        if now == self._seen:
            return
        try:
            self._follow()
        except ConfigurationError as error:  # half an edit; the next one mends it
            self._say(f"not followed: {error}")
        except OSError:
            return  # it is not up yet
        self._seen = now

    def _state(self) -> object:
        paths = [self._folder / ENROLLED, self._folder / SUPERNODES, *sorted((self._folder / APPS).glob("*.yaml"))]
        return [(path, path.stat().st_mtime_ns) for path in paths if path.exists()]

    def _follow(self) -> None:
        admit(self._address, self._folder, self._say)
        attach_signatures(self._folder / DATABASE, self._folder)


def admit(address: str, folder: Path, say: Callable[[str], None]) -> None:
    """Registers the SuperNode keys of the folder at a SuperLink, and takes away all others.

    Raises:
        ConnectionError: It cannot be reached.
        ConfigurationError: The folder's files do not hold what they should.
    """
    import httpx
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.error import FlowerError
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    form = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    wanted = {key.public_bytes(*form): name for name, key in admission_keys(folder).items()}
    read_certificates(folder / CA)
    try:
        with ControlHttpClient.from_server_address(
            address, False, (folder / CA).read_bytes(), [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        ) as client:
            there = {
                node.public_key: node
                for node in client.ListNodes(ListNodesRequest()).nodes_info
                if node.status != "unregistered"
            }
            for key, node in there.items():
                if key not in wanted:
                    client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                    say(f"no longer admitted: {shown(node.name, 80)}")
            for key, name in wanted.items():
                if key not in there:
                    try:
                        made = client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
                        say(f"admitted: {shown(name, 80)}, as node-{made.node_id}")
                    except (httpx.HTTPStatusError, FlowerError):
                        say(f"not admitted: {shown(name, 80)}: this SuperLink has seen its key go; it must make a new one")
    except (httpx.HTTPError, FlowerError) as error:
        raise ConnectionError(f"{address}: {type(error).__name__}") from None


def attach_signatures(database: Path, folder: Path) -> None:
    """Gives a SuperLink's database the signatures of apps that the folder holds.

    Raises:
        ConnectionError: The SuperLink has not made its tables yet.
    """
    rows = [(digest, verifications(signatures)) for digest, signatures in signed_apps(folder).items()]
    try:
        with closing(sqlite3.connect(database, timeout=10)) as connection, connection:
            connection.executescript(_SIGNED)
            connection.executemany("INSERT OR REPLACE INTO fedge_signed_app VALUES (?, ?)", rows)
            for digest, told in rows:  # those that a run brought before they were signed
                connection.execute("UPDATE fab SET verifications = ? WHERE fab_hash = ?", (told, digest))
    except sqlite3.OperationalError as error:
        raise ConnectionError(f"{database}: {error}") from None


def build(app: Path) -> bytes:
    """The app as ``flwr run`` sends it.

    Raises:
        ConfigurationError: The folder holds none.
    """
    from flwr.cli.build import build_fab_from_disk

    try:
        return build_fab_from_disk(app)
    except (ValueError, OSError) as error:
        raise ConfigurationError(str(app), [f"no Flower app can be built from it: {shown(str(error))}"]) from None
