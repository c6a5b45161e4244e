"""The whole vocabulary of an experiment: one YAML file plus overrides becomes one frozen tree.

Every section and field is described here and nowhere else; the JSON schema (`configs/schema.json`)
and the reference (`docs/config.md`) are generated from these descriptions. Reading YAML and
reporting problems is `config_load.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A part of the config: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SourceConfig(Section):
    """One named set of text files."""

    name: Name
    """Name of the source, in manifests and in mixing weights."""
    paths: tuple[str, ...] = Field(min_length=1)
    """File names or globs, relative to the working folder; matches are sorted."""
    format: Literal["auto", "txt", "jsonl", "parquet"] = "auto"
    """What the files hold; `auto` goes by the name: `.txt`, `.jsonl`, `.parquet`, or these with `.gz`, `.zst` ..."""
    separator: str | None = Field(default=None, min_length=1)
    """Splits a text file into documents; without it one file is one document."""
    field: str = "text"
    """The JSON field or Parquet column that holds the text."""
    split: Literal["auto", "train", "validation"] = "auto"
    """Which split the documents go to; `auto` decides by a hash of each document."""
    weight: Positive = 1.0
    """Share of this source in training batches, relative to the other weights; with `data.mixing: weighted`."""


class DataConfig(Section):
    """Text, token shards and the order in which training reads them."""

    path: str = "data/tokens"
    """Folder of the token shards and their manifest; made by `pipeline prepare`."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the text comes from."""
    validation_fraction: Fraction = 0.01
    """Part of the documents of `split: auto` sources that goes to validation, chosen by hash."""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Type of a stored token; `auto` takes uint16 where the vocabulary fits."""
    on_bad: Literal["error", "skip"] = "error"
    """A record that cannot be read stops the build, or is skipped and counted."""
    max_bad_fraction: Fraction = 0.01
    """With `on_bad: skip`, the largest part of bad records before the build stops all the same."""
    max_document_mb: Positive = 32.0
    """A longer document is a bad record, in megabytes; this bounds the memory that a build takes."""
    slice_size_mb: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = 64.0
    """Size of the input that is read, encoded and published as one unit, in megabytes."""
    order: Literal["shuffle", "random"] = "shuffle"
    """`shuffle` draws without replacement, epoch by epoch; `random` draws windows at any place, with replacement."""
    mixing: Literal["proportional", "weighted"] = "proportional"
    """`proportional` mixes sources by their tokens; `weighted` by their `weight`."""
    verify: bool = False
    """Check every shard's SHA-256 at start-up, not only its size."""


class TokenizerConfig(Section):
    """How text becomes token ids."""

    kind: Literal["bpe", "file", "bytes"] = "bpe"
    """`bpe` trains one on the sources, `file` takes an existing tokenizer.json, `bytes` has one token a byte."""
    path: str | None = None
    """The tokenizer.json to take, with `kind: file`."""
    split_pattern: Literal["gpt2", "gpt4"] = "gpt2"
    """Pre-tokenization pattern of a trained BPE."""
    end_of_text: str = Field(default="<|endoftext|>", min_length=1)
    """The special token that ends every document."""
    special_tokens: tuple[str, ...] = ()
    """Further special tokens, reserved in the vocabulary; not with `kind: file`, which has its own."""
    train_sample_mb: Positive = 256.0
    """Text that a BPE is trained on, at most, in megabytes."""


class ModelConfig(Section):
    """Shape of the pre-norm decoder-only transformer."""

    vocab_size: Count
    """Number of token embeddings; a trained BPE gets exactly this many tokens."""
    context_length: Count
    """Longest sequence in tokens."""
    d_model: Count
    """Width of the residual stream."""
    num_layers: Count
    """Number of transformer blocks."""
    num_heads: Count
    """Attention heads; `d_model` must be divisible by it."""
    d_ff: Count
    """Inner width of the SwiGLU feed-forward."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""


class OptimizerConfig(Section):
    """AdamW, the cosine schedule with linear warm-up, and gradient clipping."""

    learning_rate: Positive
    """Highest learning rate, reached after warm-up."""
    min_learning_rate: NonNegative
    """Learning rate at the end of the cosine and after it."""
    warmup_iters: NonNegativeInt
    """Steps of linear warm-up from zero."""
    cosine_cycle_iters: Count
    """Step at which the cosine reaches `min_learning_rate`."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    decay_norms: bool = False
    """Decay the gains of the norms too."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    gradient_clip_val: NonNegative = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""


class TrainConfig(Section):
    """The training loop."""

    batch_size: Count
    """Sequences in the global batch, over all ranks and micro-batches."""
    micro_batch_size: Count
    """Sequences per process and forward pass."""
    max_iters: Count
    """Steps to train for."""
    log_interval: Count = 10
    """Steps between logged lines."""
    val_interval: Count = 500
    """Steps between validations."""
    num_val_batches: Count = 50
    """Global batches per validation, at most."""
    checkpoint_interval: Count = 500
    """Steps between checkpoints."""
    seed: NonNegativeInt = 1337
    """Seed of the weights and of the order of the data."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; the weights the optimiser updates are always float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    compile: bool = False
    """Compile the model with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute activations in backward instead of keeping them."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what DeepSpeed partitions over the ranks."""
    offload_optimizer: bool = False
    """Keep float32 weights and moments of the optimiser in host memory; with ZeRO stages 1 to 3."""
    overlap_comm: bool = False
    """Reduce gradients while backward still computes, for some device memory; with ZeRO stages 1 to 3."""


class CheckpointConfig(Section):
    """What is kept of a run, and how it is written."""

    keep_last: Count = 3
    """Newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints whose step is divisible by this are kept for ever; 0 for none."""
    keep_best: bool = True
    """Keep the one with the lowest validation loss."""
    timeout_min: Positive = 30.0
    """Minutes after which a save gives up on a rank whose file does not arrive."""
    if_busy: Literal["wait", "skip"] = "wait"
    """A save that is due while one is still being written waits for it, or is skipped; the last one never is."""
    on_failure: Literal["continue", "stop"] = "continue"
    """After a failed save the run goes on with the last good one, or ends with status 1 at the next save."""


class GuardConfig(Section):
    """What is done about gradients that are not finite, and about losses that jump."""

    max_bad_steps: Count = 5
    """Steps in a row that are skipped for a loss or gradient that is not finite, before training ends."""
    on_spike: Literal["off", "warn", "rollback"] = "warn"
    """A loss far above those before it is reported, or training goes back and leaves the batches out."""
    spike_window: Count = 100
    """Steps whose losses a loss is compared with."""
    spike_sigma: Positive = 6.0
    """Standard deviations above their mean that make a spike."""
    rollback_skip: Count = 2
    """Batches that a rollback leaves out: the one whose loss jumped and those right before it."""
    max_rollbacks: Count = 5
    """Rollbacks in one run before training ends."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str = "sqlite:///mlflow.db"
    """Tracking store: `sqlite:///FILE`, `http(s)://HOST:PORT`, or `none`."""
    experiment: str = Field(default="pipeline", min_length=1)
    """Name of the MLflow experiment."""
    artifact_location: str = "mlartifacts"
    """Folder of the artifacts of a sqlite store."""

    def uri_problem(self) -> str | None:
        """What is wrong with `uri`; None if nothing."""
        return tracking_uri_problem(self.uri)


_ALLOWED_URIS = "allowed: sqlite:///FILE, http(s)://HOST:PORT or none"


def tracking_uri_problem(uri: str) -> str | None:
    """What is wrong with the address of a tracking store; None if nothing."""
    if uri == "none":
        return None
    if uri.startswith("sqlite:///") and len(uri) > len("sqlite:///"):
        # SQLAlchemy would take what follows for options.
        return f"holds a ?; {_ALLOWED_URIS}" if "?" in uri else None
    # The address ends up in config.yaml and in messages: one that may hold a secret is not repeated here either.
    if "@" in uri:
        return "holds a user name or password; give them by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if "?" in uri or "#" in uri:
        return f"holds a query or fragment (? or #); a token is given by MLFLOW_TRACKING_TOKEN; {_ALLOWED_URIS}"
    try:
        parts = urlsplit(uri)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket that is not closed, or a port that is no number, which may be a password
        return f"has a host or port that cannot be; {_ALLOWED_URIS}"
    return None if whole else f"given {uri!r}, {_ALLOWED_URIS}"


class ContainerConfig(Section):
    """The Apptainer image that jobs run in."""

    image: str | None = None
    """A SIF file or a sandbox folder made by `pipeline image build`; without it jobs use the environment they find."""
    code: Literal["snapshot", "image"] = "snapshot"
    """`snapshot` runs the code that was submitted, from the run folder; `image` runs what the image was built with."""
    environment: Literal["inherit", "clean"] = "inherit"
    """Variables seen inside: all, or only the site's, SLURM_*, MASTER_*, MLFLOW_*, NCCL_*, ranks and device lists."""
    binds: tuple[str, ...] = ()
    """Further folders to see inside, `HOST[:INSIDE[:ro]]`; the config's own paths are bound without being named."""


class SampleConfig(Section):
    """Text generated at the end of a run and by `pipeline sample`."""

    prompt: str = Field(default="The", min_length=1)
    """How the text begins."""
    max_new_tokens: Count = 100
    """Tokens to generate."""
    temperature: NonNegative = 0.8
    """0 takes the likeliest token; higher is more varied."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draw from the smallest set of tokens that holds this much probability."""


class Config(Section):
    """One experiment."""

    name: Name
    """Name of the run; its folder is `RUNS_DIR/NAME`."""
    runs_dir: str = "runs"
    """Folder that holds the run folders."""
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    tracking: TrackingConfig = TrackingConfig()
    container: ContainerConfig = ContainerConfig()
    sample: SampleConfig = SampleConfig()
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings, passed through; refused where they contradict the settings above."""

    def data_parallel_problems(self, world_size: int) -> list[str]:
        """What keeps the global batch from being shared by `world_size` processes; empty if nothing."""
        per_pass = self.train.micro_batch_size * world_size
        if self.train.batch_size % per_pass == 0:
            return []
        return [
            f"{self.train.batch_size} is not divisible by micro_batch_size x world size = "
            f"{self.train.micro_batch_size} x {world_size} = {per_pass}"
        ]
