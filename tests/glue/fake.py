"""A sweep whose jobs run this file instead of llm-foundry: quick, and with faults on request.

python fake.py sweep CONFIG OUT [KEY=VALUE ...]     the sweep, with --jobs 2
python fake.py job OUT/NAME/job.yaml                a job; OUT/behaviour.json says what it does
"""

import json
import os
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
    config = yaml.safe_load(path.read_text())
    start = config["variables"]["start"]
    if start is not None and not (Path(start) / "config.json").is_file():
        raise FileNotFoundError(f"no model in {start}")
    time.sleep(behaviour.get("sleep", 0))
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
    if not behaviour.get("mute"):
        (folder / "metrics.json").write_text(json.dumps({"metrics": metrics, "predictions": {}}))
    say(out, f"end {folder.name}")


def say(out: Path, text: str) -> None:
    threads, gpus = os.environ.get("OMP_NUM_THREADS"), os.environ["CUDA_VISIBLE_DEVICES"]
    with open(out / "journal.txt", "a") as file:
        file.write(f"{text} threads={threads} gpus={gpus}\n")


def sweep(config: str, out: Path, overrides: list[str]) -> int:
    from m2_plugin.glue.recipes import load_sweep
    from m2_plugin.glue.sweep import run_sweep

    statuses = run_sweep(load_sweep(config, overrides), out, jobs=2, gpus=[], command=command)
    return int(any(status != "finished" for status in statuses.values()))


def command(job: object) -> list[str]:
    return [sys.executable, __file__, "job", str(job.folder / "job.yaml")]


if __name__ == "__main__":
    if sys.argv[1] == "job":
        job(Path(sys.argv[2]))
    else:
        sys.exit(sweep(sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
