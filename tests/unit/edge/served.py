"""A server of a bundle in a thread of its own, for as long as a test asks it something."""

import contextlib
import threading

from edge.runtime.listening import Settings
from edge.runtime.server import BundleServer


@contextlib.contextmanager
def serving(model, collector=None, **chosen):
    with BundleServer(model, Settings(port=0, **chosen), collector) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
