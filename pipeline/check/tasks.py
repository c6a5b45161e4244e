"""Whether the tasks that jobs evaluate are known, and their data is in the cache; run by `node.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.check.result import Check
from pipeline.errors import PackageMissing, PipelineError
from pipeline.run.evaluations import data_cache


def check_tasks(evaluate: dict[str, Any]) -> Check:
    """Loads the tasks of a config's section `evaluate`, without the network, and makes the prompts of one document."""
    try:
        from pipeline.evaluate.harness import start_harness

        start_harness(fetching=False)
        from pipeline.evaluate.tasks import Asked, build_requests, load_task_sets, seed_draws

        include = evaluate["include_path"]
        names = tuple(evaluate["tasks"])
        sets = load_task_sets(Asked(names, num_fewshot=evaluate["num_fewshot"], include_path=include and Path(include)))
        seed_draws(sets)
        for name, task in ((name, task) for one in sets for name, task in one.tasks.items()):
            build_requests(name, task, limit=1)
    except PackageMissing as error:
        return Check("tasks", "failed", str(error), "or take the section `evaluate` out of the config")
    except PipelineError as error:
        title, *rest = str(error).splitlines()
        *items, cure = rest or [""]
        return Check(
            "tasks", "failed", "; ".join([title, *map(str.strip, items)]), cure.strip() or "correct `evaluate`"
        )
    count = sum(len(one.tasks) for one in sets)
    return Check("tasks", "ok", f"{count} task{'s' if count > 1 else ''}, their data is in {data_cache()}")
