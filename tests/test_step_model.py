"""The static model of a step: counts of a kernel that is known, and one small prediction."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.utils import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import gpu  # noqa: E402
import ptx  # noqa: E402

# Threads read x[i] while i < n, i = thread, thread + 64, ...; thread 0 of a program writes y.
KERNEL = """
.version 8.4
.target sm_90a
.address_size 64
.visible .entry sum(
	.param .u64 .ptr .global .align 1 sum_param_0,
	.param .u64 .ptr .global .align 1 sum_param_1,
	.param .u32 sum_param_2
)
.reqntid 64, 1, 1
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<9>;
$L__func_begin0:
	ld.param.u64 	%rd1, [sum_param_0];
	ld.param.u64 	%rd2, [sum_param_1];
	ld.param.u32 	%r1, [sum_param_2];
	mov.u32 	%r2, %tid.x;
	mov.f32 	%f1, 0f00000000;
$L__BB0_1:
	setp.lt.s32 	%p1, %r2, %r1;
	mul.wide.s32 	%rd3, %r2, 2;
	add.s64 	%rd4, %rd1, %rd3;
	// begin inline asm
	@%p1 ld.global.b16 { %rs1 }, [ %rd4 + 0 ];
	// end inline asm
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r7 }, { %r8 }, { %f1 };
	add.s32 	%r2, %r2, 64;
	setp.lt.s32 	%p2, %r2, 256;
	@%p2 bra 	$L__BB0_1;
	mov.u32 	%r3, %tid.x;
	setp.eq.s32 	%p3, %r3, 0;
	@%p3 st.global.v4.b32 [ %rd2 + 0 ], { %r4, %r4, %r4, %r4 };
	ret;
}
"""


@pytest.mark.parametrize(
    ("thread", "read", "written"), [(0, 8, 16), (7, 8, 0), (8, 6, 0), (63, 6, 0)]
)
def test_a_thread_is_followed(thread, read, written):
    program = ptx.Program(KERNEL)
    assert program.threads == 64
    params = [1 << ptx.REGION, 2 << ptx.REGION, 200]
    found = program.follow(params, thread, (0, 0, 0), (1, 1, 1))
    # 200 = 3 · 64 + 8 elements of 2 bytes: the first 8 threads read four of them, the others three.
    assert found["read"] == ({0: read} if read else {})
    assert found["written"] == ({1: written} if written else {})
    assert found["work"]["matrix"] == 4
    assert found["work"]["operations"] == 4 * 2 * 16 * 8 * 16 / 32
    assert found["work"]["looped"] == 4 * 8
    assert program.instructions(True) == 8


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("shr.s32 \t%r5, %r6, 1;", -4 & 0xFFFFFFFF),
        ("shr.u32 \t%r5, %r6, 1;", 0x7FFFFFFC),
        ("div.s32 \t%r5, %r6, 3;", -2 & 0xFFFFFFFF),
        ("rem.s32 \t%r5, %r6, 3;", -2 & 0xFFFFFFFF),
        ("min.s32 \t%r5, %r6, 3;", -8 & 0xFFFFFFFF),
        ("min.u32 \t%r5, %r6, 3;", 3),
        ("bfe.u32 \t%r5, %r6, 4, 8;", 0xFF),
        ("bfe.s32 \t%r5, %r6, 2, 2;", -2 & 0xFFFFFFFF),
        ("lop3.b32 \t%r5, %r6, 12, 5, 0x80;", (-8 & 12 & 5)),
        ("mad.lo.s32 \t%r5, %r6, 3, 30;", 6),
        ("neg.s32 \t%r5, %r6;", 8),
    ],
)
def test_whole_numbers_are_those_of_the_machine(line, expected):
    # What the line gives becomes an address: one byte is read at it, in the region of that number.
    start = KERNEL.index("\tsetp.lt.s32 \t%p1"), KERNEL.index("\tret;")
    body = f"\tmov.u32 \t%r6, -8;\n\t{line}\n\tcvt.u64.u32 \t%rd5, %r5;\n"
    body += f"\tshl.b64 \t%rd6, %rd5, {ptx.REGION};\n\tld.global.b8 \t%rs2, [%rd6];\n"
    program = ptx.Program(KERNEL[: start[0]] + body + KERNEL[start[1] :])
    found = program.follow([0, 0, 0], 0, (0, 0, 0), (1, 1, 1))["read"]
    assert found == {(expected & 0xFFFFF) - 1: 1}  # an address has 64 bits: 20 are left


@pytest.mark.parametrize(
    ("line", "step", "taken", "least"),
    [
        ("st.shared.b32 [%r4], %r2;", 4, 1, 1),
        ("st.shared.b32 [%r4], %r2;", 8, 2, 1),
        ("st.shared.b32 [%r4], %r2;", 128, 32, 1),
        ("st.shared.b32 [%r4], %r2;", 0, 1, 1),  # all threads reach one word
        ("@%p1 st.shared.b32 [%r4], %r2;", 128, 16, 1),  # half of the warp's threads
        ("st.shared.v4.b32 [%r4], { %r2, %r2, %r2, %r2 };", 16, 4, 4),
        ("st.shared.v4.b32 [%r4], { %r2, %r2, %r2, %r2 };", 128, 32, 4),
        ("cp.async.ca.shared.global [%r4], [%rd1], 0x4, 0x4;", 128, 32, 1),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 { %r5, %r6, %r7, %r8 }, [%r4];", 16, 4, 4),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 { %r5, %r6 }, [%r4];", 128, 16, 2),
        ("ld.global.b32 %r5, [%rd1];", 128, 0, 0),
    ],
)
def test_bank_conflicts_are_counted(line, step, taken, least):
    start = KERNEL.index("\tsetp.lt.s32 \t%p1"), KERNEL.index("\tret;")
    body = f"\tmul.lo.s32 \t%r4, %r2, {step};\n\tsetp.lt.s32 \t%p1, %r2, 48;\n\t{line}\n"
    program = ptx.Program(KERNEL[: start[0]] + body + KERNEL[start[1] :])
    assert program.wavefronts([1 << ptx.REGION] * 3, (0, 0, 0), (1, 1, 1)) == (taken, least)


needs_cuda_and_cc = pytest.mark.skipif(
    torch.version.cuda is None
    or shutil.which("cc") is None
    or not torch.__version__.startswith("2.7."),  # its fake tensors are private matters of torch
    reason="needs torch 2.7 with CUDA, and cc",
)


@needs_cuda_and_cc
def test_a_step_is_predicted(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "step_model.py")]
    command += ["--lengths", "128", "--layers", "1", "--devices", "H200", "--kernels", "99"]
    command += ["--out", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "step_model.json").read_text())
    assert report["predicted"] and not report["fallbacks"], report["fallbacks"]
    forward, step = report["rows"]
    assert (forward["what"], step["what"]) == ("forward", "step")
    for row in report["rows"]:
        for name in ("m2_bert", "bert_sdpa"):
            assert 0 < row[name]["kernels_ms"] < row[name]["ms"]
    kernels = [r for r in forward["m2_bert"]["rows"] if "registers" in r]
    assert kernels, "no kernel of ours was launched"
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0 and 0 < kernel["registers"] <= 255, kernel
        assert kernel["limit"] in kernel["parts_ms"]
    # What the filters' gradients multiply needs no transposition, which would be all conflicts.
    for name in ("layer_grad_kernel", "filter_weight_grad_kernel"):
        found = re.findall(rf"^  {name} .* (\d+)% conflicts$", done.stdout, re.MULTILINE)
        assert found and all(int(share) < 40 for share in found), (name, done.stdout)
    # An MLP of a layer multiplies twice 32,768 rows by 3·4·768²/4 weights, at the least.
    products = sum(k["operations"] for k in kernels)
    assert products > 2 * 32768 * 3 * 768 * 768
    # BERT's dense layers and attention, of one layer: 24·D² and 4·L·D operations a token.
    exact = 24 * 768**2 + 4 * 128 * 768
    assert forward["bert_sdpa"]["operations_per_token"] == pytest.approx(exact, rel=1e-3)
    assert step["bert_sdpa"]["operations_per_token"] > 3 * exact


@needs_cuda_and_cc
def test_the_host_is_timed_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "bench_host.py")]
    command += ["--scales", "quickstart", "--lengths", "128", "--tokens", "4096"]
    command += ["--repeats", "1", "--out", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]  # also if PyTorch took a kernel's place
    forward, step = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert 0 < forward["m2_bert"]["launches"] < forward["bert_sdpa"]["launches"]
    assert forward["m2_bert"]["launches"] < step["m2_bert"]["launches"]
    for row in (forward, step):
        for model in ("m2_bert", "bert_sdpa"):
            assert 0 < row[model]["min_ms"] <= row[model]["median_ms"] <= row[model]["max_ms"]


def test_ends_of_tests_are_counted_in_a_log_that_breaks_off():
    log = """12 workers [6 items]
tests/ops/test_a.py::test_one[a b]
[gw3] [ 20%] PASSED tests/ops/test_a.py::test_one[a b]
[gw10] [ 40%] FAILED tests/ops/test_a.py::test_two
[gw10] [ 60%] SKIPPED tests/ops/test_a.py::test_three
[gw1] [ 80%] ERROR tests/ops/test_b.py::test_four
[gw1] [100%] PASSED tests/ops/test_b.py::test_five
tests/ops/test_b.py::test_six
"""
    found = gpu.count_tests(log)
    assert found["failed"] == ["tests/ops/test_a.py::test_two"]
    assert found["errors"] == ["tests/ops/test_b.py::test_four"]
    assert (found["collected"], found["passed"], found["skipped"]) == (6, 2, 1)
