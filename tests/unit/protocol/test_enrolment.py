"""Lists of who is enrolled: what cannot be told apart is refused, and nothing but ConfigurationError is raised."""

import json
import os
from datetime import date

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from protocol.enrolment import read_enrolled, read_enrolment
from protocol.errors import ConfigurationError
from protocol.signature import fingerprint

# The same in every test process, for they are part of what tests are called.
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32).public_key() for number in range(3)]
LINES = [key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for key in KEYS]


def written(folder, content):
    path = folder / "enrolled.yaml"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_names_come_back_with_their_keys_whatever_the_comment(tmp_path):
    found = read_enrolled(written(tmp_path, f"# the consortium\nbank: {LINES[0]} head office\nclinic two: {LINES[1]}\n"))
    assert {name: fingerprint(key) for name, key in found.items()} == {
        "bank": fingerprint(KEYS[0]),
        "clinic two": fingerprint(KEYS[1]),
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no name"),
        ("[]", "holds no name"),
        ("just words", "holds no name"),
        ({"bank": "ssh-rsa AAAA"}, "bank is no public"),
        ({"bank": None}, "bank: key: "),
        ({"bank": [LINES[0]]}, "bank: key: "),
        ({"bank": LINES[0], "clinic": LINES[0]}, "has the key of bank"),
        ({"": LINES[0]}, "1 to 80"),
        ({"x" * 81: LINES[0]}, "1 to 80"),
        ({"a\nb": LINES[0]}, "1 to 80"),
        (f"7: {LINES[0]}", "1 to 80"),
        ({"ba\u0308nk": LINES[0]}, "composed letters"),
        ({" bank": LINES[0]}, "without blanks"),
        (f"bank: {{key: {LINES[0]}, revoked: }}", "expected a day"),
        (f"bank: {LINES[0]}\nbank: {LINES[1]}\n", "bank"),
    ],
)
def test_what_is_no_list_of_names_with_keys_of_their_own_is_refused(tmp_path, content, said):
    with pytest.raises(ConfigurationError, match=said):
        read_enrolled(written(tmp_path, content))


def test_every_problem_is_told_at_once(tmp_path):
    with pytest.raises(ConfigurationError) as told:
        read_enrolled(written(tmp_path, {"a": "no key", "b": LINES[0], "c": LINES[0], "": LINES[1]}))
    assert len(told.value.problems) == 3


@given(st.binary(max_size=200))
def test_any_bytes_raise_only_a_configuration_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "enrolled.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError):
        read_enrolled(path)


def test_everybody_has_a_role_and_revoked_keys_count_for_nobody(tmp_path):
    found = read_enrolment(
        written(
            tmp_path,
            f"bank: {LINES[0]}\n"
            f"consortium: {{key: {LINES[1]} head office, role: coordinator}}\n"
            f"clinic: {{key: {LINES[2]}, revoked: 2026-11-22}}\n",
        )
    )
    assert found.nodes.keys() == {"bank"}
    assert {name: fingerprint(each) for name, each in found.coordinators.items()} == {"consortium": fingerprint(KEYS[1])}
    assert found.auditors == {}
    assert (found.revoked["clinic"].role, found.revoked["clinic"].since) == ("node", date(2026, 11, 22))
    assert fingerprint(found.revoked["clinic"].key) == fingerprint(KEYS[2])
    assert found.why_not("clinic") == "clinic: its key was revoked on 2026-11-22"
    assert found.why_not("court") == "court: not enrolled as a node"
    assert read_enrolled(tmp_path / "enrolled.yaml").keys() == {"bank"}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"key": LINES[1], "role": "owner"}, "role"),
        ({"key": LINES[1], "revoked": "soon"}, "revoked"),
        ({"key": LINES[1], "revokd": "2026-11-22"}, "revokd"),
        ({"role": "auditor"}, "key"),
        ({"key": LINES[0]}, "has the key of bank"),
        ({"key": LINES[0], "role": "coordinator"}, "has the key of bank"),
        ({"key": LINES[0], "revoked": "2026-11-22"}, "has the key of bank"),
    ],
)
def test_an_entry_of_another_form_and_a_key_that_is_another_s_in_whatever_role_are_refused(tmp_path, said, problem):
    with pytest.raises(ConfigurationError, match=problem):
        read_enrolment(written(tmp_path, {"bank": LINES[0], "clinic": said}))


def test_what_was_revoked_comes_back_under_no_other_name(tmp_path):
    with pytest.raises(ConfigurationError, match="new: has the key of old"):
        read_enrolment(written(tmp_path, {"old": {"key": LINES[0], "revoked": "2026-01-01"}, "new": LINES[0]}))


def test_a_list_that_would_unfold_to_gigabytes_is_refused_at_once(tmp_path):
    """YAML's anchors: a kilobyte whose text would be 10^9 letters long; that the test ends within its time is the claim."""
    layers = [f"x{at}: &x{at} [{','.join([f'*x{at - 1}'] * 10)}]" for at in range(1, 9)]
    with pytest.raises(ConfigurationError, match="x8: key"):
        read_enrolment(written(tmp_path, "\n".join(["x0: &x0 [a]", *layers])))


def test_a_list_that_was_written_anew_is_read_anew_though_its_length_and_its_time_are_the_same(tmp_path):
    """Nothing but its content is asked, so that no revocation is missed: two keys of one length, both files of one time."""
    path = written(tmp_path, f"bank: {LINES[0]}")
    time = path.stat().st_mtime_ns
    first = read_enrolled(path)
    path.write_text(f"bank: {LINES[1]}", encoding="utf-8")
    os.utime(path, ns=(time, time))
    assert [fingerprint(found["bank"]) for found in (first, read_enrolled(path))] == [fingerprint(key) for key in KEYS[:2]]
