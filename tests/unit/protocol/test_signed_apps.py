"""An app's signature is the one that Flower's SuperNode checks, as its source says: over time and SHA-256, in base64."""

import base64
import hashlib
import json

import yaml
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from protocol.signature import make_key
from protocol.signed_apps import sign_app, signer_id, trusted_entities, verifications


def test_a_signature_holds_over_time_and_digest() -> None:
    """Oracle: the bytes put together here."""
    key = make_key()
    ((signer, said),) = sign_app(b"app", key, 1_800_000_000).items()
    told = json.loads(said)
    padded = told["signature"] + "=" * (-len(told["signature"]) % 4)
    signed = (1_800_000_000).to_bytes(8, "big") + hashlib.sha256(b"app").digest()
    key.public_key().verify(base64.urlsafe_b64decode(padded), signed)
    assert signer == signer_id(key.public_key())
    assert told["signed_at"] == 1_800_000_000


def test_the_trusted_are_listed_under_the_name_that_signatures_have() -> None:
    keys = [make_key().public_key() for _ in range(3)]
    listed = yaml.safe_load(trusted_entities(keys))
    assert {name: load_ssh_public_key(line.encode()) for name, line in listed.items()} == {signer_id(key): key for key in keys}


def test_an_app_without_a_signature_is_not_said_to_have_been_looked_at() -> None:
    assert json.loads(verifications({})) == {}
    signatures = sign_app(b"app", make_key(), 1)
    assert json.loads(verifications(signatures)).items() > signatures.items()
