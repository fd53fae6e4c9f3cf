"""Figures that are made of parts: bytes of a rank, seconds of a step."""

from dataclasses import fields
from typing import Any, ClassVar


class Parts:
    """A dataclass of numbers of one unit that add up."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Each by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
