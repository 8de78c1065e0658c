"""What a federation settles about who is who: whose keys count, and which one the coordinator signs with."""

from pathlib import Path

from pydantic import Field, model_validator

from protocol.strict import Strict


class TrustSettings(Strict):
    """Every message is signed, both ways, and so is every adapter that is released (protocol.signed_messages)."""

    enrolled: Path | None = Field(
        None, description="YAML with everybody's name, public key and role; coordinator and nodes have the same list"
    )
    identity: Path | None = Field(
        None, description="the coordinator's private key, whose public one is enrolled with that role"
    )
    signed: bool = Field(
        False, description="simulations: make keys for the run and sign with them; elsewhere the two files do it"
    )

    @model_validator(mode="after")
    def _both(self) -> "TrustSettings":
        if (self.enrolled is None) != (self.identity is None):
            raise ValueError("enrolled and identity belong together; give both or neither")
        return self
