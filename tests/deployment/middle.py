"""A man in the middle: ends a client's TLS with the certificate that he was given, and speaks TLS to the real SuperLink."""

import contextlib
import re
import select
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.certificates import Issued, general_names, write_issued

_REQUEST = re.compile(rb"(GET|POST) (\S+) HTTP/1\.1\r\n")


class Middle:
    """Listens on this machine; ``read`` is what he could read of what clients sent, ``paths`` what they asked for."""

    def __init__(self, upstream: int, authority: Path, context: ssl.SSLContext | None, address: str = "127.0.0.1") -> None:
        self._upstream, self._context = upstream, context
        self._to_superlink = ssl.create_default_context(cafile=str(authority))
        self._listening = socket.create_server((address, 0))
        self._listening.settimeout(0.1)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.read = b""
        self.address = f"{address}:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def paths(self) -> list[str]:
        return [path.decode() for _, path in _REQUEST.findall(self.read)]

    def __enter__(self) -> "Middle":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        threads = []
        while not self._ended.is_set():
            try:
                plain, _ = self._listening.accept()
            except TimeoutError:
                continue
            threads.append(threading.Thread(target=self._between, args=(plain,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(timeout=5)

    def _between(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.closing(plain):
            plain.settimeout(10)
            client = self._context.wrap_socket(plain, server_side=True) if self._context else plain
            upstream = socket.create_connection(("127.0.0.1", self._upstream))
            with client, self._to_superlink.wrap_socket(upstream, server_hostname="127.0.0.1") as superlink:
                for each in (client, superlink):
                    each.settimeout(0.02)
                while not self._ended.is_set():
                    if not self._pass_on(client, superlink):
                        return

    def _pass_on(self, client: socket.socket, superlink: socket.socket) -> bool:
        """What either side has said by now; False when one has ended."""
        pending = [each for each in (client, superlink) if isinstance(each, ssl.SSLSocket) and each.pending()]
        for ready in pending or select.select([client, superlink], [], [], 0.1)[0]:
            try:
                data = ready.recv(65536)
            except (TimeoutError, ssl.SSLWantReadError):  # it was TLS's own, and no data
                continue
            if not data:
                return False
            if ready is client:
                with self._lock:
                    self.read += data
            (superlink if ready is client else client).sendall(data)
        return True


def with_certificate(folder: Path, issued: Issued, *others: x509.Certificate) -> ssl.SSLContext:
    """A server's context with a certificate, and those that it sends beside."""
    write_issued(issued, folder / "middle.key", folder / "middle.crt", others)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "middle.crt", folder / "middle.key")
    return context


def leaf(
    authority: Issued | None,
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost"),
    *,
    since: float = -1,
    until: float = 30,
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
    is_authority: bool = False,
) -> Issued:
    """A certificate with whatever is wrong with it; of its own without an authority. Times in days from now."""
    key = ec.generate_private_key(ec.SECP384R1())
    now = datetime.now(UTC)
    # What looks like a host is held against an authority's constraints.
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a SuperLink" if hosts else "localhost")])
    signer = authority.key if authority else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(named)
        .issuer_name(authority.certificate.subject if authority else named)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=since))
        .not_valid_after(now + timedelta(days=until))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(general_names(hosts)), critical=False)
    return Issued(key, builder.sign(signer, hashes.SHA384()))
