"""Promise 4: every rank agrees, to the bit; and one that dies takes the others with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.engine.train_loop import TrainerBase
from detectron2.layers import NaiveSyncBatchNorm
from PIL import Image
from torch import nn

from repr_det import RePr, RePrSchedule
from repr_det.engine.hooks import SharedStatistics
from repr_det.method.compact import Compact
from repr_det.tasks import get_cfg
from tests.method.nets import batch, loss, net

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tests/engine/ranks.py")


def start(output, *arguments, through=(), timeout=300, script=SCRIPT):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DETECTRON2_DATASETS": str(output.parent / "data"),
        "REPR_DET_CACHE": str(output.parent / "cache"),
    }
    return subprocess.run(
        [sys.executable, *through, script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def assert_ranks_agree(output, processes):
    seen = [json.loads((output / f"rank{r}.json").read_text()) for r in range(processes)]
    phases = [entry["phase"] for entry in seen[0]]
    assert phases == [["full", 0], ["sub", 0], ["full", 1], ["sub", 1], ["full", 2], ["full", 2]]
    assert all(other == seen[0] for other in seen[1:])


@pytest.mark.parametrize(
    ("task", "processes"),
    [
        pytest.param("classification", 2, marks=pytest.mark.slow),
        ("detection", 2),
        pytest.param("classification", 4, marks=pytest.mark.slow),
        pytest.param("detection", 4, marks=pytest.mark.slow),
        pytest.param("classification-compact", 2, marks=pytest.mark.slow),
        pytest.param("detection-compact", 2, marks=pytest.mark.slow),
        pytest.param("classification-previous", 2, marks=pytest.mark.slow),
        pytest.param("detection-previous", 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_agree(tmp_path, task, processes):
    output = tmp_path / "out"
    done = start(output, task, output, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_ranks_agree(output, processes)


# Either rank alone would drop four filters of 3; in the mean two of 3 and two of 7 come first.
SCORES = (
    {"3": [9, 9, 0, 0, 6, 6, 0, 0], "7": [0, 0, 0, 0, 0, 0, 5, 5]},
    {"3": [0, 0, 9, 9, 6, 6, 0, 0], "7": [0, 0, 0, 0, 0, 0, 5, 5]},
)


def drop_by_own_scores(rank):
    model = net("chain", torch.float32)
    method = RePr(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        RePrSchedule(1, 1, 1),
        criterion=lambda layers, data: {
            name: torch.tensor(scores, dtype=torch.float32) for name, scores in SCORES[rank].items()
        },
    )
    (change,) = method.step(1)
    return {
        "pruned": {name: mask.nonzero().flatten().tolist() for name, mask in method.pruned.items()},
        "means": [layer.mean_score for layer in change.layers],
    }


def own_images(rank):
    """Two batches, smaller ones on the second rank."""
    return [tuple(x[: 6 - 2 * rank] for x in batch(700 + 10 * rank + i)) for i in range(2)]


def calibrate_on_own_images(rank):
    model = net("chain-frozen")
    method = RePr(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        RePrSchedule(1, 1, 1),
        include=["3"],
        batches=lambda: iter(own_images(rank)),
        loss=loss,
    )
    method.step(1)
    gone = method.pruned["3"]
    method.step(2)
    return {"gone": gone, "state": model.state_dict()}


def statistics_at_a_checkpoint(rank):
    """Each rank has its own until then."""

    class Detector(TrainerBase):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.BatchNorm2d(3))
            self.model[0].running_mean.fill_(rank)
            self.model[0].loss_normalizer = 70.0 + rank  # as in RetinaNet, no buffer

    cfg = get_cfg()
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 4, 0
    trainer = Detector()
    trainer.register_hooks([SharedStatistics(cfg)])
    found, trainer.max_iter = [], 10
    for trainer.iter in (2, 3):
        trainer.after_step()
        norm = trainer.model[0]
        found.append([float(norm.running_mean[0]), norm.loss_normalizer])
    return found


def shrink_where_one_rank_differs(rank, batches):
    """The training loss of the second rank differs in the smaller network, on some batches.

    The norms wait for all ranks in each forward pass.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), NaiveSyncBatchNorm(8), nn.SiLU(),
        nn.Conv2d(8, 8, 3), NaiveSyncBatchNorm(8), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    data = [batch(10 * rank + i, torch.float32) for i in range(2)]

    def differing(model, pair):
        chosen = any(pair[0] is data[i][0] for i in batches)
        differs = rank == 1 and model.training and model[3].out_channels < 8 and chosen
        return loss(model, pair) * (2 if differs else 1)

    method = RePr(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        RePrSchedule(1, 1, 1),
        batches=lambda: iter(data),
        loss=differing,
    )
    method.step(1)
    try:
        return Compact(method).shrink().removed
    except RuntimeError as error:
        return str(error)


def one_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'group'}", rank=rank, world_size=2)
    found = {"dropped": drop_by_own_scores(rank), "calibrated": calibrate_on_own_images(rank)}
    found["shared"] = statistics_at_a_checkpoint(rank)
    found["shrunk"] = [shrink_where_one_rank_differs(rank, some) for some in ((), (0,), (0, 1))]
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes finds that form a group: to start them takes the time."""
    folder = tmp_path_factory.mktemp("two_ranks")
    torch.multiprocessing.spawn(one_process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def test_filters_are_dropped_by_the_mean_score_over_ranks(two_ranks):
    expected = {"pruned": {"3": [4, 5], "7": [6, 7]}, "means": [30 / 8, 10 / 8]}
    assert [found["dropped"] for found in two_ranks] == [expected, expected]


def test_ranks_shrink_together_or_not_at_all(two_ranks):
    first, second = (found["shrunk"] for found in two_ranks)
    assert first == second
    assert first[0] == first[1] > 0  # one batch that agrees is enough
    assert "differs from the masked one" in first[2]


def test_statistics_are_shared_before_a_checkpoint_and_not_otherwise(two_ranks):
    assert [found["shared"] for found in two_ranks] == [
        [[0.0, 70.0], [0.0, 70.0]],
        [[1.0, 71.0], [0.0, 70.0]],
    ]


def test_statistics_of_returned_channels_are_those_of_all_ranks_images(two_ranks):
    first, second = (found["calibrated"] for found in two_ranks)
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    gone = first["gone"]
    assert gone.any() and torch.equal(gone, second["gone"])
    model = net("chain-frozen")
    before = model[4].running_mean.clone()
    model.load_state_dict(first["state"])

    def statistics(*ranks):
        images = torch.cat([x for rank in ranks for x, _ in own_images(rank)])
        outputs = model[:4](images).detach().transpose(0, 1).flatten(1)
        return outputs.mean(1), outputs.var(1, correction=0)

    found = model[4].running_mean, model[4].running_var
    for mine, expected, of_one in zip(found, statistics(0, 1), statistics(0), strict=True):
        torch.testing.assert_close(mine[gone], expected[gone])
        assert not torch.allclose(mine[gone], of_one[gone], rtol=1e-3)
    assert torch.equal(model[4].running_mean[~gone], before[~gone])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "detection"])
def test_torchrun(tmp_path, task):
    output = tmp_path / "out"
    through = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = start(output, task, output, 0, through=through)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_ranks_agree(output, 2)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_then_resumes(tmp_path):
    output = tmp_path / "out"
    killed = start(output, "detection", output, 2, 1, 7, timeout=120)
    assert killed.returncode != 0
    assert (output / "last_checkpoint").read_text() == "model_0000005.pth"
    resumed = start(output, "detection", output, 2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert (output / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2's launch would ask for two GPUs")
@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        (("REPR.NO_KEY", "1"), "NO_KEY"),  # found before the processes have anything in common
        (("REPR.S1", "0"), "s1 is 0"),
        (("REPR.PRUNE_RATIO", "1.5"), "prune_ratio is 1.5"),  # found when all is built
    ],
)
def test_a_mistake_in_two_processes_is_told_once(tmp_path, pair, sentence):
    annotations = tmp_path / "train.json"
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 9, 9], "area": 81}
        ],
        "categories": [{"id": 1, "name": "nut"}],
    }
    annotations.write_text(json.dumps(content))
    Image.new("RGB", (40, 30)).save(tmp_path / "1.png")
    output = tmp_path / "out"
    program = str(ROOT / "tools/train_net.py")
    options = ["--num-gpus", "2", "--config", "demo_faster_rcnn.yaml", "OUTPUT_DIR", output]
    data = ["--train-data", "nuts", annotations, tmp_path]
    done = start(output, *data, *options, "DATASETS.TEST", "()", *pair, script=program)
    assert done.returncode == 2, done.stderr[-3000:]
    told = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(told) == 1 and told[0].startswith("repr-det train: error: ") and sentence in told[0]
    assert "Traceback" not in done.stderr
    assert not output.exists()
