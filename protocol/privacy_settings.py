"""What a federation settles about who may see what: whether updates or only their sum, and what noise hides them in it."""

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
        0,
        le=1024,
        description="with how many others each node shares masks and secrets, an even number; 0 = with all, as it has to be "
        "where a coordinator may lie about who is there",
    )
    share: float = Field(
        2 / 3, gt=0.5, le=1, description="part of the nodes, and of each one's neighbours, without which there is no sum"
    )
    timeout_seconds: PositiveFloat = Field(600.0, description="longest wait for each answer after training")


class PrivacySettings(Strict):
    """Released adapters keep a promise of differential privacy to every node: what it trained on hardly shows in them.

    The record is a node: whoever sees all that is released finds it at most ``exp(epsilon)`` times as likely with the node's
    updates as with zeros in their place, but for ``delta`` (``protocol.privacy.accounting``).
    """

    enabled: bool = Field(False, description="sums of updates are clipped and noised before anything is made of them")
    epsilon: PositiveFloat | None = Field(None, le=1e3, description="the budget; needed. All rounds together stay within it")
    delta: float = Field(1e-5, gt=0, lt=1, description="by how much the promise may fail; below one institution's share")
    nodes: PositiveInt | None = Field(
        None, le=2**20, description="institutions of which a cohort is drawn; needed for sampling: poisson and fixed"
    )
    sampling: Literal["all", "poisson", "fixed"] = Field(
        "all",
        description="how a cohort is drawn that stays secret, which costs less: each apart, or so many; all = it may be known",
    )
    noise: Literal["coordinator", "nodes"] = Field(
        "coordinator", description="who adds noise: the coordinator to the sum, or in a secure sum each node to its part"
    )
    noise_multiplier: PositiveFloat | None = Field(
        None, le=1e6, description="noise of each sum over the norm; without it the least with which the rounds left fit epsilon"
    )
    colluders: NonNegativeInt = Field(
        0, le=2**20, description="nodes' noise: so many may tell the coordinator theirs, and it is not counted on"
    )
    clipping_norm: PositiveFloat = Field(
        1.0, ge=1e-6, le=1e4, description="norm of a node's whole change in product space, to which a longer one is shortened"
    )
    quantile: float | None = Field(
        None, gt=0, lt=1, description="the norm goes, round by round, where so many changes are within it; without it it stays"
    )
    quantile_rate: PositiveFloat = Field(0.2, le=10, description="how fast the norm goes there")
    bit_noise: PositiveFloat | None = Field(
        None,
        le=1e6,
        description="noise on the count of changes within the norm, in nodes; 2.5 times the sums' multiplier",
    )
    width: PositiveInt | None = Field(
        None, le=2**15, description="product-delta: directions of a noised sum, for each module; aggregation.rank_cap"
    )
    evaluate: bool = Field(
        False, description="nodes measure the global adapter, too; what they say then reaches the coordinator without noise"
    )
    ledger: Path | None = Field(
        None, description="what was spent, written before each release; privacy.jsonl in output. Keep it as long as the data"
    )

    @property
    def secret(self) -> bool:
        """The promise counts on nobody knowing who was drawn."""
        return self.enabled and self.sampling != "all"
