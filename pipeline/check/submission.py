"""Finds what `pipeline submit` would refuse, by its own rules and by asking Slurm; nothing enters the queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.check.result import Check
from pipeline.check.site_request import unmet_requests
from pipeline.errors import PipelineError, UsageError, listing
from pipeline.launch.job.batch_script import executor
from pipeline.launch.job.spec import JobSpec
from pipeline.launch.slurm import client as slurm
from pipeline.launch.submit.admission import refuse_active, refuse_changed_images
from pipeline.launch.submit.chain import Chain, plan_chain
from pipeline.launch.submit.sbatch_errors import at_fault, may_pass


def check_submission(
    config_file: str, site_file: str, overrides: Sequence[str], sweeps: Sequence[str], known: Sequence[Check]
) -> list[Check]:
    """Plans the jobs as `submit` does, and has sbatch judge each one without submitting it.

    Args:
        config_file: The experiment.
        site_file: The cluster.
        overrides: Dotted overrides.
        sweeps: As `submit` is given them.
        known: The checks before: what they have found is not told again.
    """
    failed = [check for check in known if check.status == "failed"]
    if any(check.name == "slurm" for check in failed):
        return []
    try:
        chain = plan_chain(config_file, site_file, overrides, sweeps)
        refuse_active(chain.runs, chain.home)
        refuse_changed_images(chain.configs)
    except PipelineError as error:
        if any(check.found in str(error) for check in failed):
            return []
        return [Check("submission", "failed", str(error), "`pipeline submit` would refuse it for the same reason")]
    told = {check.name for check in failed}
    jobs = [job for job in chain.jobs if f"request of {job.stage}" not in told]
    stages: dict[Check, list[str]] = {}  # often the same is wrong with all of them
    for job in jobs:
        stages.setdefault(_judged(job, site_file), []).append(job.stage)
    return [replace(check, name=f"submission of {', '.join(names)}") for check, names in stages.items()]


def _judged(job: JobSpec, site_file: str) -> Check:
    """Asks sbatch whether it would accept a job."""
    name = "submission"
    try:
        slurm.call("sbatch", "--test-only", given=executor(job, None).text(len(job.tasks)))
    except slurm.SlurmError as error:
        words = str(error).removeprefix("sbatch: ").replace("allocation failure: ", "")
        if may_pass(words):
            return Check(name, "warning", f"sbatch says now: {words}", "see `sinfo -R`; a job may wait until it passes")
        fault = at_fault(words, job.stage, site_file)
        where, cure = (fault.where, fault.cure) if fault else (site_file, "correct extra_sbatch, or the field it means")
        return Check(name, "failed", f"{where}: Slurm refuses it ({words})", cure)
    return Check(name, "ok", "sbatch would accept it (--test-only)")


def refuse_failed(chain: Chain) -> None:
    """Refuses a submission whose runs cannot work: what `check` fails without starting another program.

    Raises:
        UsageError: Lists every failed check.
    """
    from pipeline.check.check import quick_checks

    checks = [check for config in chain.configs for check in quick_checks(config, chain.site)]
    failed = [check for check in [*checks, *unmet_requests(chain.site)] if check.status == "failed"]
    if failed:
        lines = dict.fromkeys(f"{check.name}: {check.found}; {check.cure}" for check in failed)
        raise UsageError(listing(f"`pipeline check` fails with {chain.site_file}, so nothing was submitted:", lines))
