"""The host's launcher: `composer train.py YAML [key=value ...]`."""

import sys
import time

from composer.utils import dist
from llmfoundry.command_utils import train_from_yaml

from m2_plugin.foundry.errors import RunError

if __name__ == "__main__":
    try:
        train_from_yaml(sys.argv[1], sys.argv[2:])
    except RunError as error:
        if dist.get_global_rank() != 0:
            time.sleep(20)  # rank 0 has the same error and says so; then composer ends this one
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
