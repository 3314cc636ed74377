"""The body of `POST /predict`, the short form of a question that serve-gpu and serve-fpga both answer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

PREDICT_TOKENS = 256
"""Longest answer of /predict when the request does not say."""


class Prediction(BaseModel):
    """The body of POST /predict."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str | list[str]
    max_tokens: int = Field(PREDICT_TOKENS, ge=1)
    temperature: float = Field(0.0, ge=0)  # the same answer each time, unless asked otherwise
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
