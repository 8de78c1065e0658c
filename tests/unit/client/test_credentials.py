"""A node's folder: keys that never leave, checks before anything starts, and a SuperNode that trusts nobody unasked."""

import re
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client import credentials
from client.credentials import check, keygen, trust
from fedge import app
from protocol import certificates
from protocol.errors import ConfigurationError
from protocol.signature import make_key, write_pair
from server import provisioning


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node that was enrolled and has what its coordinator sent."""
    coordinator, folder = tmp_path / "c", tmp_path / "bank"
    provisioning.provision(coordinator, ["127.0.0.1"], "consortium", 365, 3650)
    keygen(folder, "bank")
    provisioning.enrol(coordinator, "bank", folder / "identity.pub", auth_key=folder / "auth.pub")
    give(coordinator, folder)
    trust(folder, coordinator / "release.pub")
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "node.yaml").write_text("train: rows.jsonl\ntier: small\n")
    return folder


def give(coordinator: Path, folder: Path) -> None:
    for name in ("ca.crt", "enrolled.yaml"):
        (folder / name).write_bytes((coordinator / name).read_bytes())


def test_keys_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    told = keygen(tmp_path / "bank", "bank")
    assert len(set(told)) == 2
    secrets = {name: (tmp_path / "bank" / name).read_bytes() for name in ("identity", "auth", "superexec.secret", "vault.key")}
    assert {(tmp_path / "bank" / name).stat().st_mode & 0o777 for name in secrets} == {0o600}
    with pytest.raises(ConfigurationError, match="identity: is there already"):
        keygen(tmp_path / "bank", "bank")
    assert {name: (tmp_path / "bank" / name).read_bytes() for name in secrets} == secrets
    assert keygen(tmp_path / "clinic", "clinic") != told


def test_no_private_key_is_printed(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["node", "keygen", str(tmp_path / "bank"), "bank"])
    assert found.exit_code == 0
    for name in ("identity", "auth"):
        lines = (tmp_path / "bank" / name).read_text().splitlines()[1:-1]
        assert not any(line in found.output for line in lines)
    assert found.output.count("SHA256:") == 4


def test_a_node_knows_its_name_by_its_key(node: Path) -> None:
    found = check(node, least_days=360)
    assert found.name == "bank"
    assert sum("SHA256:" in line for line in found.lines) == 5


def test_a_coordinator_is_compared_with_what_was_told(node: Path, tmp_path: Path) -> None:
    line = next(line for line in check(node).lines if line.startswith("coordinator"))
    check(node, coordinator=line.split()[-1])
    other = tmp_path / "other"
    provisioning.provision(other, ["127.0.0.1"], "consortium", 365, 3650)
    provisioning.enrol(other, "bank", node / "identity.pub")
    (node / "enrolled.yaml").write_bytes((other / "enrolled.yaml").read_bytes())
    with pytest.raises(ConfigurationError, match="do not use this list"):
        check(node, coordinator=line.split()[-1])


def other_identity(node: Path) -> None:
    for name in ("identity", "identity.pub"):
        (node / name).unlink()
    write_pair(node / "identity", make_key())


def revoked(node: Path) -> None:
    provisioning.revoke(node.parent / "c", "bank")
    give(node.parent / "c", node)


def without_coordinator(node: Path) -> None:
    (node / "enrolled.yaml").write_text(f"bank: {(node / 'identity.pub').read_text()}")


def server_for_authority(node: Path) -> None:
    (node / "ca.crt").write_bytes((node.parent / "c" / "server.crt").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda node: (node / "auth").unlink(), "auth: is missing; fedge node keygen"),
        (lambda node: (node / "ca.crt").unlink(), "ca.crt: is missing; ask the coordinator"),
        (lambda node: (node / "trusted.yaml").unlink(), "trusted.yaml: is missing; fedge node trust"),
        (lambda node: (node / "identity").chmod(0o604), r"identity: others .*mode 604"),
        (lambda node: (node / "auth").chmod(0o660), r"auth: others .*mode 660"),
        (other_identity, "no node has the key SHA256:"),
        (revoked, "bank: its key was revoked on 20"),
        (without_coordinator, "holds no coordinator"),
        (server_for_authority, "is no authority's certificate"),
        (lambda node: (node / "trusted.yaml").write_text("{}"), "trusts nobody"),
        (lambda node: (node / "trusted.yaml").write_text("fpk_1: ssh-rsa AAAA\n"), "no public Ed25519 key"),
    ],
)
def test_a_check_says_what_is_wrong_and_nothing_starts(node: Path, spoil, said: str) -> None:
    spoil(node)
    with pytest.raises(ConfigurationError, match=said):
        check(node)
    for arguments in (["check", str(node)], ["run", str(node), "--superlink", "127.0.0.1:1"]):
        found = CliRunner().invoke(app, ["node", *arguments])
        assert isinstance(found.exception, ConfigurationError)
        assert "flower-supernode" not in found.output


def test_days_are_counted(node: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expires on .*, in 3650\.0 days; at least 4000"):
        check(node, least_days=4000)
    with pytest.raises(ConfigurationError, match=r"expired on .*, 50\.0 days ago"):
        check(node, now=datetime.now(UTC) + timedelta(3700))


def test_whose_apps_run_is_the_institution_s_word(node: Path, tmp_path: Path) -> None:
    public = write_pair(tmp_path / "reviewer", make_key())
    before = (node / "trusted.yaml").read_bytes()
    with pytest.raises(ConfigurationError, match="by another way than it came"):
        trust(node, public, "SHA256:guess")
    with pytest.raises(ConfigurationError, match="expected one public Ed25519 key"):
        trust(node, node / "auth.pub")
    assert (node / "trusted.yaml").read_bytes() == before
    told = trust(node, public)
    assert trust(node, public, told) == told
    assert sum("runs apps signed by" in line for line in check(node).lines) == 2


def test_a_supernode_is_started_the_safe_way(node: Path) -> None:
    found = CliRunner().invoke(app, ["node", "run", str(node), "--superlink", "127.0.0.1:1", "--show"])
    assert found.exit_code == 0, found.exception
    supernode, starter = (line.split() for line in found.output.splitlines() if line.startswith("flower-"))
    for flag, value in (
        ("--root-certificates", "ca.crt"),
        ("--auth-supernode-private-key", "auth"),
        ("--trusted-entities", "trusted.yaml"),
    ):
        assert supernode[supernode.index(flag) + 1] == str(node / value)
    assert supernode[supernode.index("--isolation") + 1] == "process"
    assert supernode[supernode.index("--host") + 1] == "127.0.0.1"
    assert "--insecure" not in supernode
    assert str(node / "superexec.secret") in starter
    settings = tomllib.loads((node / "node.toml").read_text())
    assert settings["name"] == "bank"
    assert settings["train"] == str(node / "rows.jsonl")
    assert {settings[key] for key in ("state", "vault", "audit")} == {
        str(node / name) for name in ("state", "vault.key", "audit.jsonl")
    }
    assert settings["identity"] == str(node / "identity")
    assert (node / "node.toml").stat().st_mode & 0o777 == 0o600


def test_what_is_less_safe_is_asked_for_by_name(node: Path) -> None:
    arguments = ["node", "run", str(node), "--superlink", "127.0.0.1:1", "--show"]
    found = CliRunner().invoke(app, [*arguments, "--insecure-without-tls", "--run-unsigned-apps"]).output
    assert "--insecure " in found
    assert "--trusted-entities" not in found


def test_what_the_command_says_of_a_device_and_its_file_are_one(node: Path) -> None:
    """What only a device has may stand in the file of a node whose bundle the command names."""
    with (node / "node.yaml").open("a") as file:
        file.write("\ndevice_own: own\n")
    arguments = ["node", "run", str(node), "--superlink", "127.0.0.1:1", "--show"]
    refused = CliRunner().invoke(app, arguments)
    assert "device_own is of a device" in str(refused.exception)
    found = CliRunner().invoke(app, [*arguments, "--device", str(node), "--device-key", str(node / "auth.pub")])
    assert found.exit_code == 0, found.exception
    settings = tomllib.loads((node / "node.toml").read_text())
    assert {key: settings[key] for key in ("device", "device-own")} == {"device": str(node), "device-own": str(node / "own")}


def test_settings_that_do_not_fit_are_said_before_anything_starts(node: Path) -> None:
    (node / "node.yaml").write_text("train: rows.jsonl\nname: clinic\n")
    found = CliRunner().invoke(app, ["node", "run", str(node), "--superlink", "127.0.0.1:1", "--show"])
    assert "its key is enrolled as 'bank'" in str(found.exception)


def test_a_bundle_on_the_command_line_makes_the_node_a_device(node: Path) -> None:
    arguments = ["node", "run", str(node), "--superlink", "127.0.0.1:1", "--show", "--device", str(node / "bundle")]
    found = CliRunner().invoke(app, arguments)
    assert "device and device_key belong together" in str(found.exception)
    arguments += ["--device-key", str(node / "release.pub")]
    found = CliRunner().invoke(app, arguments)
    assert "bundle: no such file" in str(found.exception)
    (node / "bundle").mkdir()
    (node / "release.pub").touch()
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    told = tomllib.loads((node / "node.toml").read_text())
    assert (told["device"], told["device-key"]) == (str(node / "bundle"), str(node / "release.pub"))
    assert (told["tier"], told["train"]) == ("small", str(node / "rows.jsonl"))


def test_settings_go_through_flower_s_file_unchanged(tmp_path: Path) -> None:
    settings = {"name": 'a "b" \\ c=d\té', "max_rank": 8, "trial": False, "limit": 0.5}
    credentials.write_node_config(tmp_path / "node.toml", settings)
    told = tomllib.loads((tmp_path / "node.toml").read_text())
    assert told == {name.replace("_", "-"): value for name, value in settings.items()}


@pytest.mark.parametrize("address", ["", "host", "host:", ":", "host:x"])
def test_an_address_that_is_none_is_said(node: Path, address: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected HOST:PORT|host:x"):
        credentials.greet(address, node)


def test_nobody_at_an_address_may_come_later(node: Path) -> None:
    assert credentials.greet("127.0.0.1:1", node) is None
    assert certificates.read_certificates(node / "ca.crt")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("train: none.jsonl\n", r"train: .*none\.jsonl: no such file; paths are relative to"),
        ("tasks: {fees: {train: none.jsonl}}\n", r"tasks\.fees\.train: .*no such file"),
        ("train: rows.jsonl\npolicy: none.yaml\n", r"policy: .*no such file"),
        ("train: rows.jsonl\nname: court\n", "its key is enrolled as 'bank'"),
        ("train: rows.jsonl\ntier: huge\n", "tier: "),
        ("train: rows.jsonl\npolicy: policy.yaml\n", "secret_sum: unknown key"),
    ],
)
def test_a_check_looks_at_the_settings_and_what_they_name(node: Path, settings: str, said: str) -> None:
    assert f"settings  {node / 'node.yaml'}" in CliRunner().invoke(app, ["node", "check", str(node)]).output
    (node / "policy.yaml").write_text("secret_sum: true\n")
    (node / "node.yaml").write_text(settings)
    for arguments in (["check", str(node)], ["run", str(node), "--superlink", "127.0.0.1:1"]):
        found = CliRunner().invoke(app, ["node", *arguments])
        assert isinstance(found.exception, ConfigurationError)
        assert re.search(said, str(found.exception))
        assert "flower-supernode" not in found.output


def test_the_key_of_a_vault_may_lie_on_another_disk(node: Path, tmp_path: Path) -> None:
    (node / "vault.key").rename(tmp_path / "elsewhere.key")
    run = ["node", "run", str(node), "--superlink", "127.0.0.1:1", "--show"]
    assert "vault.key: is missing" in str(CliRunner().invoke(app, run).exception)
    with (node / "node.yaml").open("a") as file:
        file.write(f"vault: {tmp_path / 'elsewhere.key'}\n")
    assert CliRunner().invoke(app, run).exit_code == 0
    assert tomllib.loads((node / "node.toml").read_text())["vault"] == str(tmp_path / "elsewhere.key")
    (tmp_path / "elsewhere.key").unlink()
    assert "vault: " in str(CliRunner().invoke(app, run).exception)


def test_help_tells_what_an_argument_is() -> None:
    assert "made it." in CliRunner().invoke(app, ["node", "check", "--help"]).output
