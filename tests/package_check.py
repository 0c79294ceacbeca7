"""Install the package into a new environment, and use it from an empty folder.

    python tests/package_check.py dist/m2_plugin-0.1.0-py3-none-any.whl --python python3.12 --by pip

Only the wheel is used, not the clone: copy recipes, convert, pretrain for 2 batches, fine-tune for
retrieval for 2 batches, embed. It uses no model hub and no GPU, and ends at the first error.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SMALL = (
    "max_duration=2ba eval_interval=2ba eval_subset_num_batches=1 save_interval=2ba"
    " progress_bar=false"
)
COMMANDS = f"""
m2-plugin --version
m2-plugin recipes
m2-plugin recipes --copy m2-bert-quickstart
m2-plugin convert-text --out_root quickstart/mds --splits train val
    --local_files data_prep/quickstart/novels.jsonl.gz --val_fraction 0.05
    --concat_tokens 128 --tokenizer data_prep/quickstart/tokenizer
composer -n 1 train.py yamls/pretrain/m2-bert-quickstart.yaml {SMALL}
python data_prep/quickstart/pairs.py --out quickstart/pairs
m2-plugin convert-pairs --out_root quickstart/retrieval
    --local_files train=quickstart/pairs/train.jsonl val=quickstart/pairs/val.jsonl
composer -n 1 train.py yamls/finetune/retrieval/m2-bert-quickstart.yaml {SMALL}
    global_train_batch_size=32 device_train_microbatch_size=32
m2-plugin embed quickstart/pairs/test.jsonl --text-column query
    --model quickstart/retrieval/run/huggingface/final --out queries.npy
"""

COMPOSER = "from composer.cli.launcher import main\nmain()\n"


def install(wheel: Path, folder: Path, python: str, by: str) -> Path:
    """Make an environment and install into it; return the folder of its programs."""
    environment = folder / "env"
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    programs = environment / "bin"
    if by == "pip":
        run([python, "-m", "venv", environment], folder)
        run([programs / "pip", "install", "--quiet", wheel], folder)
        return programs
    run([uv, "venv", "--quiet", "--python", python, environment], folder)
    dependencies = ["--no-deps"] if by == "here" else []
    pip = [uv, "pip", "install", "--quiet", "--python", environment]
    run([*pip, *dependencies, wheel], folder)
    if by == "here":
        (packages,) = environment.glob("lib/python*/site-packages")
        packages.joinpath("here.pth").write_text(sysconfig.get_path("purelib"))
        program = programs / "composer"
        program.write_text(f"#!{environment}/bin/python\n{COMPOSER}")
        program.chmod(0o755)
    return programs


def run(command: list, folder: Path, programs: Path | None = None) -> None:
    """Run a command in a folder, with an environment's programs found first."""
    print("$", shlex.join(map(str, command)), flush=True)
    outside = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if programs is not None:
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    subprocess.run(list(map(str, command)), cwd=folder, env=environment, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable, help="3.11 or 3.12 (this one)")
    parser.add_argument(
        "--by",
        choices=("uv", "pip", "here"),
        default="uv",
        help="what installs (uv); `here`: uv, without dependencies, which are those of this Python",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = install(args.wheel.resolve(), folder, args.python, args.by)
        used = "import m2_plugin, sys; sys.exit(not m2_plugin.__file__.startswith(sys.prefix))"
        run(["python", "-c", used], folder, programs)
        for command in COMMANDS.replace("\n    ", " ").strip().splitlines():
            run(shlex.split(command), folder, programs)
        quickstart = folder / "quickstart"
        model = quickstart / "retrieval" / "run" / "huggingface" / "final"
        width = json.loads((model / "config.json").read_text())["hidden_size"]
        count = (quickstart / "pairs" / "test.jsonl").read_bytes().count(b"\n")
        vectors = folder / "queries.npy"
        assert vectors.stat().st_size == 128 + count * width * 4  # a header, and fp32
    print("everything works from an empty folder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
