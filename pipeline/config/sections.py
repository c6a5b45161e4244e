"""The vocabulary of an experiment: one YAML file plus overrides becomes one frozen tree.

Every section and field is described here or in a file that this one imports (`data_sections.py`, `model_section.py`,
`init_section.py`, `train_sections.py`), and nowhere else; the JSON schema (`configs/schema.json`) and the reference
(`docs/config.md`) are generated from these descriptions.
Rules between the fields of a section stand in that section; rules between sections stand in `Config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from pipeline.config.data_sections import DataConfig, TokenizerConfig
from pipeline.config.deepspeed_keys import refused_settings
from pipeline.config.init_section import InitConfig
from pipeline.config.model_section import ModelConfig
from pipeline.config.section_base import (
    ANY_TEXT,
    Count,
    Name,
    NonNegative,
    NonNegativeInt,
    Section,
    rule,
    wrong_value,
)
from pipeline.config.train_sections import CheckpointConfig, GuardConfig, OptimizerConfig, TrainConfig
from pipeline.errors import Problem

# It begins no option, and a comma separates names.
TaskName = Annotated[str, Field(pattern=r"^[^-,\s][^,\s]*$", max_length=200)]


class TrackingConfig(Section):
    """Where MLflow records the run."""

    uri: str = "sqlite:///mlflow.db"
    """Tracking store: `sqlite:///FILE`, `http(s)://HOST:PORT`, or `none`."""
    experiment: str = Field(default="pipeline", min_length=1)
    """Name of the MLflow experiment."""
    artifact_location: str = "mlartifacts"
    """Folder for the artifacts of a sqlite store."""

    @rule
    def _the_uri_is_a_store(self) -> Iterator[Problem]:
        message = tracking_uri_problem(self.uri)
        if message is not None:
            yield Problem("uri", message)


_ALLOWED_URIS = "allowed: sqlite:///FILE, http(s)://HOST:PORT or none"


def tracking_uri_problem(uri: str) -> str | None:
    """Returns what is wrong with the address of a tracking store; None if nothing."""
    if uri == "none":
        return None
    if uri.startswith("sqlite:///") and len(uri) > len("sqlite:///"):
        # SQLAlchemy would read what follows a ? as options.
        return f"holds a ?; {_ALLOWED_URIS}" if "?" in uri else None
    # An address that may hold a secret is not repeated in the message.
    if "@" in uri:
        return "holds a user name or password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
    if "?" in uri or "#" in uri:
        return f"holds a query or fragment (? or #); set MLFLOW_TRACKING_TOKEN for a token; {_ALLOWED_URIS}"
    try:
        parts = urlsplit(uri)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an unclosed bracket, or a port that is not a number and may be a password
        return f"has an invalid host or port; {_ALLOWED_URIS}"
    return None if whole else f"given {uri!r}, {_ALLOWED_URIS}"


class ContainerConfig(Section):
    """The Apptainer image that jobs run in."""

    image: str | None = None
    """SIF file or sandbox folder made by `pipeline image build`; without it, jobs use the environment of the node."""
    code: Literal["snapshot", "image"] = "snapshot"
    """`snapshot` runs the submitted code from the run folder; `image` runs the code that the image was built with."""
    environment: Literal["inherit", "clean"] = "inherit"
    """Variables seen inside: all, or only the site's and those that a job needs (docs/container.md lists them)."""
    binds: tuple[str, ...] = ()
    """Further folders visible inside, `HOST[:INSIDE[:ro]]`; the paths in the config are always bound."""


class SampleConfig(Section):
    """Text generated at the end of a run and by `pipeline sample`."""

    prompt: Annotated[str, ANY_TEXT] = Field(default="The", min_length=1)
    """Beginning of the text."""
    max_new_tokens: Count = 100
    """Maximum number of tokens to generate."""
    temperature: NonNegative = 0.8
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample from the smallest set of tokens that holds this much probability."""


class EvaluateConfig(Section):
    """Tasks of lm-evaluation-harness that jobs evaluate; a command on this machine takes them as options."""

    tasks: tuple[TaskName, ...] = ()
    """Tasks, groups or tags; empty for the validation loss alone."""
    limit: Count | None = None
    """Only so many documents of each task."""
    num_fewshot: NonNegativeInt | None = None
    """Examples before each document; without it, as many as the task says."""
    include_path: str | None = None
    """Folder of further tasks (docs/evaluation.md)."""
    every_checkpoint: bool = False
    """Evaluate each checkpoint as soon as it is published, in a job of its own at a lower priority."""

    @rule
    def _there_are_tasks(self) -> Iterator[Problem]:
        for name in ("limit", "num_fewshot", "include_path", "every_checkpoint"):
            value = getattr(self, name, None)  # one that is wrong by itself hides no other
            if not self.tasks and value not in (None, False):
                yield wrong_value(name, value, "only together with `tasks`")

    def options(self) -> list[str]:
        """Returns the options of `pipeline evaluate` for these tasks."""
        given = {"--limit": self.limit, "--num-fewshot": self.num_fewshot, "--include-path": self.include_path}
        said = [part for option, value in given.items() if value is not None for part in (option, str(value))]
        return ["--tasks", ",".join(self.tasks), *said]


class Config(Section):
    """One experiment."""

    name: Name
    """Name of the run; its folder is `RUNS_DIR/NAME`."""
    runs_dir: str = "runs"
    """Folder that holds the run folders."""
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    init: InitConfig = InitConfig()
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    tracking: TrackingConfig = TrackingConfig()
    container: ContainerConfig = ContainerConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deepspeed: dict[str, Any] = Field(default={})
    """DeepSpeed's settings for tuning; docs/training.md lists those that are allowed and what each does."""

    @rule
    def _dtype_holds_the_vocabulary(self) -> Iterator[Problem]:
        if self.data.dtype == "uint16" and self.model.vocab_size > 1 << 16:
            needed = f"uint32 or auto; uint16 holds 65536 token ids, and vocab_size = {self.model.vocab_size}"
            yield wrong_value("data.dtype", "uint16", needed)

    @rule
    def _the_vocabulary_holds_bytes_and_special_tokens(self) -> Iterator[Problem]:
        least = 257 + len(self.tokenizer.special_tokens)
        if self.tokenizer.kind != "file" and self.model.vocab_size < least:
            enough = f"at least {least} (256 bytes and the special tokens)"
            yield wrong_value("model.vocab_size", self.model.vocab_size, enough)

    @rule
    def _the_schedule_fits_into_the_steps(self) -> Iterator[Problem]:
        optimizer, steps = self.optimizer, self.train.max_iters
        used = optimizer.warmup_iters + (optimizer.decay_iters or 0)
        if optimizer.schedule in ("wsd", "linear") and used > steps:
            yield wrong_value("train.max_iters", steps, f"at least {used}, the steps of warm-up and decay")

    @rule
    def _deepspeed_is_only_tuned(self) -> Iterator[Problem]:
        yield from (Problem(f"deepspeed.{found.path}", found.message) for found in refused_settings(self.deepspeed))
