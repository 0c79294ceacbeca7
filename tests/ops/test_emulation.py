"""Kernels as they are compiled: their results, bounds and barriers, without a GPU."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.ops.machine import GlobalMemory, Machine, Program, PtxError
from tests.utils import ROOT

# One launch of each kernel at least, with and without matrix units; the whole of tests/ops and
# tests/layers takes an hour.
TESTS = [
    "test_add_layer_norm.py::test_kernel[B2-L37-D15-same-sequence_last-torch.bfloat16]",
    "test_block_diagonal_linear.py::test_kernel[N37-I50-O34-K8-bias-torch.float16]",
    "test_block_diagonal_linear.py::test_kernel[N6-I64-O96-K4-no_bias-torch.bfloat16]",
    "test_gated_long_conv.py::test_kernel[many_rows-torch.float16]",
    "test_gated_long_conv.py::test_kernel[full_tiles-torch.bfloat16]",
    "test_hyena_filters.py::test_kernel[splits]",
    "test_linear_cross_entropy.py",
    "test_monarch_conv.py::test_fft_kernels[folded-torch.bfloat16]",
    "test_monarch_mlp.py::test_kernel[N37-D128-F256-K4-glu-torch.bfloat16]",
]


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_kernels_pass_the_tests_of_kernels(capability):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["--emulate", str(capability), *(f"tests/ops/{name}" for name in TESTS)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # a GPU would be used
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= len(TESTS)


# Each thread writes a number to shared memory, and reads the one of the thread 32 places on.
ROTATE = """
.visible .entry rotate(
	.param .u64 .ptr .global .align 1 rotate_param_0,
	.param .u32 rotate_param_1
)
.reqntid 64
{
	ld.param.b64 	%rd1, [rotate_param_0];
	ld.param.b32 	%r1, [rotate_param_1];
	.reg .pred 	%p<2>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<3>;
	mov.u32 	%r2, %tid.x;
	mov.b32 	%r3, global_smem;
	mad.lo.s32 	%r4, %r2, 4, %r3;
	st.shared.b32 	[%r4], %r2;
	bar.sync 	0;
	add.s32 	%r5, %r2, 32;
	and.b32 	%r6, %r5, 63;
	mad.lo.s32 	%r7, %r6, 4, %r3;
	ld.shared.b32 	%r8, [%r7];
	setp.ge.s32 	%p1, %r2, %r1;
	@%p1 bra 	$L__END;
	mad.wide.u32 	%rd2, %r2, 4, %rd1;
	st.global.b32 	[%rd2], %r8;
$L__END:
	ret;
}
"""


WAIT = "bar.sync 0; st.global"


def rotate(text=ROTATE, count=50, shared=256):
    out = np.zeros(50, np.int32)
    memory = GlobalMemory([(out.ctypes.data, out.view(np.uint8))])
    machine = Machine(Program(text), memory, [out.ctypes.data, count], (1, 1, 1), 64, shared)
    machine.run((0, 0, 0))
    return out


def test_a_program_runs():
    expected = (np.arange(50) + 32) % 64
    assert (rotate() == expected).all()
    expected[20:] = 0
    assert (rotate(count=20) == expected).all()


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"text": ROTATE.replace("bar.sync", "// bar.sync")}, "no barrier after another warp's wr"),
        ({"text": ROTATE.replace("st.shared", "// st.shared")}, "reads what was never written"),
        ({"text": ROTATE.replace("%r2, 4, %rd1", "%r2, 2, %rd1")}, "an address that 4 does not"),
        ({"text": ROTATE.replace("ret;", "bar.sync 0; ret;").replace("st.global", WAIT)}, "wait"),
        ({"count": 51}, "4 bytes at offset 200 of a tensor of 200 bytes"),
        ({"shared": 128}, "shared bytes 0 to 256 of 128"),
    ],
    ids=["barrier", "unwritten", "alignment", "divergence", "bounds", "shared"],
)
def test_what_a_gpu_would_not_say(changed, found):
    with pytest.raises(PtxError, match=found):
        rotate(**changed)
