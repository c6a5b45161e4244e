"""What a start takes over from the start before it, what it refuses, and how its end is recorded."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import pipeline.train.recover as recover
import pipeline.train.startup as startup
from pipeline.checkpoint.layout import OWNER_FILE, Manifest, published
from pipeline.config.load import dump_config
from pipeline.config.sections import Config
from pipeline.data import dataset
from pipeline.data import manifest as module
from pipeline.data.build.display import prepare_here
from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import DatasetManifest
from pipeline.errors import DataError, NothingToDo, PipelineError, StopRequested
from pipeline.model.flops import num_parameters
from pipeline.run.folder import run_for
from pipeline.run.provenance import IMAGE_SHA256_VARIABLE, IMAGE_VARIABLE
from pipeline.run.world import World
from pipeline.text_format import count
from pipeline.train.clock import StepClock
from pipeline.train.engine.fresh import INIT_VERSION
from pipeline.train.loop import train
from pipeline.train.ranks import group
from pipeline.train.recover import Recovery, fill
from pipeline.train.startup import open_session
from tests.experiment import events
from tests.train.conftest import Trained


def test_a_fresh_start_is_at_step_0_with_the_weights_of_the_seed(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock is made last: the time of start-up belongs to no step."""
    config = trained.again(tmp_path)
    weights, fresh_clock = [], StepClock()
    monkeypatch.setattr(startup, "StepClock", lambda: fresh_clock)
    for _ in range(2):
        with open_session(config) as session:
            assert (session.step, session.tokens_seen, session.engine.optimizer_steps) == (0, 0, 0)
            assert session.guard.state()["losses"] == [] and session.evaluation is None
            assert session.validation.count == config.train.num_val_batches * config.train.batch_size
            assert session.validation.chunk == config.train.micro_batch_size
            assert session.clock is fresh_clock
            weights.append([f.tensors["weight"].clone() for f in session.engine.fragments()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert [e["step"] for e in events(run_for(config).path, "started")] == [0, 0]


def test_a_resumed_start_continues_the_state_of_the_checkpoint(resumable: Config, trained: Trained) -> None:
    with open_session(resumable) as session:
        assert (session.step, session.engine.optimizer_steps) == (10, 10)
        assert session.tokens_seen == trained.result.tokens_seen
        assert len(session.guard.state()["losses"]) == 10, "the guard has seen every step"
        session.save(10)
        session.wait_until_durable()
    (resumed,) = events(run_for(resumable).path, "resumed")
    assert (resumed["step"], resumed["world_size"]) == (10, 1)


@pytest.mark.parametrize(("cycle", "cure"), [(40, r"train\.max_iters=20"), (None, r"a new run with init\.from=\S+")])
def test_a_finished_run_that_is_started_again_says_so_and_records_nothing(
    trained: Trained, tmp_path: Path, cycle: int | None, cure: str
) -> None:
    """A cosine that ends with the run would have taken other steps towards a later end."""
    config = trained.again(tmp_path)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"cosine_cycle_iters": cycle})})
    run = run_for(config)
    shutil.copytree(trained.run.path, run.path)
    run.config_file.write_text(dump_config(config))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(NothingToDo, match=rf"{run.path}: finished already, at step 10; {cure} would ") as done:
        train(config)
    assert done.value.exit_code == 0
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert {path.name for path in after if before.get(path) != after[path]} <= {OWNER_FILE}
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_iters": 11})})
    if cycle is not None:
        assert train(longer).step == 11


def test_a_start_says_what_it_trains(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = trained.again(tmp_path)
    with open_session(config):
        pass
    first, second, *_ = capsys.readouterr().err.splitlines()
    tokens = DatasetManifest.load(config.data.path).splits["train"].tokens
    assert first == f"{config.name}: {num_parameters(config.model):,} parameters, fp32, 1 process on CPU"
    assert second == (
        f"10 steps of {8 * config.model.context_length} tokens: {count(80 * config.model.context_length)} tokens, "
        f"{80 * config.model.context_length / tokens:.3g} epochs; run folder {run_for(config).path}"
    )


def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_resumed(
    resumable: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = run_for(resumable).checkpoints
    (file,) = published(checkpoints)[0].glob("rank_*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with open_session(resumable) as session:
        assert session.step == 8
    (rejected,) = events(run_for(resumable).path, "checkpoint_rejected")
    assert "step_00000010" in rejected["problem"]
    said = " ".join(capsys.readouterr().err.split())
    assert "quarantined" in said and "resuming from" in said
    assert (checkpoints / "step_00000010.rejected").is_dir()


def test_a_checkpoint_of_another_dataset_is_refused_before_it_is_loaded(trained: Trained) -> None:
    newest = published(trained.run.checkpoints)[0]
    engine = SimpleNamespace(load=lambda reader: pytest.fail("it was loaded"))
    with pytest.raises(DataError, match=f"{newest}: .*dataset"):
        fill(engine, Recovery(newest, ()), None, trained.config, "e" * 64)  # type: ignore[arg-type]


def test_a_resumed_run_keeps_the_version_of_its_initialization(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints from before there was one have the first."""
    newest, digest = published(trained.run.checkpoints)[0], DatasetManifest.load(Path(trained.config.data.path)).digest
    engine = SimpleNamespace(load=lambda reader: None)

    def resumed() -> int:
        found = fill(engine, Recovery(newest, ()), None, trained.config, digest)  # type: ignore[arg-type]
        return found["initialization"]

    assert resumed() == INIT_VERSION == 2
    state = {key: value for key, value in Manifest.load(newest).state.items() if key != "initialization"}
    older = SimpleNamespace(manifest=SimpleNamespace(state=state, step=10), close=lambda: None)
    monkeypatch.setattr(recover, "CheckpointReader", lambda folder: older)
    assert resumed() == 1


def test_a_run_is_not_resumed_with_data_of_another_tokenizer(resumable: Config) -> None:
    run_for(resumable).tokenizer_file.write_text("{}")
    with pytest.raises(DataError, match="tokenizer"), open_session(resumable):
        pass


def test_a_resumed_start_opens_the_dataset_once(resumable: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(resumable.data.path)
    manifest = DatasetManifest.load(folder)
    looked_at, hashed, loaded = Counter[Path](), [], []
    size, sha256_file, load = module.size_of_regular, dataset.sha256_file, DatasetManifest.load
    monkeypatch.setattr(module, "size_of_regular", lambda file, *at: (looked_at.update([file]), size(file, *at))[1])
    monkeypatch.setattr(dataset, "sha256_file", lambda file, *at: (hashed.append(file), sha256_file(file, *at))[1])
    monkeypatch.setattr(DatasetManifest, "load", lambda path: (loaded.append(path), load(path))[1])
    with open_session(resumable):
        assert run_for(resumable).tokenizer_file.exists()
    shards = [folder / name for shard in manifest.shards for name in shard.sizes(manifest.numpy_dtype)]
    assert {file: looked_at[file] for file in shards} == dict.fromkeys(shards, 1)
    assert loaded == [folder] and hashed == [folder / TOKENIZER]


def test_a_tokenizer_file_of_the_config_must_be_that_of_the_data(trained: Trained, tmp_path: Path) -> None:
    own = tmp_path / "tokenizer.json"
    shutil.copyfile(trained.run.tokenizer_file, own)
    tokenizer = trained.config.tokenizer.model_copy(update={"kind": "file", "path": str(own)})
    data = trained.config.data.model_copy(update={"path": str(tmp_path / "tokens")})
    config = trained.config.model_copy(update={"tokenizer": tokenizer, "data": data})
    prepare_here(config, None)
    train, validation = startup._open_data(config)
    assert (train.name, validation.name) == ("train", "validation")
    own.write_text(own.read_text().replace("<|endoftext|>", "<|end|>"))
    with pytest.raises(DataError, match=f"{data.path}: .*tokenizer"):
        startup._open_data(config)


def test_another_image_is_refused_unless_it_is_allowed(resumable: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMAGE_VARIABLE, "pipeline.sif")
    monkeypatch.setenv(IMAGE_SHA256_VARIABLE, "a" * 64)
    with open_session(resumable):
        pass
    monkeypatch.setenv(IMAGE_SHA256_VARIABLE, "b" * 64)
    with pytest.raises(PipelineError, match="image"), open_session(resumable):
        pass
    longer = resumable.model_copy(update={"train": resumable.train.model_copy(update={"max_iters": 11})})
    with open_session(longer, allow_image_change=True):
        pass


@pytest.mark.parametrize(
    ("error", "kind", "word"),
    [
        (DataError("shard 7 is gone"), "failed", "shard 7 is gone"),
        (StopRequested("stopped"), "preempted", ""),
    ],
)
def test_the_end_of_a_start_is_recorded_once_as_what_it_was(
    trained: Trained, tmp_path: Path, error: Exception, kind: str, word: str
) -> None:
    config = trained.again(tmp_path)

    with pytest.raises(type(error)), open_session(config) as session:
        session.stop.request("time limit")
        session.step = 3
        raise error
    found = [e for name in ("failed", "preempted", "finished") for e in events(run_for(config).path, name)]
    assert [(e["event"], e["step"]) for e in found] == [(kind, 3)]
    assert word in found[0].get("error", "")
    assert found[0].get("reason") == ("time limit" if kind == "preempted" else None)
    assert not torch.distributed.is_initialized()


def test_a_start_takes_the_folder_over_from_an_older_one(resumable: Config) -> None:
    """What the older start still writes disappears, and it can publish nothing any more."""
    checkpoints = run_for(resumable).checkpoints
    left = checkpoints / ".step_00000012.0123abcd.1.tmp"
    left.mkdir()
    before = (checkpoints / ".attempt").read_text()
    with open_session(resumable):
        assert not left.exists()
        assert (checkpoints / ".attempt").read_text() != before


def test_the_memory_of_saves_is_there_before_the_first_step(trained: Trained, tmp_path: Path) -> None:
    with open_session(trained.again(tmp_path)) as session:
        reserved = session.saver._host_copy._slab.numel()
        assert reserved == 3 * sum(fragment.length for fragment in session.engine.fragments())


def test_all_groups_of_a_session_wait_for_a_rank_that_saves(trained: Trained, tmp_path: Path) -> None:
    """DeepSpeed trains in a group of its own."""
    config = trained.again(tmp_path)
    with open_session(config):
        groups = list(dist.distributed_c10d._world.pg_map)
        limits = {one._get_backend(torch.device("cpu")).options._timeout for one in groups}
    assert len(groups) > 1
    assert limits == {group.save_timeout(config.checkpoint)}


def test_the_saver_keeps_a_checkpoint_for_a_rollback(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = run_for(trained.again(tmp_path)), []
    run.checkpoints.mkdir(parents=True)
    monkeypatch.setattr(startup, "CheckpointSaver", lambda *args, **named: kept.append(named))
    with group.process_group(World(), torch.device("cpu")):
        for on_spike in ("warn", "rollback"):
            guard = trained.config.guard.model_copy(update={"on_spike": on_spike})
            config = trained.config.model_copy(update={"guard": guard})
            startup._take_over(config, run, World(), lambda saved: None)
    interval = trained.config.train.checkpoint_interval
    skip = trained.config.guard.rollback_skip
    assert kept == [{"rollback_steps": steps, "interval": interval} for steps in (0, skip)]
