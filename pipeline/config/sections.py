"""The vocabulary of an experiment: one YAML file plus overrides becomes one frozen tree.

Every section and field is described here, in `model_section.py` or in `data_sections.py` and nowhere else; the JSON
schema (`configs/schema.json`) and the reference (`docs/config.md`) are generated from these descriptions.
Rules between the fields of a section stand in that section; rules between sections stand in `Config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, create_model

from pipeline.config.data_sections import DataConfig, TokenizerConfig
from pipeline.config.deepspeed_keys import refused_settings
from pipeline.config.model_section import ModelConfig
from pipeline.config.section_base import (
    ANY_TEXT,
    Count,
    Fraction,
    Name,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
    rule,
    wrong_value,
)  # fmt: skip
from pipeline.errors import Problem


class OptimizerConfig(Section):
    """AdamW, the cosine schedule with linear warm-up, and gradient clipping."""

    learning_rate: Positive
    """Highest learning rate, reached after warm-up."""
    min_learning_rate: NonNegative
    """Learning rate at the end of the cosine and afterwards."""
    warmup_iters: NonNegativeInt
    """Steps of linear warm-up from zero."""
    cosine_cycle_iters: Count
    """Step at which the cosine reaches `min_learning_rate`."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    decay_norms: bool = False
    """Also decay the gains of the norms."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    eps: Positive = 1e-8
    """Added to the square root of the second moment."""
    gradient_clip_val: NonNegative = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    z_loss: NonNegative = 0.0
    """Factor of the squared log of softmax's denominator, added to the loss to keep the logits small; 1e-4 in PaLM."""

    @rule
    def _warmup_ends_before_the_cosine(self) -> Iterator[Problem]:
        if self.warmup_iters > self.cosine_cycle_iters:
            most = f"at most cosine_cycle_iters = {self.cosine_cycle_iters}"
            yield wrong_value("warmup_iters", self.warmup_iters, most)

    @rule
    def _the_learning_rate_falls(self) -> Iterator[Problem]:
        if self.min_learning_rate > self.learning_rate:
            most = f"at most learning_rate = {self.learning_rate}"
            yield wrong_value("min_learning_rate", self.min_learning_rate, most)


def _of_a_switch(value: Any) -> Any:
    """Reads what runs of earlier versions hold, where it was a switch."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


ActivationCheckpointing = Annotated[Literal["none", "full", "selective"], BeforeValidator(_of_a_switch)]


class TrainConfig(Section):
    """The training loop."""

    batch_size: Count
    """Sequences in the global batch, over all ranks and micro-batches."""
    micro_batch_size: Count
    """Sequences per process and forward pass."""
    max_iters: Count
    """Steps to train for."""
    log_interval: Count = 10
    """Steps between log lines."""
    val_interval: Count = 500
    """Steps between validations."""
    num_val_batches: Count = 50
    """Maximum number of global batches per validation."""
    checkpoint_interval: Count = 500
    """Steps between checkpoints."""
    seed: NonNegativeInt = 1337
    """Seed of the weights and of the order of the data."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; `bf16` also moves weights and gradients in bf16 at ZeRO stages 1 to 3. The
    optimiser always updates float32 weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses a GPU if there is one."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""
    loss_chunk_tokens: Count = 2048
    """Largest number of tokens whose logits are in memory at a time."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What the backward pass recomputes instead of keeping it: nothing, each block, or all of a block but the results
    of attention and matrix products."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what DeepSpeed partitions over the ranks."""
    offload_optimizer: bool = False
    """Keep the optimiser's float32 weights and moments in host memory; with ZeRO stages 1 to 3."""
    overlap_comm: bool | None = None
    """Reduce gradients during the backward pass, at the cost of device memory; unset, only ZeRO stage 3 does."""

    @rule
    def _offload_needs_zero(self) -> Iterator[Problem]:
        if self.offload_optimizer and self.zero_stage == 0:
            yield wrong_value("offload_optimizer", True, "only with zero_stage 1, 2 or 3")

    @rule
    def _overlap_needs_zero(self) -> Iterator[Problem]:
        if self.overlap_comm and self.zero_stage == 0:
            yield wrong_value("overlap_comm", True, "only with zero_stage 1, 2 or 3")


class CheckpointConfig(Section):
    """Which checkpoints are kept, and how they are written."""

    keep_last: Count = 3
    """Number of newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints whose step is divisible by this are kept forever; 0 for none."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss."""
    timeout_min: Annotated[float, Field(gt=0, le=1e6)] = 30.0
    """Minutes after which a save gives up on a rank whose file does not arrive."""
    if_busy: Literal["wait", "skip"] = "wait"
    """A save that is due while another is being written waits for it or is skipped; the last save is never skipped."""
    on_failure: Literal["continue", "stop"] = "continue"
    """After a failed save, training continues with the last good checkpoint, or ends with status 1 at the next save."""
    max_failures: Count = 5
    """Failed saves in a row after which training ends with status 1 all the same. A save that is still being written
    after `timeout_min` counts once more whenever another is due."""


class GuardConfig(Section):
    """What happens on a loss or gradient that is not finite, and on a loss spike."""

    max_bad_steps: Count = 5
    """Consecutive steps skipped for a loss or gradient that is not finite, before training ends."""
    on_spike: Literal["off", "warn", "rollback"] = "warn"
    """`warn` reports a loss far above those before it; `rollback` rolls back and skips the batches around it."""
    spike_window: Count = 100
    """Number of preceding steps that a loss is compared with."""
    spike_sigma: Positive = 6.0
    """Standard deviations above the mean of the window that make a spike."""
    rollback_skip: Count = 2
    """Batches that a rollback skips: the one whose loss spiked and those right before it."""
    max_rollbacks: Count = 5
    """Rollbacks allowed in one run before training ends."""


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


# `from` cannot be written as a field: it is a keyword.
_From = create_model(
    "_From",
    __base__=Section,
    **{
        "from": (
            Annotated[str, Field(pattern="^hf:.")] | None,
            Field(
                default=None,
                description="`hf:FOLDER`, the folder of a model in Hugging Face's format (docs/start-from.md); unset, "
                "weights are drawn from the seed.",
            ),
        )
    },  # type: ignore[call-overload]
)


class InitConfig(_From):  # type: ignore[valid-type, misc]
    """What a new run starts from."""

    what: Literal["weights"] = "weights"
    """What it takes: the weights; moments and step begin at zero."""

    @property
    def folder(self) -> Path | None:
        """The folder; None if weights are drawn."""
        place: str | None = getattr(self, "from")
        return None if place is None else Path(place.removeprefix("hf:"))


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
    def _deepspeed_is_only_tuned(self) -> Iterator[Problem]:
        yield from (Problem(f"deepspeed.{found.path}", found.message) for found in refused_settings(self.deepspeed))
