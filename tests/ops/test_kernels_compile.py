"""Every kernel launch compiles for its GPUs without one, fits, and spills nothing by default."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.utils import ROOT

# Shared memory of a multiprocessor that one program can have, by compute capability.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_kernels_compile_without_spills(capability, tmp_path):
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), "--usual", str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len({row["kernel"] for row in rows}) >= 4
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[capability], row
        assert not row["narrow"], f"see fitting_warps: {row}"
        # What a machine takes only if it found it faster may spill a little.
        assert row["stack"] <= (216 if row["alternative"] else 0), f"spills registers: {row}"
    if capability >= 90:  # Hopper's matrix unit is used where it counts
        products = ("mlp_forward_kernel", "product_kernel", "weight_grad_kernel")
        fused = [
            r for r in rows if r["kernel"] in products and r["case"].startswith("mlp glu D768")
        ]
        fused = [r for r in fused if "bfloat16" in r["case"]]
        assert fused and all(row["wgmma"] for row in fused)
        names = ("toeplitz_forward_kernel", "toeplitz_backward_kernel", "taps_grad_kernel")
        short = [r for r in rows if r["case"] == "toeplitz L128 B64 bfloat16"]
        short = [r for r in short if r["kernel"] in names]
        assert {r["kernel"] for r in short} == set(names)
        assert all(row["wgmma"] for row in short)
        ffts = [r for r in rows if r["kernel"].startswith(("cyclic", "monarch"))]
        ffts = [r for r in ffts if "bfloat16" in r["case"]]
        assert {r["kernel"] for r in ffts} >= {"cyclic_conv_kernel", "monarch_conv_kernel"}
        assert all(row["wgmma"] for row in ffts)
