"""What a new run starts from, other than weights drawn from the seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, create_model

from pipeline.config.section_base import NonNegativeInt, Section, rule, wrong_value
from pipeline.errors import Problem

_HF = "hf:"

Step = Annotated[
    NonNegativeInt | None,
    BeforeValidator(
        lambda value: None if value == "newest" else value,
        json_schema_input_type=NonNegativeInt | Literal["newest"] | None,
    ),
]

# `from` cannot be written as a field: it is a keyword.
_From = create_model(
    "_From",
    __base__=Section,
    **{
        "from": (
            Annotated[str, Field(min_length=1)] | None,
            Field(
                default=None,
                description="`hf:FOLDER`, a model in Hugging Face's format, or the folder of another run or of a "
                "checkpoint (docs/start-from.md); unset, weights are drawn from the seed.",
            ),
        )
    },  # type: ignore[call-overload]
)


class InitConfig(_From):  # type: ignore[valid-type, misc]
    """What a new run starts from."""

    step: Step = None
    """Which checkpoint of another run: its step, or `newest`, as if unset."""
    what: Literal["weights", "all"] = "weights"
    """What it takes: the weights, with moments and step at zero, or moments, step and order of the data too."""

    @rule
    def _a_model_folder_holds_only_weights(self) -> Iterator[Problem]:
        if self.place is None:
            allowed = "only together with `from`, which names another run or a checkpoint"
        elif self.place == _HF:
            yield wrong_value("from", self.place, "hf:FOLDER, a run's folder or a checkpoint's")
            return
        elif self.is_model_folder:
            allowed = "only for another run or a checkpoint; a model folder holds weights and no step"
        else:
            return
        if self.what == "all":
            yield wrong_value("what", self.what, allowed)
        if self.step is not None:
            yield wrong_value("step", self.step, allowed)

    @property
    def place(self) -> str | None:
        """The text of `from`."""
        found: str | None = getattr(self, "from")
        return found

    @property
    def is_model_folder(self) -> bool:
        """Whether the run starts from a folder in Hugging Face's format."""
        return self.place is not None and self.place.startswith(_HF)

    @property
    def folder(self) -> Path | None:
        """The folder; None if weights are drawn."""
        return None if self.place is None else Path(self.place.removeprefix(_HF))
