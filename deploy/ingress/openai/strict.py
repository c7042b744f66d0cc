"""What all request bodies have in common: nothing is converted, nothing is ignored."""

import itertools
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from deploy.ingress.openai.fields import refuse
from deploy.ingress.openai.neutral import Neutral


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    NEUTRAL: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, accepted in cls.NEUTRAL.items():
            value = body.get(name)
            if value is not None and not any(type(value) is type(known) and value == known for known in accepted):
                raise refuse(name, f"{name} is not supported", "unsupported")
        known = cls.model_fields.keys() | cls.NEUTRAL.keys()
        # One field that nobody knows is as good as thousands: pydantic writes an error for each.
        unknown = itertools.islice((item for item in body.items() if item[0] not in known), 1)
        return {k: body[k] for k in cls.model_fields if body.get(k) is not None} | dict(unknown)
