"""What a federation settles about what its coordinator keeps: whether it is sealed, and where the audit log lies."""

from pathlib import Path

from pydantic import Field, model_validator

from protocol.strict import Name, Strict


class AtRestSettings(Strict):
    """Of the coordinator's own disk; nodes settle theirs themselves. Nothing of it is sent."""

    vault: Path | None = Field(
        None,
        description="key file with which rounds and adapters in output are sealed (fedge vault keygen); they are not without",
    )
    passphrase_env: Name | None = Field(
        None, description="environment variable with the key file's passphrase, where it is under one"
    )
    audit: Path | None = Field(
        None,
        description="the audit log, from the first moment on; without it audit.jsonl in output, from the first kept round on",
    )

    @model_validator(mode="after")
    def _of_a_key(self) -> "AtRestSettings":
        if self.passphrase_env and not self.vault:
            raise ValueError("passphrase_env is of the key file that vault names; name it, or leave this out")
        return self
