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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
