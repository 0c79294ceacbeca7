"""Lets a process use a GPU that is not there: it accepts all work and does none.

PyTorch's CUDA tensors, autograd and Triton run as they do on an H100, up to the calls of CUDA,
cuBLAS and cuFFT. A small library is loaded before those, and answers them at once. So what a pass
takes here is the host's own time, without that inside CUDA. Memory is reserved but never touched,
and holds zeros; what is copied from it to the host are the answers that a pass expects (see
`answer`).

Needs PyTorch 2.7 for CUDA 12, Triton 3.3 and a C compiler; no driver.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

LOADED = "M2_PLUGIN_NULL_GPU"
NAME = "libcuda.so.1"  # what PyTorch and Triton open

# Attributes of an H100, by their number in CUDA; others are 1.
ATTRIBUTES = {
    1: 1024,  # threads of a block
    2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535,  # sizes of blocks and grids
    8: 48 << 10, 81: 228 << 10, 97: 227 << 10,  # shared memory: usual, of a processor, at most
    10: 32,  # threads of a warp
    12: 65536, 82: 65536,  # registers
    13: 1980000, 36: 2619000, 37: 5120,  # clocks in kHz, width of the memory's bus
    16: 132,  # processors
    38: 50 << 20,  # bytes of L2
    39: 2048, 106: 32,  # threads and blocks of a processor
    75: 9, 76: 0,  # compute capability
}  # fmt: skip

SOURCE = """
#include <driver_types.h> /* without the functions, which are defined here */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#define LAUNCH { launches++; return 0; }
#define ONE(pointer) { *(void **)(pointer) = (void *)1; return 0; }
#define ZERO(pointer) { *(pointer) = 0; return 0; }

long launches;
static int attribute(int number) { switch (number) { ATTRIBUTES } return 1; }

/* A flag is true; a count is that of the labels of 32,768 tokens of which 15% are masked. */
static int answer(void *to, size_t bytes, enum cudaMemcpyKind kind) {
    if (kind != cudaMemcpyDeviceToHost) return 0;
    memset(to, 0, bytes);
    if (bytes == 1) *(char *)to = 1;
    if (bytes == 4) *(int *)to = 4915;
    if (bytes == 8) *(long *)to = 4915;
    return 0;
}

/* The runtime. */
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *d) ZERO(d)
int cudaDeviceGetStreamPriorityRange(int *a, int *b) { *a = *b = 0; return 0; }
int cudaDriverGetVersion(int *v) { *v = 12060; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 12060; return 0; }
int cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) { *v = attribute(a); return 0; }
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "a GPU that is not there");
    p->totalGlobalMem = 140UL << 30;
    p->major = attribute(75); p->minor = attribute(76);
    p->multiProcessorCount = attribute(16);
    p->warpSize = attribute(10);
    p->l2CacheSize = attribute(38);
    p->sharedMemPerBlock = attribute(8);
    p->sharedMemPerBlockOptin = attribute(97);
    p->sharedMemPerMultiprocessor = attribute(81);
    p->regsPerBlock = p->regsPerMultiprocessor = attribute(12);
    p->maxThreadsPerBlock = attribute(1);
    p->maxThreadsPerMultiProcessor = attribute(39);
    p->maxBlocksPerMultiProcessor = attribute(106);
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = attribute(2 + i);
        p->maxGridSize[i] = attribute(5 + i);
    }
    return 0;
}
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 140UL << 30; return 0; }
int cudaMalloc(void **p, size_t n) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    *p = mmap(0, n, PROT_READ | PROT_WRITE, flags, -1, 0);
    return *p == MAP_FAILED ? cudaErrorMemoryAllocation : 0;
}
int cudaHostAlloc(void **p, size_t n, unsigned flags) {
    *p = aligned_alloc(4096, (n + 4095) & ~4095UL);
    return 0;
}
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaHostGetDevicePointer(void **d, void *h, unsigned flags) { *d = h; return 0; }
int cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) {
    return answer(to, n, k);
}
int cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, void *stream) {
    launches++;
    return answer(to, n, k);
}
int cudaMemsetAsync(void *p, int value, size_t n, void *stream) LAUNCH
int cudaEventCreateWithFlags(void *event, unsigned flags) ONE(event)
int cudaEventCreate(void *event) ONE(event)
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 1; return 0; }
int cudaStreamCreateWithPriority(void *stream, unsigned flags, int priority) ONE(stream)
int cudaStreamIsCapturing(void *stream, int *status) ZERO(status)
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeDevice;
    a->devicePointer = a->hostPointer = (void *)p;
    return 0;
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = 90;
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *n, const void *function, int threads, size_t shared, unsigned flags
) { *n = 2; return 0; }
const char *cudaGetErrorString(int error) { return "error"; }
const char *cudaGetErrorName(int error) { return "error"; }
static __thread struct { dim3 grid, block; size_t shared; void *stream; } call;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    call.grid = grid; call.block = block; call.shared = shared; call.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = call.grid; *block = call.block; *shared = call.shared; *stream = call.stream;
    return 0;
}
int cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, void *stream) LAUNCH
int cudaLaunchKernelExC(const void *config, const void *f, void **arguments) LAUNCH

/* The driver. */
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = 0; *a = 1; return 0; }
int cuDevicePrimaryCtxRetain(void *context, int d) ONE(context)
int cuCtxGetCurrent(void *context) ONE(context)
int cuDeviceGet(int *d, int number) ZERO(d)
int cuDeviceGetAttribute(int *v, int a, int d) { *v = attribute(a); return 0; }
int cuModuleLoadData(void *module, const void *image) ONE(module)
int cuModuleGetFunction(void *function, void *module, const char *name) ONE(function)
int cuFuncGetAttribute(int *v, int a, void *function) {
    *v = a == 0 ? 1024 : 0; /* threads of a block; registers and spills */
    return 0;
}
int cuLaunchKernel() LAUNCH
int cuLaunchKernelEx() LAUNCH
int cuGetErrorString(int error, const char **s) { *s = "error"; return 0; }
int cuGetErrorName(int error, const char **s) { *s = "error"; return 0; }
int cuPointerGetAttribute(void **v, int a, void *p) { *v = p; return 0; }

/* cuBLAS. */
int cublasCreate_v2(void *handle) ONE(handle)
int cublasGetMathMode(void *handle, int *mode) ZERO(mode)
int cublasGetPointerMode_v2(void *handle, int *mode) ZERO(mode)
int cublasLtMatmulDescCreate(void *d, int compute, int scale) ONE(d)
int cublasLtMatmulPreferenceCreate(void *d) ONE(d)
int cublasLtMatrixLayoutCreate(void *d, int t, unsigned long r, unsigned long c, long l) ONE(d)
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *o, void *a, void *b, void *c, void *d, void *p, int n, void *found, int *m
) { memset(found, 0, 104); *m = 1; return 0; }
int cublasLtMatmul() LAUNCH
int cublasGemmEx() LAUNCH
int cublasGemmStridedBatchedEx() LAUNCH
int cublasSgemm_v2() LAUNCH
int cublasSgemmStridedBatched() LAUNCH

/* cuFFT, in which plans need no memory. */
int cufftXtMakePlanMany(
    int plan, int rank, long long *n, long long *in, long long s, long long d, int type,
    long long *out, long long t, long long e, int other, long long batch, size_t *bytes, int kind
) ZERO(bytes)
int cufftXtExec() LAUNCH
"""

# Functions that have nothing to do.
NOTHING = """
cudaDeviceEnablePeerAccess cudaDeviceSynchronize cudaEventDestroy cudaEventQuery cudaEventRecord
cudaEventSynchronize cudaFree cudaFuncSetAttribute cudaGetLastError cudaPeekAtLastError
cudaSetDevice cudaStreamQuery cudaStreamSynchronize cudaStreamWaitEvent
cudaThreadExchangeStreamCaptureMode
cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuFuncSetAttribute cuFuncSetCacheConfig cuInit
cuLaunchCooperativeKernel
cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuModuleLoadDataEx cuModuleUnload
cuOccupancyMaxActiveBlocksPerMultiprocessor cuOccupancyMaxActiveClusters
cuTensorMapEncodeTiled
cublasDestroy_v2 cublasSetMathMode cublasSetPointerMode_v2 cublasSetStream_v2
cublasSetWorkspace_v2 cublasLtMatmulDescDestroy cublasLtMatmulDescSetAttribute
cublasLtMatmulPreferenceDestroy cublasLtMatmulPreferenceSetAttribute
cublasLtMatrixLayoutDestroy cublasLtMatrixLayoutSetAttribute
cufftCreate cufftDestroy cufftSetAutoAllocation cufftSetStream cufftSetWorkArea
"""


def in_null_process(env: Mapping[str, str]) -> None:
    """Start this script again with the library, unless it has been; do not return then.

    Args:
        env: What else to set in its environment.
    """
    if os.environ.get(LOADED):
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        env = os.environ | {LOADED: "1", "LD_PRELOAD": f"{folder}/{NAME}"} | env
        # Kernels are compiled, not interpreted; Inductor's processes would look for a real GPU.
        env |= {"TRITON_INTERPRET": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        env["TRITON_LIBCUDA_PATH"] = folder
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)


def build(folder: Path) -> None:
    """Compile the library in a folder."""
    import triton

    cases = " ".join(f"case {number}: return {value};" for number, value in ATTRIBUTES.items())
    nothing = [f"int {name}(void) {{ return 0; }}" for name in NOTHING.split()]
    sources = {"cuda.c": SOURCE.replace("ATTRIBUTES", cases), "nothing.c": "\n".join(nothing)}
    for name, text in sources.items():
        (folder / name).write_text(text)
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", f"-I{headers}", f"-Wl,-soname,{NAME}"]
    subprocess.run([*command, "-o", NAME, *sources], cwd=folder, check=True)
    (folder / "libcuda.so").symlink_to(NAME)  # what Triton links


def launches() -> int:
    """Return how much work this process has launched: kernels, copies and fills."""
    return ctypes.c_long.in_dll(ctypes.CDLL(NAME), "launches").value
