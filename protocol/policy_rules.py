"""The names of the rules that an institution's policy may hold: all that a refusal tells a coordinator.

A rule is named as its key in the policy's file (``client.policy``). The list is closed, so that nothing of a node's own can
leave in the name of a rule, and a coordinator shows no text that a node has made up.
"""

from collections.abc import Mapping, Sequence

# What each bounds, in the words of docs/reference.md.
RULES: Mapping[str, str] = {
    "federations": "names of the federations that it takes part in",
    "coordinators": "fingerprints of the coordinators' keys that may ask; nobody may whose messages are not signed",
    "base_models": "names of base models, as plans write them",
    "base_digests": "digests of base models; what lies on this machine must have one of them",
    "objectives": "objectives of plans",
    "methods": "methods of plans",
    "precisions": "precisions of plans; this machine may hold the base with fewer bits",
    "rank": "largest rank of an update that a plan may ask for",
    "rounds": "most rounds of a federation",
    "local_steps": "most steps of a round; without epochs beside it a plan must count steps",
    "epochs": "most passes over the rows in a round; without local_steps beside it a plan must count epochs",
    "learning_rate": "largest learning rate, of a head too",
    "max_length": "longest row, in tokens",
    "masking": "personal data that must be masked, by the plan or by this node's data_policy; all: every kind",
    "reward_functions": "whether plans may call the functions that the node's settings list",
    "endpoints": "whether plans may send prompts to the endpoints that the node's settings list",
    "whole_model": "whether plans may train the base itself: full, freezing, bitfit, lora.modules_to_save, routers of experts",
    "minimum_nodes": "updates without which the federation merges nothing, at least so many",
    "secure_sum": "updates leave into secure sums alone",
    "fewest_summed": "how many nodes a sum hides it among at least",
    "epsilon": "largest epsilon of the federation's promise to each institution",
    "delta": "largest delta of that promise",
    "noise": "who adds the noise of that promise",
    "example_epsilon": "largest epsilon of the plan's promise to each row",
    "example_delta": "largest delta of that promise",
    "days": "days on which it trains and measures: mon, tue, wed, thu, fri, sat, sun",
    "quiet_hours": "hours in which it neither trains nor measures, such as 22:00-06:00",
    "rounds_per_day": "trainings begun on one day, all federations together",
    "evaluate": "whether it measures global adapters on its held-out rows",
    "upload_bytes": "most bytes of arrays in one answer",
}
_CODE = "policy"


def code(rules: Sequence[str]) -> str:
    """What a refusal says to the other side."""
    return f"{_CODE}.{','.join(rules)}"


def refused(reason: str) -> str | None:
    """A node's refusal in words; None where its answer is none, or names a rule that there is not."""
    kind, _, names = reason.partition(".")
    rules = names.split(",")
    if kind != _CODE or len(set(rules)) < len(rules) or not set(rules) <= RULES.keys():
        return None
    return f"the node's policy refuses it: {', '.join(rules)}"
