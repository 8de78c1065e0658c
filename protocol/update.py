"""What a node sends after a round: its adapter as trained, which rows of dense tensors it trained, and a manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol.adapter import Adapter, Array
from protocol.manifest import Manifest


@dataclass(frozen=True)
class Update:
    """One node's contribution.

    Attributes:
        adapter: Absolute tensors as trained. The change is against the adapter whose digest is ``manifest.parent``.
        rows: By dense tensor name, a boolean vector over its first axis: the rows that this node trained. A tensor that is
            not named here was trained whole.
        manifest: Round, rank, examples; ``manifest.parent`` names the start.
    """

    adapter: Adapter
    manifest: Manifest
    rows: Mapping[str, Array] = field(default_factory=dict)
