"""Checkpoints are there whole or not at all, and loading one never runs its code."""

from __future__ import annotations

import os
import pickle
import resource
import signal

import pytest
import torch
from torch import nn

from repr_det.engine.checkpoint import SafeCheckpointer, read_checkpoint
from repr_det.errors import UserError


def small_model(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def test_round_trip_and_plain_format(tmp_path):
    model = small_model()
    SafeCheckpointer(model, str(tmp_path)).save("model_0000004", iteration=4)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000004.pth"]
    state = torch.load(tmp_path / "model_0000004.pth", weights_only=True)
    assert state["iteration"] == 4
    assert torch.equal(state["model"]["0.weight"], model[0].weight)


def test_damaged_files_are_passed_over_until_one_can_be_read(tmp_path):
    model = small_model()
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    for iteration in (4, 9, 14):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    (tmp_path / "model_0000014.pth").write_bytes(b"cut off")
    (tmp_path / "model_0000009.pth").unlink()
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 4
    (tmp_path / "model_0000004.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be read"):
        checkpointer.resume_or_load("", resume=True)


def test_later_files_than_the_tagged_one_are_not_taken(tmp_path):
    """A run that was set back by hand goes on from where last_checkpoint says."""
    checkpointer = SafeCheckpointer(small_model(), str(tmp_path))
    for iteration in (4, 9, 14):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    checkpointer.tag_last_checkpoint("model_0000009.pth")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 9
    (tmp_path / "model_0000009.pth").write_bytes(b"cut off")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 4


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on file size stops the write half-way, as a full disk does."""
    model = small_model()
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000004", iteration=4)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"model_0000009.pth could not be written .* Free some"):
            checkpointer.save("model_0000009", iteration=9, big=torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_another_architecture(tmp_path):
    SafeCheckpointer(small_model(4), str(tmp_path)).save("model_0000004", iteration=4)
    wider = SafeCheckpointer(small_model(8), str(tmp_path))
    with pytest.raises(ValueError, match=r"another architecture .* 0.weight"):
        wider.resume_or_load("", resume=True)
    other = SafeCheckpointer(nn.Linear(2, 2), str(tmp_path / "new"))
    with pytest.raises(ValueError, match="another architecture"):
        other.resume_or_load(str(tmp_path / "model_0000004.pth"), resume=False)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_not_a_checkpoint(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.pth is damaged or is no checkpoint"):
        SafeCheckpointer(small_model(), str(tmp_path)).resume_or_load(str(path), resume=False)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.pkl", b"<html>not found</html>", "a.pkl is damaged or is no checkpoint"),
        ("a.pkl", pickle.dumps([1, 2]), "a.pkl is damaged or is no checkpoint"),
        ("a.pyth", {"epoch": 3}, "a.pyth is damaged or is no checkpoint"),
        ("a.pth", {"state_dict": {"0.bias": torch.zeros(1)}, "epoch": 90}, "entry state_dict is"),
        ("a.pth", {"model": {"0.bias": torch.zeros(1), "epoch": 90}}, "entry epoch is of type int"),
        ("a.pth", {"model": 7}, "its model is 7"),
    ],
)
def test_checkpoints_of_other_tools_are_refused_in_a_sentence(tmp_path, name, content, sentence):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=sentence):
        SafeCheckpointer(small_model()).load_whole(str(tmp_path / name))
    with pytest.raises(UserError, match=sentence):
        SafeCheckpointer(small_model()).resume_or_load(str(tmp_path / name), resume=False)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_changed_byte_never_ends_in_an_error_of_torch(tmp_path):
    path = tmp_path / "model_0000004.pth"
    SafeCheckpointer(small_model(), str(tmp_path)).save("model_0000004", iteration=4)
    content = path.read_bytes()
    refused = 0
    begin = content.index(b"data.pkl")
    for position in range(begin, begin + 300):
        path.write_bytes(content[:position] + b"\xf8" + content[position + 1 :])
        try:
            read_checkpoint(path)
        except UserError as error:
            assert "is damaged or is no checkpoint" in str(error)
            refused += 1
    assert refused > 100


def test_code_in_a_file_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_here"),)

    for name, write in (
        ("new.pth", lambda file: torch.save({"model": Evil()}, file)),
        ("old.pth", lambda file: pickle.dump({"model": Evil()}, file)),
    ):
        with open(tmp_path / name, "wb") as file:
            write(file)
        with pytest.raises(ValueError, match="is damaged or is no checkpoint"):
            SafeCheckpointer(small_model(), "").resume_or_load(str(tmp_path / name), resume=False)
    assert not (tmp_path / "was_here").exists()
