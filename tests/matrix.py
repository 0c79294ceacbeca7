"""Run the models' tests and their clients under several versions of transformers.

    python tests/matrix.py                    # every environment
    python tests/matrix.py newest --folder /tmp/environments --part clients

Each environment is made with uv in `--folder`, and kept: the next run takes it as it is. It holds
what the models need and their clients, but no llm-foundry. The output is the versions, the last
lines of pytest, and a line for each client. The exit code is 0 if all passed.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A new resolver would take a datasets of 2023 rather than an older fsspec.
COMMON = """
    pytest pytest-timeout safetensors onnx onnxruntime accelerate datasets>=3 numpy scikit-learn
    zstandard omegaconf pyarrow setuptools<81
"""
ENVIRONMENTS = {
    # As llm-foundry 0.22 pins them. Triton 3.3's interpreter does not know numpy 2.4. PEFT 0.18 and
    # later want a torchao that torch 2.7 is too old for.
    "oldest": """
        torch==2.7.0 transformers==4.51.* sentence-transformers>=4,<5 numpy<2.3 peft==0.17.*
        torchao==0.11.*
    """,
    "newest4": """
        torch==2.7.0 transformers>=4.57,<5 sentence-transformers>=5,<6 numpy<2.3 peft==0.17.*
        torchao==0.11.*
    """,
    "newest": """
        torch>=2.15,<2.16 transformers>=5,<6 sentence-transformers>=6 peft torchao onnxscript mteb
    """,
}
# No test that needs llm-foundry, and of the operations those that take no interpreted kernel.
TESTS = """
    tests/models tests/layers tests/checkpoints tests/ops/test_fft_conv.py
    tests/ops/test_short_conv.py tests/ops/test_backend.py
"""


def make(name: str, folder: Path) -> Path:
    """Make an environment, if it is not there; return its Python."""
    python = folder / name / "bin" / "python"
    done = folder / name / ".installed"
    if not done.exists():
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "-q", "--clear", "--python", "3.11", folder / name], check=True)
        packages = (COMMON + ENVIRONMENTS[name]).split()
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *packages], check=True)
        done.touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENVIRONMENTS)} (all)")
    parser.add_argument("--folder", type=Path, help="where the environments are (a temporary one)")
    parser.add_argument("--part", choices=("tests", "clients"), help="one of the two only")
    parser.add_argument("--tests", default=TESTS, help="what pytest runs")
    args = parser.parse_args()
    names = args.names or list(ENVIRONMENTS)
    if unknown := set(names) - set(ENVIRONMENTS):
        parser.error(f"no environment {', '.join(sorted(unknown))}: {', '.join(ENVIRONMENTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        failed = [name for name in names if not run(name, folder, args)]
    print("failed:", ", ".join(failed)) if failed else print("all passed")
    return len(failed)


def run(name: str, folder: Path, args: argparse.Namespace) -> bool:
    """Run both parts in one environment; return whether both passed."""
    python = make(name, folder)
    parts = {
        "versions": ["tests.clients", "--versions"],
        "tests": ["pytest", "-q", "-p", "no:cacheprovider", *shlex.split(args.tests)],
        "clients": ["tests.clients"],
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    passed = True
    for part, command in parts.items():
        if part == "versions" or args.part in (None, part):
            print(f"\n{name}: {part}", flush=True)
            ended = subprocess.run(
                [python, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            lines = ended.stdout.splitlines()
            if part == "tests":  # the errors and the summary
                lines = [x for x in lines if x.startswith(("FAILED", "ERROR"))] + lines[-1:]
            print("\n".join(lines) if lines else ended.stderr[-2000:], flush=True)
            passed &= ended.returncode == 0
    return passed


if __name__ == "__main__":
    sys.exit(main())
