import os
import random

import numpy as np
import pytest
import torch

# Without a GPU, kernels run in Triton's interpreter. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tests compare each kernel themselves, and shall see the results of a wrong one.
os.environ.setdefault("M2_PLUGIN_KERNEL_CHECK", "0")

# The tests' tensors are small: threads would only wait for each other.
torch.set_num_threads(1)


# Slow tests whose runs do not read streams.
WITHOUT_STREAMS = ("glue", "test_heads_end_to_end.py", "test_preflight.py")


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

    So do all runs that read streams: if two start at once, Streaming can mix up their memory.
    They come first, since they take longest.
    """

    def reads_streams(item):
        is_slow = item.get_closest_marker("slow") is not None
        return is_slow and not set(item.path.parts) & set(WITHOUT_STREAMS)

    for item in items:
        group = "runs" if reads_streams(item) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: not reads_streams(item))


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
