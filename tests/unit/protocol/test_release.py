"""Released adapters: whoever has the coordinator's public key sees where they come from, and every change since."""

import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from fedge import app
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ConfigurationError, SignatureError
from protocol.files import save_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.release import SIGNATURE, check_release, sign_release
from protocol.signature import fingerprint, write_public

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
TRUSTED = [KEY.public_key()]


@pytest.fixture
def released(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter = Adapter({"q": Factors(np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))})
    manifest = Manifest(base_digest="ab" * 32, kind="global", r=2, federation="clinics", round=3, num_examples=5)
    save_adapter(folder, adapter, manifest, Plan(base_model="tiny"))
    origin = {"federation": "clinics", "run": "cd" * 16, "number": 3, "adapter": "", "digest": adapter.digest()}
    sign_release(folder, KEY, **origin)
    return folder


def test_a_release_tells_federation_run_round_and_coordinator(released):
    found = check_release(released, [OTHER.public_key(), KEY.public_key()])
    assert (found.release.federation, found.release.run, found.release.round) == ("clinics", "cd" * 16, 3)
    assert fingerprint(found.coordinator) == fingerprint(KEY.public_key())
    assert found.unsigned == ()


def test_every_bit_that_is_changed_in_a_file_is_found(released):
    for name in ("adapter_model.safetensors", "adapter_config.json", "manifest.json"):
        content = (released / name).read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            (released / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(AdapterError, match="not as it was released"):
                check_release(released, TRUSTED)
        (released / name).unlink()
        with pytest.raises(AdapterError, match="not as it was released"):
            check_release(released, TRUSTED)
        (released / name).write_bytes(content)
    check_release(released, TRUSTED)


@pytest.mark.parametrize(
    "change", [{"federation": "x"}, {"run": "x"}, {"round": 4}, {"adapter": "x"}, {"digest": "0" * 64}, {"files": {}}]
)
def test_another_origin_under_the_same_signature_is_refused(released, change):
    told = json.loads((released / SIGNATURE).read_text())
    told["release"] |= change
    (released / SIGNATURE).write_text(json.dumps(told))
    with pytest.raises(SignatureError, match="does not hold"):
        check_release(released, TRUSTED)


def test_another_s_signature_none_and_what_is_none_are_refused(released, tmp_path):
    with pytest.raises(SignatureError, match="not trusted"):
        check_release(released, [OTHER.public_key()])
    for content in (b"", b"[]", b"\xff", b'{"release": {}, "signature": ""}', b" " * 2**21):
        (released / SIGNATURE).write_bytes(content)
        with pytest.raises(AdapterError, match="no signature of a release"):
            check_release(released, TRUSTED)
    (released / SIGNATURE).unlink()
    with pytest.raises(AdapterError, match="get the adapter from there"):
        check_release(released, TRUSTED)


def test_a_link_in_the_place_of_a_file_is_refused_and_what_lies_beside_is_told(released, tmp_path):
    (released / "README.md").write_text("hello")
    assert check_release(released, TRUSTED).unsigned == ("README.md",)
    away = tmp_path / "elsewhere"
    (released / "manifest.json").rename(away)
    (released / "manifest.json").symlink_to(away)
    with pytest.raises(AdapterError, match=r"manifest\.json"):
        check_release(released, TRUSTED)


def test_the_verb_takes_a_public_key_or_the_federation_s_list(released, tmp_path):
    write_public(tmp_path / "key.pub", KEY.public_key())
    line = (tmp_path / "key.pub").read_text().strip()
    (tmp_path / "enrolled.yaml").write_text(json.dumps({"consortium": {"key": line, "role": "coordinator"}}))
    for option in (["--trusted", str(tmp_path / "key.pub")], ["--enrolled", str(tmp_path / "enrolled.yaml")]):
        told = CliRunner().invoke(app, ["verify", str(released), *option])
        assert told.exit_code == 0
        assert "round 3 of clinics" in told.output
        assert fingerprint(KEY.public_key()) in told.output
    told = CliRunner().invoke(app, ["verify", str(released), *option, "--json"])
    assert json.loads(told.output)["round"] == 3
    (tmp_path / "enrolled.yaml").write_text(json.dumps({"consortium": {"key": line}}))  # a node releases nothing
    assert isinstance(CliRunner().invoke(app, ["verify", str(released), *option]).exception, SignatureError)
    assert isinstance(CliRunner().invoke(app, ["verify", str(released)]).exception, ConfigurationError)
