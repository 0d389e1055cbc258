"""The base of everything a recipe can say: frozen, strict, no unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A part of a recipe. A wrong type or an unknown key is an error, never a conversion or a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
