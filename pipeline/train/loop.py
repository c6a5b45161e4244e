"""The training loop."""

from __future__ import annotations

from pipeline.config.sections import Config
from pipeline.errors import StopRequested
from pipeline.optim.schedule import learning_rates
from pipeline.train.clock import STALL, every
from pipeline.train.incidents import inspect, roll_back
from pipeline.train.ranks.stop import StopRequest
from pipeline.train.session import Session, TrainResult
from pipeline.train.startup import open_session


def train(config: Config, allow_image_change: bool = False, stop: StopRequest | None = None) -> TrainResult:
    """Trains in this process, together with the other ranks; resumes the run where the last start left it.

    Args:
        config: The experiment.
        allow_image_change: Resume in another image than the one the run last trained in.
        stop: Whether this process was asked to stop; by default from now on.

    Raises:
        StopRequested: A stop was requested; everything is saved.
        PipelineError: The data or the run folder cannot be used.
    """
    with open_session(config, allow_image_change, stop) as session:
        run_loop(session, config)
        return session.result()


def run_loop(session: Session, config: Config) -> None:
    """Trains from the first missing step to the last."""
    train, optim, engine, clock = config.train, config.optimizer, session.engine, session.clock
    learning_rate = learning_rates(optim, train.max_iters)
    step = session.step
    session.run_missed_validation()
    while step < train.max_iters:
        session.begin_step(step)
        lr = learning_rate(step)
        engine.set_learning_rate(lr)
        engine.zero_grad()

        losses = []
        for batch in session.micro_batches(step):
            clock.lap("data")
            loss, cross_entropy = engine.loss(*batch)
            engine.backward(loss)
            losses.append(cross_entropy)
            clock.lap("forward_backward")

        asked = session.stop.requested, session.profile.asked
        numbers = engine.reduce_and_clip(optim.gradient_clip_val, losses, *asked)
        clock.lap("optimizer")
        session.saver.wait_for_copy()  # a save may still be copying what the step is about to change
        clock.lap(STALL)
        engine.step()
        clock.lap("optimizer")

        step += 1
        session.log(step, lr, numbers)
        verdict = inspect(session, step, numbers)
        if verdict.rollback is not None:
            step = roll_back(session, verdict.rollback)
            continue
        if session.validation_due(step) and not verdict.stop:  # a stop saves first; the next start validates
            session.validate(step)
        if every(step, train.checkpoint_interval) or step == train.max_iters or verdict.stop:
            session.save(step)
        if verdict.stop:
            session.wait_until_durable()
            raise StopRequested(session.stop.message(step))
