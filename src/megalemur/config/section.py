"""What every part of a run file has in common: frozen, strict, keyword-only, documented field by field."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One part of a run file. Unknown keys are errors; values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
