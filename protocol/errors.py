"""The tree of errors: what was found, what was expected, what to do.

    FedgeError                     anything this project raises on purpose
    ├── UserError                  a mistake the person at the keyboard can mend (exit code 2)
    │   ├── ConfigurationError     a plan, federation or node file; carries every problem at once
    │   ├── DataError              a data file or a row of it
    │   ├── ModelError             a base model that is missing or cannot do what was asked
    │   ├── HardwareError          a plan that does not fit this machine
    │   │   └── NotNowError        a device that could, but not at this moment
    │   ├── DivergenceError        a training whose loss left all bounds, twice
    │   ├── PrivacyError           a promise of privacy that cannot be kept
    │   │   └── BudgetSpentError   one more release would be more than the privacy budget allows
    │   ├── VaultError             a sealed file, or a key of one, that does not open
    │   ├── PolicyError            what an institution's policy does not allow
    │   └── BundleError            files that are not a valid bundle
    │       └── SignatureError     a key or a signature that does not hold
    ├── AdapterError               bytes, tensors or files that are not a valid adapter
    │   └── BaseMismatchError      a valid adapter, but of another base model
    ├── MessageError               a Flower message that does not follow the protocol
    │   ├── StartMissingError      a message that counts on an adapter which this node no longer holds
    │   └── StaleMessageError      a signed message that was sent before, or is older than one that was accepted
    ├── AuditError                 an audit log whose chain of lines is broken
    ├── EndpointError              an endpoint that gave no usable answer
    ├── SecureSumError             a secure sum that cannot go on, and reveals nothing
    └── FederationError            a round or a federation that cannot go on

Messages never quote the content of a row: paths, line numbers, field names, shapes and counts only.
Every class has a ``code``: the only thing about an error that may leave a node.
"""

from collections.abc import Sequence

from protocol.policy_rules import code


def shown(text: str, longest: int = 500) -> str:
    """Text from outside as it may be kept, logged and printed: cut, and with escapes for what steers a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:longest])[:longest]


class FedgeError(Exception):
    """Anything this project raises on purpose; ``code`` is what may cross the network."""

    code: str = "internal"


class UserError(FedgeError):
    """A mistake that the person at the keyboard can mend; commands exit with code 2."""

    code = "user"


class ConfigurationError(UserError):
    """A configuration that cannot be used. Carries all of its problems, not just the first.

    Args:
        source: What was read (a path, or ``"run config"``).
        problems: One line each: where, what was found, what was expected.
    """

    code = "configuration"

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in self.problems))


class DataError(UserError):
    """A data file, or a row of it, that cannot be used; names file and line, never the content."""

    code = "data"


class ModelError(UserError):
    """A base model that is missing or cannot do what the plan asks."""

    code = "model"


class HardwareError(UserError):
    """A plan that does not fit this machine's memory, however it is made smaller."""

    code = "hardware"


class NotNowError(HardwareError):
    """A device that could, but not at this moment: its battery is low, or its bytes are spent. It may be asked again later."""

    code = "not-now"


class DivergenceError(UserError):
    """A training whose loss became NaN or exploded, with half the learning rate too."""

    code = "diverged"


class PrivacyError(UserError):
    """A promise of differential privacy that cannot be kept: numbers that make none, or a budget that is spent."""

    code = "privacy"


class BudgetSpentError(PrivacyError):
    """The next release is more than the privacy budget allows; a run ends with what it has."""

    code = "privacy"


class PolicyError(UserError):
    """What an institution's policy does not allow.

    Args:
        rules: Names of the rules that refuse it, which are all that leaves (``protocol.policy_rules``).
        problems: One line each: the rule, what was asked, what is allowed.
    """

    code = "policy"

    def __init__(self, rules: Sequence[str], problems: Sequence[str]) -> None:
        self.rules = tuple(rules)
        self.code = code(self.rules)
        super().__init__("the policy refuses it\n" + "\n".join(f"  - {problem}" for problem in problems))


class VaultError(UserError):
    """A sealed file, or the key of one, that does not open: wrong, changed, cut off or taken for something else."""

    code = "vault"


class BundleError(UserError):
    """Files that are not a valid bundle, or not the one that was signed."""

    code = "bundle"


class SignatureError(BundleError):
    """A key that is none, or a signature that no trusted key has made over these bytes."""

    code = "signature"


class AdapterError(FedgeError):
    """Bytes, tensors or files that are not a valid adapter."""

    code = "adapter"


class BaseMismatchError(AdapterError):
    """A valid adapter that was trained on another base model."""

    code = "base-mismatch"


class MessageError(FedgeError):
    """A Flower message that does not follow the protocol. Its text quotes names from outside and is ``shown``."""

    code = "message"

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class StartMissingError(MessageError):
    """The adapter that a message's arrays are a difference to is not held here; whole, it can be read."""

    code = "start-missing"


class AuditError(FedgeError):
    """An audit log that was changed since it was written; names the line, never what stands in it."""

    code = "audit"


class StaleMessageError(MessageError):
    """A signed message that is not newer than all that were accepted from the same coordinator."""

    code = "stale"


class EndpointError(FedgeError):
    """An endpoint that gave no usable answer; names address and status, never what was asked or answered."""

    code = "endpoint"


class FederationError(FedgeError):
    """A round or a federation that cannot go on."""

    code = "federation"


class SecureSumError(FedgeError):
    """A secure sum that cannot go on: too few, not whom they say, or other than agreed. Nothing is revealed."""

    code = "secure-sum"
