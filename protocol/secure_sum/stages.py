"""What coordinator and node tell each other at each stage of a round's sums, typed and bounded: bytes from outside.

==========  =================================================  ==========================================
stage       the coordinator says                               a node answers
==========  =================================================  ==========================================
train       a call with ``Asked``, and the adapter             ``Adverts``, one for each sum
share       everybody's adverts (``Share``)                    ``Shares``, sealed, by holder
mask        the shares sealed to this node (``Mask``); for     its masked vector, an array of uint32
            the second sum the basis that the first gave, too
confirm     who is in the sum (``Confirm``)                    ``Confirmation``, its signature
open        everybody's confirmations (``Open``)               ``Opened``, shares of what masks the sum
==========  =================================================  ==========================================

The first two carry what both sums need; the other three are said once for each.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from protocol.privacy_settings import Summed
from protocol.secure_sum.messages import PUBLIC_KEY_BYTES, Advert, Opening
from protocol.secure_sum.node import SEALED_BYTES
from protocol.secure_sum.secret_sharing import SHARE_BYTES
from protocol.secure_sum.terms import FEWEST_NODES
from protocol.signature import SIGNATURE_BYTES

# The two sums of a round: on one side of the innovation, then on the other (protocol.secure_sum.sketch).
FIRST, SECOND = 0, 1
# Beyond it the messages would outgrow what Flower carries at once (4 MB of text), and the shares every node's time.
MOST_SUMMED = 2048
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Key = Annotated[bytes, Field(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
_Hash = Annotated[bytes, Field(min_length=32, max_length=32)]
_Signature = Annotated[bytes, Field(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
_Sealed = Annotated[bytes, Field(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
_Share = Annotated[bytes, Field(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
_Names = Annotated[tuple[Name, ...], Field(max_length=MOST_SUMMED)]
_Phase = Literal[0, 1]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_bytes="hex", val_json_bytes="hex")


class Summing(_Told):
    """How updates become vectors that can be added up.

    Attributes:
        run: Drawn for this attempt at this round; no keys are made twice under it.
        kind: What is added up: innovations in product space, or the changes of tensors of one shape.
        limit: Norm to which a node shortens its update.
        examples: Rows that weigh 1, as more do.
        width: Columns of the sketch.
    """

    run: Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
    kind: Summed
    limit: float = Field(ge=1e-3, le=1e4)
    examples: int = Field(ge=1, le=2**24)
    width: int = Field(ge=1, le=2**15)


class Asked(Summing):
    """What everybody whose updates are to be added up is told; part of the call.

    Attributes:
        nodes: Names of all who are asked.
        call: Digest of what the call says to all of them alike (``protocol.records.Call.alike``).
        neighbours, share: As in ``protocol.secure_sum.terms``.
    """

    nodes: Annotated[tuple[Name, ...], Field(min_length=FEWEST_NODES, max_length=MOST_SUMMED)]
    call: Annotated[str, StringConstraints(pattern="^([0-9a-f]{64})?$")] = ""
    neighbours: int = Field(0, ge=0, le=1024)
    share: float = Field(gt=0.5, le=1)


class ToldAdvert(_Told):
    """``Advert``."""

    sealing: _Key
    masking: _Key
    commitment: _Hash
    signature: _Signature

    @classmethod
    def of(cls, advert: Advert) -> "ToldAdvert":
        """As it travels."""
        return cls(sealing=advert.sealing, masking=advert.masking, commitment=advert.commitment, signature=advert.signature)

    def advert(self) -> Advert:
        """As it is worked with."""
        return Advert(self.sealing, self.masking, self.commitment, self.signature)


_PerSum = Field(min_length=1, max_length=2)


class Adverts(_Told):
    """A node's public keys for each sum."""

    adverts: Annotated[tuple[ToldAdvert, ...], _PerSum]


class _Stage(_Told):
    """What every later question says: of which attempt it is."""

    federation: str
    run: Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]


class Share(_Stage):
    """Everybody's public keys, for each sum by node."""

    stage: Literal["share"] = "share"
    adverts: Annotated[tuple[Annotated[dict[Name, ToldAdvert], Field(max_length=MOST_SUMMED)], ...], _PerSum]


class Shares(_Told):
    """A node's secrets, for each sum split and sealed, by holder."""

    sealed: Annotated[tuple[Annotated[dict[Name, _Sealed], Field(max_length=MOST_SUMMED)], ...], _PerSum]


class Mask(_Stage):
    """The shares that others have sealed to this node, by who sealed them."""

    stage: Literal["mask"] = "mask"
    phase: _Phase
    shares: Annotated[dict[Name, _Sealed], Field(max_length=MOST_SUMMED)]


class Confirm(_Stage):
    """Whose vectors were added."""

    stage: Literal["confirm"] = "confirm"
    phase: _Phase
    survivors: _Names


class Confirmation(_Told):
    """A signature under the list."""

    signature: _Signature


class Open(_Stage):
    """Signatures under the same list, by node."""

    stage: Literal["open"] = "open"
    phase: _Phase
    confirmations: Annotated[dict[Name, _Signature], Field(max_length=MOST_SUMMED)]


class Opened(_Told):
    """``Opening``."""

    seeds: Annotated[dict[Name, _Share], Field(max_length=MOST_SUMMED)]
    keys: Annotated[dict[Name, _Share], Field(max_length=MOST_SUMMED)]

    def opening(self) -> Opening:
        """As it is worked with."""
        return Opening(self.seeds, self.keys)


class Next(BaseModel):
    """A question after training, whichever."""

    model_config = ConfigDict(frozen=True)

    question: Annotated[Share | Mask | Confirm | Open, Field(discriminator="stage")]
