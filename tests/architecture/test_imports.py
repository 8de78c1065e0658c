"""The arrows between folders, and what each role must never need: a coordinator no torch, a device neither torch nor Flower."""

import ast
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("client", "edge", "protocol", "server", "simulations", "strategies")
HEAVY = ("torch", "transformers", "flwr", "onnxruntime", "peft", "trl", "bitsandbytes", "datasets", "sklearn", "numpy")
FORBIDDEN = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "sklearn", "onnxruntime")


def modules(*packages):
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    )


def python(code, *, check=True, executable=sys.executable, cwd=ROOT):
    done = subprocess.run([executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_the_arrows_between_folders_hold():
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert command, "import-linter is a development dependency"
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys, fedge\n"
        "sys.argv = ['fedge', '--help']\n"
        "try:\n    fedge.main()\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules and name != 'numpy'])\n"
    )
    out = python(code).stdout
    assert "federat" in out.lower()
    assert out.splitlines()[-1] == "LOADED []"


VERBS = ("demo", "simulate", "train", "evaluate", "generate", "merge", "extract", "combine")
EDGE = (
    "export",
    "quantize",
    "add",
    "hand-over",
    "verify",
    "inspect",
    "diff",
    "update make",
    "update apply",
    "run",
    "latency",
    "keygen",
)


@pytest.mark.parametrize("verb", [*VERBS, *(f"edge {verb}" for verb in EDGE)])
def test_help_of_a_verb_imports_nothing_heavy_and_shows_json(verb, capsys):
    code = (
        "import sys, fedge\n"
        f"sys.argv = ['fedge', *{verb.split()!r}, '--help']\n"
        "try:\n    fedge.main()\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules and name != 'numpy'])\n"
    )
    out = python(code).stdout
    assert "--json" in out
    assert out.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("path", sorted(p for package in PACKAGES for p in (ROOT / package).rglob("__init__.py")), ids=str)
def test_a_package_file_holds_a_docstring_and_nothing_else(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def without(*absent):
    """Code after which these cannot be imported, nor what lies in them."""
    return (
        "import importlib, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if any(f'{{name}}.'.startswith(f'{{gone}}.') for gone in {absent!r}):\n"
        "            raise ModuleNotFoundError(f'{name} is not installed here', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )


def test_server_and_protocol_import_where_there_is_no_torch():
    names = modules("protocol", "server")
    assert "server.app" in names
    code = without(*FORBIDDEN) + (
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "try:\n    import torch\n"
        "except ModuleNotFoundError:\n    print('HELD')\n"
    )
    assert python(code).stdout.splitlines()[-1] == "HELD"


def test_a_node_s_app_imports_where_there_is_nothing_but_what_runs_a_bundle():
    """A device's node is the same code; what trains with PyTorch imports it when it trains."""
    names = modules("client")
    assert {"client.app", "client.round", "client.device"} <= {*names}
    making = [name for name in modules("edge") if not name.startswith("edge.runtime.")]
    absent = {*FORBIDDEN, *making, "onnx", "onnx_ir", "onnxscript"} - {"onnxruntime"}
    code = without(*sorted(absent)) + f"for name in {names!r}:\n    importlib.import_module(name)\nprint('HELD')\n"
    assert python(code).stdout.splitlines()[-1] == "HELD"


def test_what_runs_a_bundle_imports_where_there_is_nothing_of_what_makes_one():
    """The rest of edge counts as well, which no contract of import-linter says of a folder inside it."""
    names = [name for name in modules("edge") if name.startswith("edge.runtime.")]
    making = [name for name in modules("edge") if name not in names]
    assert {"edge.runtime.server", "edge.runtime.model"} <= {*names}
    assert {"edge.make", "edge.export"} <= {*making}
    absent = {
        *FORBIDDEN,
        *making,
        "onnx",
        "onnx_ir",
        "onnxscript",
        "flwr",
        "fsspec",
        "strategies",
        "server",
        "client",
        "simulations",
    }
    code = without(*sorted(absent - {"onnxruntime"})) + (
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "try:\n    import edge.make\n"
        "except ModuleNotFoundError:\n    print('HELD')\n"
    )
    assert python(code).stdout.splitlines()[-1] == "HELD"


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["--help"], None),
        (["--version"], None),
        (["edge", "serve", "--help"], None),
        (["train", "job.yaml"], "client"),
        (["registry", "list", "."], "coordinator"),
        (["edge", "export", "tiny", "new", "--key", "key"], "export"),
        (["edge", "run", "bundle", "?", "--key", "key.pub"], "edge"),
    ],
)
def test_a_verb_says_which_extra_it_lacks_and_the_others_do_without(arguments, extra, tmp_path):
    """Flower, torch, fsspec and onnxruntime are away: what ``pip install fedge`` alone brings."""
    (tmp_path / "job.yaml").write_text("base_model: tiny\ndata: {train: rows.jsonl}\noutput: runs/job\n")
    (tmp_path / "rows.jsonl").write_text('{"input_text": "a", "target_text": "b"}\n' * 10)
    absent = [name for name in HEAVY if name != "numpy"]
    code = without(*absent, "fsspec", "httpx", "onnx", "onnx_ir", "tokenizers", "tensorboardX") + (
        f"import fedge\nsys.argv = ['fedge', *{arguments!r}]\nfedge.main()\n"
    )
    done = python(code, check=False, cwd=tmp_path)
    assert done.returncode == (2 if extra else 0), done.stderr
    assert extra is None or f"pip install 'fedge[{extra}]'" in done.stderr


def test_protocol_but_for_its_records_imports_where_there_is_no_flower():
    names = [name for name in modules("protocol") if name != "protocol.records"]
    code = (
        "import importlib, sys\n"
        "sys.modules['flwr'] = None\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "print('HELD')\n"
    )
    assert python(code).stdout.splitlines()[-1] == "HELD"


@pytest.mark.parametrize(
    "name", ["client.app", "server.app", "simulations.grid", "strategies.training", "strategies.methods.lora"]
)
def test_importing_a_module_loads_no_torch_before_it_is_used(name):
    code = f"import sys, {name}\nprint([heavy for heavy in ('torch', 'transformers') if heavy in sys.modules])"
    assert python(code).stdout.splitlines()[-1] == "[]"


def test_the_names_that_flower_starts_are_there():
    import tomllib

    components = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    python("from server.app import app as s; from client.app import app as c; assert s and c")


@pytest.mark.slow
def test_a_coordinators_environment_holds_no_torch_and_imports_the_server(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    executable = str(tmp_path / "venv" / "bin" / "python")
    pip = [executable, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), f"{ROOT}[coordinator]"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = modules("protocol", "server")
    code = (
        "import importlib, importlib.util, pathlib, sys\n"
        f"found = [name for name in {FORBIDDEN!r} if importlib.util.find_spec(name)]\n"
        "assert not found, found\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "import fedge, server.app\n"
        "assert pathlib.Path(server.app.__file__).is_relative_to(sys.prefix), server.app.__file__\n"
    )
    python(code, executable=executable, cwd=tmp_path)
    shown = subprocess.run([str(tmp_path / "venv" / "bin" / "fedge"), "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
