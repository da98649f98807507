"""What every section of a configuration is made of: strict mappings of known keys, and the types of their values."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Names = Annotated[tuple[str, ...], as_tuple]


def either(collection: str, otherwise: str) -> Discriminator:
    """Choose a union's branch by whether a mapping or list stands there, so that an error speaks of one branch only."""
    kinds = dict | list | tuple | BaseModel
    return Discriminator(lambda value: collection if isinstance(value, kinds) else otherwise)


class Section(BaseModel):
    """A mapping of known keys; it cannot be changed after it is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
