import os
import random
from collections import Counter

import numpy as np
import pytest
import torch

from tests.cluster import cluster  # noqa: F401 (a fixture)
from tests.shared_memory import close_segments, own_segments, remove_stale_segments

# Without a GPU, kernels run in Triton's interpreter. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tests compare each kernel themselves, and shall see the results of a wrong one.
os.environ.setdefault("M2_PLUGIN_KERNEL_CHECK", "0")

# On a GPU, PyTorch's own convolutions in fp32, which tests compare with, would round to TF32.
torch.backends.cudnn.allow_tf32 = False

# The tests' tensors are small: threads would only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--emulate",
        type=int,
        metavar="CAPABILITY",
        help="execute kernels as they are compiled for GPUs of this capability, 80 or 90",
    )


def pytest_configure(config):
    if capability := config.getoption("--emulate", None):
        from tests.ops.emulation import emulate

        emulate(capability)
    if worker := getattr(config, "workerinput", None):
        own_segments(int(worker["workerid"].removeprefix("gw")))


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

    The files with the most slow tests come first: a long file at the end would run alone.
    """
    slow = Counter(item.path for item in items if "slow" in item.keywords)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path)))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def shared_memory_closed():
    remove_stale_segments()
    yield
    close_segments()
