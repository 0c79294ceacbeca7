"""`run_guard` on a folder that a killed run left behind, without a run."""

import os
from types import SimpleNamespace

import pytest
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Time

from m2_plugin.foundry.errors import RunError
from m2_plugin.foundry.run_guard import RunGuard, _link, _tidy, _unfit

SHARDED = SimpleNamespace(state_dict_type="sharded", sharded_ckpt_prefix_dir="ep{epoch}-ba{batch}")


@pytest.fixture
def folder(tmp_path):
    for batch in (6, 12, 18):
        torch.save({"batch": batch}, tmp_path / f"ep0-ba{batch}-rank0.pt")
        shards = tmp_path / f"ep0-ba{batch}"
        shards.mkdir()
        shards.joinpath("__0_0.distcp").touch()
        shards.joinpath(".metadata").touch()
    return tmp_path


def run(folder, fsdp_config=None):
    saver = CheckpointSaver(
        folder=str(folder),
        filename="ep{epoch}-ba{batch}-rank{rank}.pt",
        latest_filename="latest-rank{rank}.pt",
    )
    return saver, SimpleNamespace(run_name="run", fsdp_config=fsdp_config)


def cut(folder, name):
    """Leave it as a killed run does."""
    path = folder / name
    if path.is_dir():
        path.joinpath(".metadata").unlink()
    else:
        path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("before", [None, 6, 12, 18], ids=lambda batch: f"link-{batch}")
@pytest.mark.parametrize("last_is_whole", [True, False])
def test_the_link_is_set_to_the_newest_whole_one(folder, sharded, before, last_is_whole):
    names = [f"ep0-ba{batch}" + ("" if sharded else "-rank0.pt") for batch in (6, 12, 18)]
    saver, state = run(folder, SHARDED if sharded else None)
    link = _link(folder, saver, state)
    if before is not None:
        link.symlink_to(names[before // 6 - 1])
    if not last_is_whole:
        cut(folder, names[2])
    newest = _tidy(folder, saver, state)
    kept = names if last_is_whole else names[:2]
    assert newest == folder / kept[-1] and os.readlink(link) == kept[-1]
    assert [(folder / name).exists() for name in names] == [True, True, last_is_whole]
    # What Composer removes when there are too many: a file, or the folder that shards are in.
    counted = [os.path.dirname(path) if sharded else path for path in saver.saved_checkpoints]
    assert counted == [str(folder / name) for name in kept]


def test_nothing_is_removed_where_another_run_may_write(folder):
    cut(folder, "ep0-ba18-rank0.pt")
    saver, state = run(folder)
    assert _tidy(folder, saver, state, delete=False) == folder / "ep0-ba12-rank0.pt"
    assert (folder / "ep0-ba18-rank0.pt").exists()


def test_an_empty_folder_has_no_newest(tmp_path):
    saver, state = run(tmp_path)
    assert _tidy(tmp_path, saver, state) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "sharded", "message"),
    [
        ("ep0-ba6-rank0.pt", False, None),
        ("ep0-ba6", True, None),
        ("nowhere.pt", False, None),  # Composer raises the error
        ("ep0-ba6", False, "is a sharded checkpoint, but the checkpoints of this run are files"),
        ("ep0-ba6-rank0.pt", True, "is a file, but the checkpoints of this run are sharded"),
        ("ep0-ba18-rank0.pt", False, "is not a whole checkpoint"),
    ],
)
def test_what_cannot_be_loaded(folder, name, sharded, message):
    cut(folder, "ep0-ba18-rank0.pt")
    found = _unfit(folder / name, "load_path", sharded)
    if message is None:
        assert found is None
    else:
        assert f"load_path '{folder / name}' {message}" in found


@pytest.mark.parametrize(("batches", "refused"), [(0, True), (1, False), (None, False)])
def test_a_loader_without_batches_is_refused(batches, refused):
    """With any loader, Composer would start epochs for ever."""
    length = None if batches is None else Time(batches, "ba")
    loader = SimpleNamespace(dataset=range(3), batch_size=8)
    state = SimpleNamespace(dataloader_len=length, dataloader=loader, callbacks=[])
    guard = RunGuard({"save_interval": "1ep"})
    if refused:
        with pytest.raises(RunError, match="no batch: .* 3 samples .* has 8.*drop_last"):
            guard.fit_start(state, None)
    else:
        guard.fit_start(state, None)
        assert state.callbacks == []
