import atexit
import gc
import os
import random
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cluster import cluster  # noqa: F401 (a fixture)

# Without a GPU, kernels run in Triton's interpreter. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tests compare each kernel themselves, and shall see the results of a wrong one.
os.environ.setdefault("M2_PLUGIN_KERNEL_CHECK", "0")

# The tests' tensors are small: threads would only wait for each other.
torch.set_num_threads(1)


# What a file of tests names if it reads streams, itself or in a run. Some leave that to a script.
OF_STREAMS = re.compile(
    r"\bmds\b|StreamingDataset|The retrieval YAML|test_own_texts|test_everything_works"
)


SEGMENT = re.compile(r"\d{6}_[a-z_]+")
MAPPED = re.compile(r"/dev/shm/\d{6}_[a-z_]+")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    if config.pluginmanager.hasplugin("xdist"):
        _group(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def _group(items):
    """With `pytest -n 2 --dist loadgroup`, a file's tests run in one process, in their order.

    So do the files that read streams: if two processes open some at once, Streaming may give both
    the same shared memory. They come first, since they take longest.
    """
    paths = {item.path for item in items}
    of_streams = {path for path in paths if OF_STREAMS.search(path.read_text())}
    for item in items:
        group = "streams" if item.path in of_streams else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path not in of_streams)


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# Streaming opens what it finds of others, and each test of a killed run leaves some.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


@pytest.fixture(autouse=True, scope="module")
def shared_memory_closed():
    """Remove what killed runs left, and close what Streaming keeps open until the process ends.

    A dataset opens all segments that it finds, besides its own. In one process, hundreds of tests
    would run into the limit of open files.
    """
    _remove_stale_segments()
    yield
    if "streaming" not in sys.modules:
        return
    from streaming.base.shared import SharedMemory

    gc.collect()
    for memory in [x for x in gc.get_objects() if type(x) is SharedMemory]:
        try:
            memory.cleanup()
        except BufferError:  # a dataset still uses it
            continue
        atexit.unregister(memory.cleanup)


def _remove_stale_segments():
    """Remove Streaming's segments that no process has in its memory."""
    segments = {path for path in Path("/dev/shm").glob("*") if SEGMENT.fullmatch(path.name)}
    if not segments:
        return
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or belongs to another user
            used |= set(MAPPED.findall(maps.read_text()))
    for path in segments:
        if str(path) not in used:
            path.unlink(missing_ok=True)
