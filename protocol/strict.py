"""What every file of settings is made of: frozen, with no key that nobody reads."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

Name = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4"]


class Strict(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def changed(settings: Strict, *names: str) -> list[str]:
    """Those of the fields that are not as they are by default: what was merely said is forgotten where a plan travels."""
    return [name for name in names if getattr(settings, name) != type(settings).model_fields[name].default]
