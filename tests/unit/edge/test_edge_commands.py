"""``fedge edge``: what a reader of its output is told, and that what the user can mend ends with code 2 and nothing written."""

import json
import math
import sys
from pathlib import Path

import pytest
from averaging_bundles import averaging
from small_bundles import KEY, OTHER, bundle

import fedge
from edge.device_commands import summary
from edge.runtime.latency import Figures, LatencyReport
from edge.runtime.manifest import Parity
from edge.runtime.verify import verified
from protocol.signature import read_private, read_trusted, write_private, write_public


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command as its entry point does; an exception that escapes is a traceback, and fails the test."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedge", "edge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            fedge.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def keys(tmp_path):
    """Folder of the keys of the small bundles."""
    folder = tmp_path / "keys"
    folder.mkdir()
    write_private(folder / "signer", KEY)
    write_public(folder / "signer.pub", KEY.public_key())
    write_public(folder / "other.pub", OTHER.public_key())
    return folder


def test_a_key_is_made_once_and_its_public_half_lies_beside_it(call, tmp_path):
    code, out, _ = call("keygen", tmp_path / "key", "--comment", "clinic", "--json")
    told = json.loads(out)
    assert code == 0
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    (public,) = read_trusted(tmp_path / "key.pub")
    assert public.public_bytes_raw() == read_private(tmp_path / "key").public_key().public_bytes_raw()
    assert told["fingerprint"].startswith("SHA256:")
    for there in ("key", "key.pub"):
        (tmp_path / there).rename(tmp_path / "away")
        code, _, err = call("keygen", tmp_path / "key")
        assert (code, "already" in err) == (2, True)
        (tmp_path / "away").rename(tmp_path / there)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.pub"]


def test_a_bundle_is_verified_and_shown(call, keys, tmp_path):
    folder = bundle(tmp_path / "bundle", 4)
    code, out, _ = call("verify", folder, "--key", keys / "signer.pub", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["name"], told["version"], told["adapters"]) == ("clinic", 4, ["north", "south"])
    assert told["size_bytes"] == sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and "manifest" not in path.name
    )
    code, out, _ = call("inspect", folder, "--key", keys / "other.pub", "--key", keys / "signer.pub")
    assert code == 0
    assert "adapter north: lora, rank 4" in out
    assert "model.onnx.data: 200,000 bytes" in out
    assert json.loads(call("inspect", folder, "--key", keys / "signer.pub", "--json")[1])["version"] == 4


def test_what_does_not_hold_is_refused_with_code_2(call, keys, tmp_path):
    folder = bundle(tmp_path / "bundle", 4)
    for arguments, said in (
        ((folder, "--key", keys / "other.pub"), "not trusted here"),
        ((folder, "--key", keys / "none.pub"), "no readable key"),
        ((tmp_path, "--key", keys / "signer.pub"), "no such file"),
        ((folder, "--key", keys / "signer.pub", "--lowest-version", "5"), "version 4 of clinic"),
        ((folder, "--key", keys / "signer.pub", "--name", "bank"), "expected bank"),
    ):
        code, out, err = call("verify", *arguments)
        assert (code, out) == (2, "")
        assert said in err
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[777] ^= 1
    (folder / "model.onnx.data").write_bytes(content)
    for verb in (("verify", folder), ("run", folder, "a"), ("latency", folder), ("serve", folder, "--port", "0")):
        code, out, err = call(*verb, "--key", keys / "signer.pub")
        assert (code, out) == (2, "")
        assert "model.onnx.data is not as it was signed" in err


def test_an_update_carries_what_changed_and_makes_the_next_version(call, keys, tmp_path):
    old, new = bundle(tmp_path / "1", 1, ("north",)), bundle(tmp_path / "2", 2, ("north", "south"))
    trust = ("--key", keys / "signer.pub")
    told = json.loads(call("diff", old, new, *trust, "--json")[1])
    assert told["added"] == ["adapters/south.json", "adapters/south.onnx_adapter"]
    assert told["update_bytes"] == 1_000  # both adapters' .json are alike
    code, out, _ = call("update", "make", old, new, tmp_path / "update", *trust)
    assert code == 0
    carried = sum(path.stat().st_size for path in (tmp_path / "update").rglob("*") if path.is_file())
    assert f"1,000 of {told['whole_bytes']:,} bytes, {carried:,} with manifest and signature" in out
    code, _, err = call("update", "make", new, old, tmp_path / "back", *trust)
    assert (code, "version 1, older than version 2" in err) == (2, True)
    code, out, _ = call("update", "apply", old, tmp_path / "update", tmp_path / "next", *trust)
    assert code == 0
    assert "clinic version 2" in out
    for path in new.rglob("*"):
        assert path.is_dir() or (tmp_path / "next" / path.relative_to(new)).read_bytes() == path.read_bytes()
    assert (tmp_path / "next" / "model.onnx.data").samefile(old / "model.onnx.data")
    assert call("update", "apply", old, tmp_path / "update", tmp_path / "own", *trust, "--copy")[0] == 0
    assert not any((tmp_path / "own" / path.relative_to(old)).samefile(path) for path in old.rglob("model*"))
    code, _, err = call("update", "apply", new, tmp_path / "update", tmp_path / "again", *trust)
    assert (code, "expected one after version 2" in err) == (2, True)
    assert not (tmp_path / "again").exists()


def test_a_classifier_names_labels_and_an_embedder_gives_vectors(call, keys, tmp_path):
    """By hand: a is (1, 2), so yes has the probability 1 / (1 + exp(1 - 2)); a and b have the mean (2, 3.5)."""
    trust = ("--key", keys / "signer.pub", "--any-version")
    told = json.loads(call("run", averaging(tmp_path / "c", "classifier"), "a", "[unk]", *trust, "--json")[1])
    assert told["labels"] == {"base": ["yes", "no"]}
    assert told["probabilities"]["base"] == pytest.approx([1 / (1 + math.exp(-1)), 0.5])
    assert call("run", tmp_path / "c", "a", *trust)[1] == "? a\n  base: yes (73.1%)\n"
    told = json.loads(call("run", averaging(tmp_path / "e", "embedder"), "a b", *trust, "--json")[1])
    assert told["embeddings"] == {"base": [[2.0, 3.5]]}
    code, _, err = call("serve", tmp_path / "c", *trust, "--port", "0")
    assert (code, "a classifier has no place" in err) == (2, True)


def test_a_device_measures_itself(call, keys, tmp_path):
    folder = averaging(tmp_path / "c", "classifier")
    told = json.loads(call("latency", folder, "--key", keys / "signer.pub", "--prompt-tokens", 4, "--repeats", 1, "--json")[1])
    assert told["prompt_tokens"] == 4
    assert told["rows"][0]["first_token_seconds"] > 0


def test_figures_can_be_read_in_80_columns(tmp_path):
    rows = [Figures(None, 0.0123, 1_234_567.0, 12_345.6), Figures("south-district", 12.3, 12.0, 1.0)]
    lines = LatencyReport("clinic", 1, "q8", 128, 64, tuple(rows), 2**30).table().splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["none", "12.3", "ms", "1,234,567", "tokens/s", "12,345.6", "tokens/s"],
        ["south-district", "12,300.0", "ms", "12", "tokens/s", "1.0", "tokens/s"],
    ]
    metrics = {"accuracy": (0.5, 0.5), "perplexity": (30_123.4, 30_500.0)}
    told = Parity(largest_logit_difference=0.012345, largest_logit=20, kl=1e-5, top1=1, rows=3, positions=40, metrics=metrics)
    manifest = verified(bundle(tmp_path / "bundle", 4), [KEY.public_key()]).model_copy(update={"parity": {"north": told}})
    lines += summary(Path("bundles/1"), manifest)
    assert "perplexity 30,123 → 30,500" in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80


def test_an_older_version_is_not_run_after_a_newer_one_unless_that_is_wished(call, keys, tmp_path):
    old, new = (averaging(tmp_path / str(version), "classifier", version=version) for version in (1, 2))
    trust = ("--key", keys / "signer.pub")
    assert [call("run", folder, "a", *trust)[0] for folder in (old, new, new)] == [0, 0, 0]
    code, _, err = call("run", old, "a", *trust)
    assert (code, "this device has opened 2" in err, "--any-version" in err) == (2, True, True)
    assert call("run", old, "a", *trust, "--any-version")[0] == 0
    assert call("run", new, "a", *trust)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "tiny", "new", "--key", "KEYS/none"), "no readable key"),
        (("export", "tiny", "new", "--key", "KEYS/signer.pub"), "is a public key; expected the private one"),
        (("export", "tiny", "new", "--key", "KEYS/signer", "--rows", "r"), "--rows needs --job"),
        (("add", "old", "new", "--key", "KEYS/signer", "--rows", "r"), "--rows needs --job"),
        (("verify", "new", "--key", "KEYS/none"), "expected the public keys of those whom you trust"),
        (("export", "tiny", "new", "--key", "KEYS/signer", "--kind", "poem"), "--kind: found 'poem', expected one of decoder"),
        (("export", "tiny", "new", "--key", "KEYS/signer", "--profile", "q3"), "found 'q3', expected one of"),
        (("export", "tiny", "new", "--key", "KEYS/signer", "--budget", "kl"), "--budget: found 'kl', expected NAME=NUMBER"),
        (("export", "tiny", "new", "--key", "KEYS/signer", "--budget", "speed=1"), "speed: unknown"),
        (("export", "tiny", "new", "--key", "KEYS/signer", "--adapter", "a=x", "--adapter", "a=y"), "two are called a"),
        (("export", "tiny", "new", "--key", "KEYS/signer", "--adapter", "a=x"), "no such file"),
        (("export", "tiny", "new", "--key", "KEYS/signer", "--merge"), "found 0 adapters"),
        (("export", "no-such-base", "new", "--key", "KEYS/signer"), "no-such-base"),
        (("hand-over", "tiny", "new", "--to", "tflite"), "--to: found 'tflite', expected one of gguf, genai"),
        (("hand-over", "tiny", "KEYS"), "is there already"),
        (("serve", "new", "--key", "KEYS/signer.pub", "--address", "0.0.0.0"), "expected a token with it (--token-env)"),  # noqa: S104
        (("serve", "new", "--key", "KEYS/signer.pub", "--token-env", "NO_SUCH_TOKEN"), "NO_SUCH_TOKEN: holds no token"),
        (("run", "new", "a", "--key", "KEYS/signer.pub"), "no such file"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(arguments, said, call, keys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*(argument.replace("KEYS", str(keys)) for argument in arguments))
    assert (code, out) == (2, "")
    assert said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys"]
