"""What a federation settles about who may see what: here, whether the coordinator sees updates or only their sum."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from protocol.strict import Strict

Summed = Literal["products", "tensors"]
# Rules whose result follows from a sum over nodes: of innovations, or of the changes of tensors that all hold in one shape.
SUMMED: Mapping[str, Summed] = {
    "product-delta": "products",
    "fedavg": "tensors",
    "ffa": "tensors",
    "rolora": "tensors",
    "fedadam": "tensors",
    "fedyogi": "tensors",
}
_LOOKS = "looks at single updates"
NOT_SUMMED: Mapping[str, str] = {
    **dict.fromkeys(("krum", "multi-krum", "geometric-median", "agreement"), f"{_LOOKS} to set some aside"),
    **dict.fromkeys(("trimmed-mean", "median"), f"{_LOOKS}, number by number"),
    "norm-clipping": f"{_LOOKS} to shorten them; in a secure sum nodes shorten their own to secure_sum.limit",
    "hetlora": f"{_LOOKS}, whose norms are its weights",
    "flora": "stacks single updates",
    "flexlora": "takes means of what nodes hold, which no limit on a change bounds",
    "fedex": "takes means of what nodes hold, which no limit on a change bounds",
    "fedsa": "lets nodes keep B, without which the limit bounds no product",
}


class SecureSumSettings(Strict):
    """Updates are added up under masks: the coordinator learns their weighted sum and no single one (protocol.secure_sum)."""

    enabled: bool = Field(False, description="the coordinator sees sums of updates and no single one")
    enrolled: Path | None = Field(
        None, description="YAML with each node's name and its public key; every node has the same; simulations make their own"
    )
    limit: PositiveFloat = Field(
        10.0, ge=1e-3, le=1e4, description="norm of an update, all of it, to which its node shortens a longer one"
    )
    examples: PositiveInt | None = Field(
        None, le=2**24, description="rows that weigh one, as more do; without it as many as the plan's steps take"
    )
    width: PositiveInt | None = Field(
        None, le=2**15, description="directions of a sum that come back, for each module; twice aggregation.rank_cap"
    )
    neighbours: NonNegativeInt = Field(
        0, le=1024, description="with how many others each node shares masks and secrets, an even number; 0 = with all"
    )
    share: float = Field(
        2 / 3, gt=0.5, le=1, description="part of the nodes, and of each one's neighbours, without which there is no sum"
    )
    timeout_seconds: PositiveFloat = Field(600.0, description="longest wait for each answer after training")
