"""A device's environment: this checkout's wheel with ``edge`` is under 200 MB, and runs a bundle without what made it."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
MOST_BYTES = 200 * 10**6
ABSENT = ("torch", "transformers", "peft", "onnx", "flwr", "onnx_ir", "onnxscript", "accelerate", "optimum")
QUESTION = "What is the daily cash limit?"


def run(*command, cwd):
    # Bytecode is written as on anybody's machine: it is part of what an environment takes.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False, env=environment)


def install(*arguments, cwd):
    """With this environment's pip, which is no part of the device's."""
    done = run(sys.executable, "-m", "pip", "--quiet", *arguments, cwd=cwd)
    if done.returncode:
        reason = f"pip cannot install here: {done.stderr[-500:]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """A folder with an environment as a device has it."""
    folder = tmp_path_factory.mktemp("device")
    install("wheel", "--no-deps", "--wheel-dir", folder / "wheel", ROOT, cwd=folder)
    (wheel,) = (folder / "wheel").glob("fedge-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    constraints = ["--constraint", ROOT / "constraints.txt"]
    install("--python", python, "install", "--no-compile", *constraints, f"{wheel}[edge]", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def bundle(device):
    """The embedded base in 8 bits, made here, where PyTorch is; and what this process answers with it."""
    from edge.make import Request, make_bundle
    from edge.runtime.model import open as opened
    from protocol.signature import make_key, write_public

    key = make_key()
    write_public(device / "trusted.pub", key.public_key())
    folder = make_bundle(Request("tiny", device / "bundle", key))
    return opened(folder, key.public_key(), state=None).generate([{"role": "user", "content": QUESTION}]).text


def size_bytes(folder):
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def test_a_device_needs_less_than_200_mb_and_none_of_what_made_the_bundle(device, bundle):
    python = device / "venv" / "bin" / "python"
    installed = size_bytes(device / "venv")
    answered = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from edge.runtime.model import open as opened\n"
        "from protocol.signature import read_trusted\n"
        "model = opened(Path('bundle'), read_trusted(Path('trusted.pub')))\n"
        f"text = model.generate([{{'role': 'user', 'content': {QUESTION!r}}}]).text\n"
        f"print(json.dumps([text, [name for name in {ABSENT!r} if name in sys.modules]]))\n"
    )
    done = run(python, "-c", answered, cwd=device)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [bundle, []]
    there = f"import importlib.util\nprint([name for name in {ABSENT!r} if importlib.util.find_spec(name)])"
    assert run(python, "-c", there, cwd=device).stdout.strip() == "[]"
    command = (python.with_name("fedge"), "edge", "run", "bundle", QUESTION, "--key", "trusted.pub", "--json")
    done = run(*command, cwd=device)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"] == {"base": [bundle]}
    assert installed < size_bytes(device / "venv") < MOST_BYTES


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["edge", "--help"], ["edge", "serve", "--help"]])
def test_the_command_tells_of_itself_on_a_device(arguments, device):
    done = run(device / "venv" / "bin" / "fedge", *arguments, cwd=device)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        (["train", "job.yaml"], "client"),
        (["demo", "--output", "d"], "client"),
        (["evaluate", "job.yaml"], "client"),
        (["registry", "list", "registry"], None),
        (["edge", "export", "tiny", "new", "--key", "trusted.pub"], "export"),
        (["edge", "quantize", "bundle", "new", "--key", "trusted.pub"], "export"),
    ],
)
def test_a_verb_that_a_device_has_not_says_which_extra_brings_it(verb, extra, device):
    """tokenizers brings fsspec, so that a registry can be read here as well."""
    (device / "job.yaml").write_text("base_model: tiny\ndata: {train: rows.jsonl}\noutput: runs/job\n")
    (device / "rows.jsonl").write_text('{"input_text": "a", "target_text": "b"}\n' * 10)
    done = run(device / "venv" / "bin" / "fedge", *verb, cwd=device)
    assert done.returncode == (2 if extra else 0), done.stderr
    assert extra is None or f"pip install 'fedge[{extra}]'" in done.stderr
