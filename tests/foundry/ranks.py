"""Run llm-foundry's `train` in forked ranks, so that one import of llm-foundry serves all jobs.

    python -m tests.foundry.ranks jobs.json

Each job has a `world_size`, and either the `config` of a training run or a `function` of
`on_ranks` with its `arguments`. `to_file` names a sharded checkpoint and a file: the one is
converted to the other before the run. Successive jobs of one size share their ranks. Other tests
cover the launcher, which needs an import in each rank.
"""

import json
import os
import sys
import traceback
from itertools import groupby
from typing import Any

from tests.benchmarks.kill import free_port, rank_environment
from tests.shared_memory import close_segments


def run_rank(rank: int, world_size: int, port: int, jobs: list[dict[str, Any]]) -> None:
    from llmfoundry.command_utils import train
    from omegaconf import OmegaConf
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from tests.foundry import on_ranks

    for job in jobs:
        os.environ |= rank_environment(rank, world_size, port)
        if "function" in job:
            getattr(on_ranks, job["function"])(**job["arguments"])
        else:
            if "to_file" in job:
                dcp_to_torch_save(*job["to_file"])
            train(OmegaConf.create(job["config"]))
            close_segments()


def fork_rank(*args: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run_rank(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(file: str) -> int:
    import torch

    from tests import preloaded  # noqa: F401

    torch.set_num_threads(1)
    with open(file) as jobs:
        groups = groupby(json.load(jobs), key=lambda job: job["world_size"])
        for world_size, group in groups:
            batch, port = list(group), free_port()
            ranks = [fork_rank(rank, world_size, port, batch) for rank in range(world_size)]
            if any(os.waitpid(rank, 0)[1] for rank in ranks):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
