"""A sweep whose jobs run this file instead of llm-foundry: quick, and with faults on request.

python fake.py sweep CONFIG OUT CLUSTER|- [KEY=VALUE ...]   the sweep, with --jobs 2
python fake.py job OUT/NAME/job.yaml                        a job: what OUT/behaviour.json says
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml


class ConfigError(ValueError):
    """Stands for that of the preflight."""


def job(path: Path) -> None:
    folder, out = path.parent, path.parent.parent
    behaviour = json.loads((out / "behaviour.json").read_text()).get(folder.name, {})
    say(out, f"start {folder.name}")
    (folder / "worker").write_text(str(os.getppid()))
    if "child" in behaviour:  # a process that nothing but the job would end
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", "job", str(folder)])
    config = yaml.safe_load(path.read_text())
    start = config["variables"]["start"]
    if start is not None and not (Path(start) / "config.json").is_file():
        raise FileNotFoundError(f"no model in {start}")
    time.sleep(behaviour.get("sleep", 0))
    if "kill" in behaviour:
        os.kill(os.getpid(), behaviour["kill"])
    if "refused" in behaviour:
        raise ConfigError(behaviour["refused"])
    if "crash" in behaviour:
        sys.stdout.write("about to fail\n")
        raise RuntimeError(behaviour["crash"])
    labels = [loader["label"] for loader in config["eval_loader"]]
    metrics = {label: dict.fromkeys(config["model"]["metrics"], 0.5) for label in labels}
    if "hf_checkpointer" in config["callbacks"]:
        model = folder / "huggingface" / "final"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    (folder / "predictions").mkdir()
    for label in labels:
        (folder / "predictions" / f"{label}.npy").write_text(f"{folder.name}: {label}")
    if not behaviour.get("mute"):
        (folder / "metrics.json").write_text(json.dumps({"metrics": metrics, "predictions": {}}))
    say(out, f"end {folder.name}")


def say(out: Path, text: str) -> None:
    threads, gpus = map(os.environ.get, ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"))
    with open(out / "journal.txt", "a") as file:
        file.write(f"{text} threads={threads} gpus={gpus}\n")


def sweep(config: str, out: Path, cluster: str, overrides: list[str]) -> int:
    from m2_plugin.executor import WorkersError
    from m2_plugin.glue.recipes import load_sweep
    from m2_plugin.glue.sweep import run_sweep

    keys = {"jobs": 2, "gpus": [], "program": PROGRAM}
    try:
        statuses = run_sweep(
            load_sweep(config, overrides), out, cluster=None if cluster == "-" else cluster, **keys
        )
    except WorkersError as error:
        sys.exit(str(error))
    return int(any(status != "finished" for status in statuses.values()))


PROGRAM = (__file__, "job")

if __name__ == "__main__":
    if sys.argv[1] == "job":
        job(Path(sys.argv[2]))
    else:
        sys.exit(sweep(sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5:]))
