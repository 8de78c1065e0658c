"""From a coordinator's settings to its rule."""

from collections.abc import Callable
from typing import Any

from protocol.errors import ConfigurationError
from protocol.federation import WITHOUT_STEP, AggregationSettings, RuleName
from server.aggregation.agreement import Agreement
from server.aggregation.fedadam import FedAdam
from server.aggregation.fedavg import FedAvg
from server.aggregation.fedex import FedEx
from server.aggregation.fedsa import FedSa
from server.aggregation.fedyogi import FedYogi
from server.aggregation.ffa import Ffa
from server.aggregation.flexlora import FlexLora
from server.aggregation.flora import Flora
from server.aggregation.geometric_median import GeometricMedian
from server.aggregation.hetlora import HetLora
from server.aggregation.krum import Krum
from server.aggregation.median import Median
from server.aggregation.multi_krum import MultiKrum
from server.aggregation.norm_clipping import NormClipping
from server.aggregation.product_delta import ProductDelta
from server.aggregation.rolora import RoLora
from server.aggregation.rule import Rule
from server.aggregation.server_momentum import ServerMomentum
from server.aggregation.trimmed_mean import TrimmedMean

_RULES: dict[RuleName, Callable[..., Rule]] = {
    "product-delta": ProductDelta,
    "fedavg": FedAvg,
    "hetlora": HetLora,
    "flora": Flora,
    "flexlora": FlexLora,
    "ffa": Ffa,
    "rolora": RoLora,
    "fedex": FedEx,
    "fedsa": FedSa,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "norm-clipping": NormClipping,
    "agreement": Agreement,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "geometric-median": GeometricMedian,
    "trimmed-mean": TrimmedMean,
    "median": Median,
}


def make(settings: AggregationSettings) -> Rule:
    """The rule that the settings name.

    Raises:
        ConfigurationError: A setting does not go with the rule.
    """
    given: dict[str, Any] = {"rank_cap": settings.rank_cap}
    rate = settings.server_learning_rate
    if settings.rule not in WITHOUT_STEP:
        given |= {"server_learning_rate": rate} if rate else {}
    elif rate not in (None, 1):
        raise ConfigurationError(
            "aggregation",
            [
                f"server_learning_rate: found {rate:g}, but {settings.rule} replaces the adapter and "
                "takes no step; leave it out, or take rule product-delta"
            ],
        )
    # Only the rules that know them are given these: protocol.federation refuses them beside others.
    own = {name: getattr(settings, name) for name in ("beta_1", "beta_2", "tau", "attackers")}
    rule = _RULES[settings.rule](**given, **{name: value for name, value in own.items() if value is not None})
    if settings.server_momentum:
        return ServerMomentum(rule, settings.server_momentum, settings.rank_cap)
    return rule
