"""Whose code may run: Flower's signature of an app (a FAB), made with our keys and without Flower's hub.

A SuperNode with ``--trusted-entities`` runs an app only where one of the keys that it trusts has signed the time and the app's
SHA-256. Flower's SuperLink knows such signatures of apps from its hub only; ``server.superlink`` gives it ours. Whoever carries
a signature can drop it, and the app is refused; it cannot make one.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from protocol.signature import key_id


def signer_id(key: Ed25519PublicKey) -> str:
    """What Flower calls a signer; of our keys it is made from the key itself, so that both sides know it."""
    return f"fpk_{key_id(key).hex()[:32]}"


def sign_app(app: bytes, key: Ed25519PrivateKey, signed_at: int) -> dict[str, str]:
    """Flower's record of a signature: the signer, and its word as JSON.

    Args:
        app: The FAB.
        key: Whoever has read what the app does.
        signed_at: Seconds since 1970.
    """
    signature = key.sign(signed_at.to_bytes(8, "big") + hashlib.sha256(app).digest())
    told = {"signature": base64.urlsafe_b64encode(signature).decode().rstrip("="), "signed_at": signed_at}
    return {signer_id(key.public_key()): json.dumps(told)}


def verifications(signatures: Mapping[str, str]) -> str:
    """What a SuperLink keeps beside an app: its signatures, and that it keeps them at all."""
    return json.dumps({**signatures, "valid_license": "fedge"} if signatures else {})


def trusted_entities(keys: Iterable[Ed25519PublicKey]) -> str:
    """The file for ``flower-supernode --trusted-entities``."""
    lines = {signer_id(key): key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for key in keys}
    return yaml.safe_dump(lines)
