"""The choice of a configuration; a table of times stands in for a GPU's clock."""

import json
import logging
from dataclasses import dataclass

import pytest
import torch

from m2_plugin.ops.block_diagonal_linear import block_diagonal_linear, block_shape
from m2_plugin.ops.kernels import cache, tuning
from m2_plugin.ops.monarch_mlp import monarch_mlp
from tests.utils import KERNEL_DEVICE, relative_error

CUDA = torch.device("cuda", 0)
KEY = (1024, 192, torch.bfloat16)


@dataclass(frozen=True)
class Config:
    rows: int


SMALL, LARGE = Config(64), Config(128)


class Clock:
    """Launches take what `times` says, or fail with it; `launched` counts."""

    def __init__(self, times):
        self.times = times
        self.launched = []

    def run(self, config):
        self.launched.append(config)
        took = self.times[config]
        if isinstance(took, Exception):
            raise took
        return took

    def choose(self, candidates=(SMALL, LARGE), device=CUDA, key=KEY):
        return tuning.best("op", key, candidates, self.run, device)


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("M2_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("M2_PLUGIN_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "do_bench", lambda launch, **kwargs: launch())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X/1 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def cache_file():
    return cache.path("choices", CUDA)


def test_candidates_are_compiled_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(tuning, "compile_together", lambda run: run())
    clock = Clock({SMALL: 2.0, LARGE: 1.0})
    assert clock.choose() == LARGE
    assert clock.launched == 2 * [SMALL, LARGE]
    kept = Clock({SMALL: 2.0, LARGE: 1.0})
    tuning.best("other", KEY, (SMALL, LARGE), kept.run, CUDA, launches_only=False)
    assert kept.launched == [SMALL, LARGE]


def another_process(monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})


def test_the_fastest_is_chosen_once_and_kept_for_other_processes(monkeypatch, caplog):
    clock = Clock({SMALL: 2.0, LARGE: 1.0})
    with caplog.at_level(logging.INFO):
        assert [clock.choose(), clock.choose()] == [LARGE, LARGE]
    assert clock.launched == [SMALL, LARGE]
    assert caplog.messages == [
        "op 1024 192 torch.bfloat16 runs with Config(rows=128): 1.000 ms, fastest of 2"
    ]
    another_process(monkeypatch)
    assert clock.choose() == LARGE and len(clock.launched) == 2
    assert clock.choose(key=(2048, *KEY[1:])) == LARGE and len(clock.launched) == 4
    entries = json.loads(cache_file().read_text())
    assert entries.pop("environment") == cache.environment(CUDA)
    assert {name: entry["ms"] for name, entry in entries.items()} == {
        "op 1024 192 torch.bfloat16": [2.0, 1.0],
        "op 2048 192 torch.bfloat16": [2.0, 1.0],
    }
    assert [path.name for path in cache_file().parent.iterdir()] == [cache_file().name]


def test_other_candidates_are_timed_anew(monkeypatch):
    Clock({SMALL: 2.0, LARGE: 1.0}).choose()
    another_process(monkeypatch)
    clock = Clock({SMALL: 2.0, LARGE: 3.0, Config(32): 1.0})
    assert clock.choose((SMALL, LARGE, Config(32))) == Config(32)


def test_what_other_processes_wrote_meanwhile_stays(monkeypatch):
    clock = Clock({SMALL: 2.0, LARGE: 1.0})
    clock.choose()

    def run(config):  # another process finishes while this one measures
        others = json.loads(cache_file().read_text()) | {"theirs": {}}
        cache_file().write_text(json.dumps(others))
        return 1.0

    tuning.best("mine", KEY, (SMALL, LARGE), run, CUDA)
    assert list(json.loads(cache_file().read_text())) == [
        "environment",
        "op 1024 192 torch.bfloat16",
        "theirs",
        "mine 1024 192 torch.bfloat16",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"op 1024 192 torch.bfloat16": 3}'])
def test_a_damaged_file_is_replaced(text, caplog):
    cache_file().parent.mkdir()
    cache_file().write_text(text)
    clock = Clock({SMALL: 2.0, LARGE: 1.0})
    assert clock.choose() == LARGE
    assert json.loads(cache_file().read_text())["op 1024 192 torch.bfloat16"]["best"] == repr(LARGE)
    if not text.endswith("}"):
        assert f"{str(cache_file())!r} " in caplog.text and "is found out again" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M2_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    clock = Clock({SMALL: 2.0, LARGE: 1.0})
    assert [clock.choose(), clock.choose()] == [LARGE, LARGE]
    assert len(clock.launched) == 2
    assert f"{cache_file()} cannot be written" in caplog.text


def test_a_candidate_that_cannot_run_is_left_out():
    too_large = RuntimeError("out of shared memory")
    assert Clock({SMALL: too_large, LARGE: 5.0}).choose() == LARGE
    entry = json.loads(cache_file().read_text())["op 1024 192 torch.bfloat16"]
    assert entry["ms"] == [None, 5.0]


def test_the_first_error_goes_up_if_none_can_run():
    clock = Clock({SMALL: RuntimeError("no ptxas"), LARGE: RuntimeError("too large")})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no ptxas"):
            clock.choose()
    assert not cache_file().exists()


def test_without_memory_for_the_timer_the_default_runs_for_now():
    assert Clock({SMALL: torch.OutOfMemoryError("full"), LARGE: 1.0}).choose() == SMALL
    assert not cache_file().exists()
    assert Clock({SMALL: 2.0, LARGE: 1.0}).choose() == LARGE


def test_where_nothing_is_timed(monkeypatch):
    clock = Clock({SMALL: 2.0, LARGE: 1.0})
    assert clock.choose((LARGE,)) == LARGE
    assert clock.choose(device=torch.device("cpu")) == SMALL
    with monkeypatch.context() as patch:
        patch.setenv("M2_PLUGIN_AUTOTUNE", "0")
        assert clock.choose() == SMALL
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert clock.choose() == SMALL
    assert clock.launched == [] and not cache_file().exists()
    assert clock.choose() == LARGE
    torch.use_deterministic_algorithms(True)
    try:
        assert clock.choose() == SMALL
    finally:
        torch.use_deterministic_algorithms(False)


def test_seven_classes_of_rows():
    assert tuning.row_class(1) == tuning.row_class(1024) == 1024
    assert tuning.row_class(1025) == tuning.row_class(2048) == 2048
    assert len({tuning.row_class(1 << n) for n in range(30)}) == 7


@pytest.mark.parametrize(("width", "alternative"), [(64, 1), (192, 1), (192, -1), (256, -1)])
def test_every_alternative_computes_the_same(width, alternative, monkeypatch):
    hidden, rows = 2 * width, 66
    x = torch.randn(rows, hidden).to(KERNEL_DEVICE, torch.float16).requires_grad_()
    up = torch.randn(block_shape(hidden, 2 * hidden, 2)).mul(hidden**-0.5)
    down = torch.randn(block_shape(hidden, hidden, 2)).mul(hidden**-0.5)
    up, down = (t.to(x).detach().requires_grad_() for t in (up, down))
    tried = []

    def outcome():
        y = monarch_mlp(x, up, down, None, hidden, backend="triton")
        z = block_diagonal_linear(x, down, backend="triton")
        return y, z, *torch.autograd.grad((y.square() + z.square()).sum(), (x, up, down))

    def take(op, key, candidates, run, device):
        tried.append(op)
        return candidates[alternative]

    with monkeypatch.context() as patch:
        patch.setenv("M2_PLUGIN_AUTOTUNE", "0")  # the clock above tells no time
        expected = outcome()
    monkeypatch.setattr(tuning, "best", take)
    for actual, result in zip(outcome(), expected, strict=True):
        assert relative_error(actual, result) < 1e-3
    assert set(tried) == {"monarch_mlp", "monarch_mlp_backward", "product"}
