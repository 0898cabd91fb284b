"""The hook in trainers that nobody here wrote, on COCO or drawn images, through whole cycles."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from repr_det import Reinit, RePrHook, RePrSchedule
from repr_det.detection.trainer import DetectionTrainer
from repr_det.engine.config import config_path
from repr_det.engine.hook import pays
from repr_det.method.compact import Speed
from repr_det.tasks import get_cfg
from tests.detectors import DATA, plain_cfg, shrink
from tests.method.nets import net
from tests.operations import Operations

HAS_EXTENSION = importlib.util.find_spec("detectron2._C") is not None

SCHEDULE = RePrSchedule(s1=2, s2=2, cycles=2)


def zero_rows(model, pruned):
    modules = dict(model.named_modules())
    return all(modules[name].weight[mask].abs().sum() == 0 for name, mask in pruned.items())


class Watch(hooks.HookBase):
    """Looks at the hook's method after every step; keeps what the model detects at some of them."""

    def __init__(self, hook, detect_at=()):
        self._hook = hook
        self._detect_at = detect_at
        self.phases = []
        self.detections = {}

    def after_step(self):
        method = self._hook.method
        self.phases.append(method.phase)
        if method.phase == "sub":
            assert method.num_pruned > 0
            assert zero_rows(self.trainer.model, method.pruned)
        if self.trainer.iter in self._detect_at:
            self.detections[self.trainer.iter] = detect(self.trainer.model, self.trainer.cfg)
            self.trainer.model.train()


@torch.no_grad()
def detect(model, cfg):
    """Boxes and scores on the first two test images."""
    model.eval()
    images = itertools.islice(build_detection_test_loader(cfg, DATA), 2)
    found = [model(image)[0]["instances"] for image in images]
    return torch.cat([torch.cat([f.pred_boxes.tensor, f.scores[:, None]], 1) for f in found])


def test_plain_default_trainer(tmp_path):
    cfg = plain_cfg(tmp_path)
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    seed_all_rng(1)
    trainer = DefaultTrainer(cfg)
    hook = RePrHook(SCHEDULE, prune_ratio=0.3)
    watch = Watch(hook, detect_at=(3, 9))
    trainer.register_hooks([hook, watch])
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert watch.phases == ["full"] * 2 + ["sub"] * 2 + ["full"] * 2 + ["sub"] * 2 + ["full"] * 2
    assert hook.method.num_pruned == 0
    # The backbone with its FPN takes part, its stem and the heads do not.
    names = [layer.name for layer in hook.method.layers]
    assert all(name.startswith("backbone.") for name in names)
    assert "backbone.fpn_output3" in names
    assert not any("stem" in name for name in names)
    # A checkpoint written in S2 holds the state where it is said to be, loadable without code.
    state = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert state["trainer"]["hooks"]["RePrHook"]["phase"] == "sub"
    # Plain Detectron2 detects the same with a checkpoint of S2 and with the last one.
    for iteration, name in ((3, "model_0000003.pth"), (9, "model_final.pth")):
        model = build_model(cfg)
        DetectionCheckpointer(model).load(str(tmp_path / name))
        assert len(watch.detections[iteration]) > 0
        assert torch.equal(detect(model, cfg), watch.detections[iteration])
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    recorded = {key for line in lines for key in line}
    assert {"repr/phase", "repr/cycle", "repr/num_pruned", "repr/overlap"} <= recorded
    assert "repr/overlap/backbone.fpn_output3" in recorded


class StoppedError(Exception):
    """Ends a run before its first step."""


class Stop(hooks.HookBase):
    def before_train(self):
        raise StoppedError


@pytest.fixture
def warned():
    """Calls a function that is stopped before the first step; returns what RePrHook warned of."""
    logger = logging.getLogger("detectron2.repr_det.engine.hook")

    def run(train):
        messages = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: messages.append(record.getMessage())
        logger.addHandler(handler)
        try:
            with pytest.raises(StoppedError):
                train()
        finally:
            logger.removeHandler(handler)
        return messages

    return run


def start(cfg, resume=False, **arguments):
    """A plain DefaultTrainer up to its first step."""
    trainer = DefaultTrainer(cfg)
    trainer.register_hooks([RePrHook(SCHEDULE, **arguments), Stop()])
    trainer.resume_or_load(resume=resume)
    trainer.train()


def test_short_runs_from_loaded_weights_are_warned_of(tmp_path, warned):
    cfg = plain_cfg(tmp_path / "run")
    assert warned(lambda: start(cfg)) == []
    weights = tmp_path / "weights.pth"
    model = build_model(cfg)
    DetectionCheckpointer(model, str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(weights)
    (message,) = warned(lambda: start(cfg))
    assert "start from loaded weights" in message
    assert "set REPR.REINIT.DIRECTION to previous" in message
    assert warned(lambda: start(cfg, reinit=Reinit(direction="previous"))) == []
    # Heads alone were loaded: nothing that takes part is lost.
    state = torch.load(weights, weights_only=True)
    state["model"] = {k: v for k, v in state["model"].items() if not k.startswith("backbone.")}
    torch.save(state, weights)
    assert warned(lambda: start(cfg)) == []


def test_long_and_resumed_runs_from_loaded_weights_are_not_warned_of(tmp_path, warned):
    cfg = plain_cfg(tmp_path / "run")
    DetectionCheckpointer(build_model(cfg), str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    cfg.SOLVER.MAX_ITER = 20_000
    assert warned(lambda: start(cfg)) == []
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 10, 9
    trainer = DefaultTrainer(cfg)
    trainer.register_hooks([RePrHook(SCHEDULE)])
    trainer.resume_or_load(resume=False)
    trainer.train()
    (tmp_path / "run/last_checkpoint").write_text("model_0000008.pth")
    assert warned(lambda: start(cfg, resume=True)) == []


class Norms(nn.Sequential):
    """Two convs whose norms have seen data."""

    def __init__(self):
        super().__init__(net("chain", torch.float32))

    def forward(self, batch):
        return {"loss": self[0](batch).square().mean()}


class Wide(nn.Module):
    """Most weights are in two linear layers."""

    def __init__(self):
        super().__init__()
        self.body = net("chain", torch.float32)[:11]
        self.hidden = nn.Sequential(nn.Linear(32, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU())
        self.head = nn.Linear(400, 2)

    def forward(self, batch):
        return {"loss": self.head(self.hidden(self.body(batch).flatten(1))).square().mean()}


@pytest.mark.parametrize("linear", [False, True])
def test_where_little_takes_part_the_log_names_the_switch(caplog, linear):
    caplog.set_level(logging.INFO)
    model = Wide()
    trainer = SimpleTrainer(model, [torch.randn(4, 3, 8, 8)], torch.optim.SGD(model.parameters()))
    trainer.register_hooks([RePrHook(SCHEDULE, linear=linear), Stop()])
    with pytest.raises(StoppedError):
        trainer.train(0, 10)
    lines = {line for line in caplog.messages if "trainable weights" in line}
    if linear:
        assert not lines
        return
    total = sum(p.numel() for p in model.parameters())
    convs = 2 * 8 * 8 * 9
    hidden = 32 * 400 + 400 * 400
    assert lines == {
        f"RePr: the layers that take part hold {convs / total:.1%} of the trainable weights. "
        f"Linear layers with hidden units hold {hidden / total:.1%} more. Set REPR.LINEAR to "
        f"True, in code linear=True, so that they take part."
    }


def test_weights_loaded_before_the_hook_are_seen_by_their_norms(warned):
    for pretrained in (False, True):
        model = Norms()
        if pretrained:
            model(torch.randn(4, 3, 8, 8))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        trainer = SimpleTrainer(model, [torch.randn(4, 3, 8, 8)], optimizer)
        trainer.register_hooks([RePrHook(SCHEDULE), Stop()])
        found = warned(lambda one=trainer: one.train(0, 10))
        assert ["start from loaded weights" in message for message in found] == [True] * pretrained


class Sizes(hooks.HookBase):
    """Counts the model's parameters after every step."""

    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append(sum(p.numel() for p in self.trainer.model.parameters()))


def run_with(compact, output, schedule, max_iter, resume=False):
    """A run of a plain DefaultTrainer: its hook and the number of parameters in every step."""
    cfg = plain_cfg(output)
    cfg.SOLVER.MAX_ITER = max_iter
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    seed_all_rng(1)
    trainer = DefaultTrainer(cfg)
    hook, sizes = RePrHook(schedule, compact=compact), Sizes()
    trainer.register_hooks([hook, sizes])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return hook, sizes.seen


def test_physically_smaller_in_s2(tmp_path, caplog):
    schedule = RePrSchedule(2, 2, 1)
    with caplog.at_level(logging.INFO, "detectron2"):
        _, masked = run_with("off", tmp_path / "off", schedule, 6)
        _, sizes = run_with("on", tmp_path / "on", schedule, 6)
    full, small = sizes[0], sizes[2]
    assert masked == [full] * 6
    assert sizes == [full, full, small, small, full, full]
    assert small < 0.9 * full
    assert " out of the network during S2" in caplog.text

    # A checkpoint of S2 is the masked network's.
    plain, compact = (
        torch.load(tmp_path / mode / "model_0000002.pth", weights_only=True)
        for mode in ("off", "on")
    )
    for key, value in plain["model"].items():
        if not key.endswith("running_var"):  # a pruned channel's is read by nothing
            torch.testing.assert_close(compact["model"][key], value, rtol=1e-2, atol=1e-3, msg=key)
        if key.endswith("weight"):
            assert torch.equal(compact["model"][key] == 0, value == 0)
    for a, b in zip(
        *(c["trainer"]["_trainer"]["optimizer"]["state"].values() for c in (plain, compact)),
        strict=True,
    ):
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}

    # And the masked network's is one that the smaller network goes on from.
    (tmp_path / "off" / "last_checkpoint").write_text("model_0000002.pth")
    hook, resumed = run_with("on", tmp_path / "off", schedule, 6, resume=True)
    assert resumed == [small, full, full]
    assert hook.method.num_pruned == 0


@pytest.mark.parametrize("compact", ["on", "off"])
def test_compact_and_exclude_by_config(tmp_path, compact):
    cfg = get_cfg()
    cfg.merge_from_file(config_path("repr_faster_rcnn.yaml"))
    shrink(cfg, tmp_path)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(MetadataCatalog.get(DATA).thing_classes)
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 3, 1
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 1, 1, 1
    cfg.REPR.COMPACT, cfg.REPR.EXCLUDE = compact, ["backbone.fpn_*", "*.conv2"]
    trainer, sizes = DetectionTrainer(cfg), Sizes()
    trainer.register_hooks([sizes])
    trainer.train()
    full, in_s2, after = sizes.seen
    assert in_s2 < full if compact == "on" else in_s2 == full
    assert after == full
    weights = torch.load(tmp_path / "model_0000001.pth", weights_only=True)["model"]
    losing = [n for n, w in weights.items() if w.dim() == 4 and (w.flatten(1) == 0).all(1).any()]
    assert len(losing) > 10
    assert all(name.startswith("backbone.bottom_up.") for name in losing)
    assert not any(".conv2." in name for name in losing)


def test_auto_measures_once_and_remembers(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("repr_det.engine.hook.MEASURING_PAYS_FROM", 1)
    for smaller in (True, False):
        monkeypatch.setattr("repr_det.engine.hook.pays", lambda speed, s2, found=smaller: found)
        with caplog.at_level(logging.INFO, "detectron2"):
            hook, sizes = run_with("auto", tmp_path / str(smaller), RePrSchedule(1, 1, 2), 5)
        assert (sizes[1] < sizes[0], sizes[3] < sizes[2]) == (smaller, smaller)
        assert hook.state_dict()["compact"] is smaller
    # A set, since what a logger passes on may be captured twice.
    assert len({r for r in caplog.records if "times as fast" in r.getMessage()}) == 2


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_removal_pays_where_every_turn_is_faster_and_its_first_run_is_regained():
    assert pays(Speed(lowest=1.01, ratio=1.1, price=5), s2=600)
    assert not pays(Speed(lowest=0.99, ratio=1.1, price=0), s2=600)
    assert not pays(Speed(lowest=1.01, ratio=1.02, price=0), s2=600)
    # A tenth less of 100 iterations saves 9 of them.
    assert pays(Speed(lowest=1.1, ratio=1.1, price=9), s2=100)
    assert not pays(Speed(lowest=1.1, ratio=1.1, price=10), s2=100)


@pytest.mark.parametrize("smaller", [True, False])
@pytest.mark.parametrize("find_unused", [False, True])
def test_auto_under_distributed_training(one_process, monkeypatch, smaller, find_unused):
    """Shapes that changed for as long as measuring lasts need a new wrapper, too."""
    monkeypatch.setattr("repr_det.engine.hook.MEASURING_PAYS_FROM", 1)
    monkeypatch.setattr("repr_det.engine.hook.pays", lambda speed, s2: smaller)

    torch.manual_seed(0)
    model = Losses()
    wrapped = DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=find_unused
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches = itertools.repeat(torch.randn(4, 3, 8, 8))
    trainer = SimpleTrainer(wrapped, batches, optimizer)
    hook = RePrHook(RePrSchedule(2, 3, 1))
    trainer.register_hooks([hook])
    trainer.train(0, 8)
    assert hook.state_dict()["compact"] is smaller
    assert hook.method.num_pruned == 0 and len(hook.method.history) == 1


class Losses(nn.Module):
    """A small network as Detectron2's trainers take it."""

    def __init__(self, name="chain"):
        super().__init__()
        self.net = net(name, torch.float32)

    def forward(self, data):
        return {"loss": self.net(data).square().mean()}


def small_trainer(*before, **arguments):
    model = Losses()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = SimpleTrainer(model, itertools.repeat(torch.ones(4, 3, 8, 8)), optimizer)
    trainer.register_hooks([*before, RePrHook(RePrSchedule(4, 2, 1), **arguments)])
    return trainer


def test_overlap_is_recorded_at_the_evaluations_of_every_hook():
    last, often = hooks.EvalHook(0, dict), hooks.EvalHook(3, dict)
    trainer = small_trainer(last, often)
    trainer.train(0, 10)
    # Evaluations at 2, 5 and 8, the drop at 4, the return at 6, the end at 9.
    recorded = trainer.storage.history("repr/overlap").values()
    assert [iteration for _, iteration in recorded] == [2, 4, 5, 6, 8, 9]


def test_where_removal_fails_filters_stay_and_training_goes_on(monkeypatch, caplog):
    def fail(*arguments):
        raise MemoryError("made up")

    monkeypatch.setattr("repr_det.method.compact.Compact._outputs", fail)
    trainer = small_trainer(compact="on")
    trainer.train(0, 10)
    (line,) = {line for line in caplog.messages if "stay in the network as zeros" in line}
    assert "MemoryError: made up" in line
    (hook,) = trainer._hooks
    assert len(hook.method.history) == 1 and hook.method.phase == "full"


@pytest.mark.parametrize("compact", ["off", "on"])
def test_a_step_asks_no_more_of_torch_than_one_of_plain_training(compact):
    """Where no phase changes, the hook included, but for one fill a held tensor in S2."""

    class Steps(hooks.HookBase):
        """Cuts what is recorded into steps; stands before all other hooks."""

        def __init__(self, recorded):
            self.recorded, self.begins = recorded, []

        def before_step(self):
            self.begins.append(len(self.recorded.seen))

        def cut(self):
            return [self.recorded.seen[a:b] for a, b in itertools.pairwise(self.begins)]

    found = {}
    for with_repr in (False, True):
        model = Losses()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        trainer = SimpleTrainer(model, itertools.repeat(torch.ones(4, 3, 8, 8)), optimizer)
        with Operations() as recorded:
            steps = Steps(recorded)
            trainer.register_hooks([steps])
            if with_repr:
                hook = RePrHook(RePrSchedule(3, 4, 1), compact=compact)
                trainer.register_hooks([hook])
            trainer.train(0, 12)
        found[with_repr] = steps.cut()
    dropped = hook.method.history[0]["pruned"]
    slots = [s for x in hook.method.layers for s in x.filter_slots(dropped[x.name])]
    held = len({id(slot.tensor) for slot in slots if len(slot.index)}) if compact == "off" else 0
    # Drop and return come at 3 and 7.
    for i in (0, 1, 2, 8, 9, 10):
        assert found[True][i] == found[False][i]
    for i in (4, 5, 6):
        with_repr, plain = (Counter(name for name, _ in found[kind][i]) for kind in (True, False))
        assert with_repr - plain == Counter({"index_fill_": held} if held else {})
        assert not plain - with_repr
        assert found[True][i] != found[False][i]  # fewer filters, or fills


def test_lazy_config_loop(tmp_path):
    """A SimpleTrainer with a checkpointer of its own, as Detectron2's LazyConfig loop builds it."""
    cfg = plain_cfg(tmp_path)
    seed_all_rng(1)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    trainer = SimpleTrainer(model, build_detection_train_loader(cfg), optimizer)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)
    hook = RePrHook(SCHEDULE)
    trainer.register_hooks(
        [hooks.IterationTimer(), hook, hooks.PeriodicCheckpointer(checkpointer, period=4)]
    )
    trainer.train(0, 10)
    assert hook.method.num_pruned == 0
    assert len(hook.method.history) == 2
    state = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert state["trainer"]["hooks"]["RePrHook"]["phase"] == "sub"


@pytest.mark.parametrize(
    "zoo",
    [
        "COCO-Detection/retinanet_R_50_FPN_1x",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
        pytest.param(
            "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5",
            marks=pytest.mark.skipif(
                not HAS_EXTENSION,
                reason="deformable convs need Detectron2's compiled extension, which is missing",
            ),
        ),
    ],
)
def test_other_detectors(tmp_path, zoo):
    cfg = plain_cfg(tmp_path, zoo)
    cfg.SOLVER.MAX_ITER = 4
    trainer = DefaultTrainer(cfg)
    hook = RePrHook(RePrSchedule(1, 1, 1))
    watch = Watch(hook)
    trainer.register_hooks([hook, watch])
    trainer.train()
    assert watch.phases == ["full", "sub", "full", "full"]


def test_own_batches_leave_training_untouched(tmp_path):
    """Reading batches for calibration shifts neither data order nor any random state."""
    weights = []
    for peek in (False, True):
        cfg = plain_cfg(tmp_path / str(peek))
        cfg.SOLVER.MAX_ITER = 3
        seed_all_rng(1)
        trainer = DefaultTrainer(cfg)
        hook = RePrHook(RePrSchedule(1, 1, 1))
        trainer.register_hooks([hook])
        if peek:

            def look(trainer, hook=hook):
                next(hook.method.batches())

            trainer.register_hooks([hooks.CallbackHook(before_step=look)])
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


class TestErrors:
    """Each one a sentence, at registration."""

    def trainer(self, tmp_path, **changes):
        cfg = plain_cfg(tmp_path)
        cfg.merge_from_list([part for pair in changes.items() for part in pair])
        return DefaultTrainer(cfg)

    def test_schedule_that_would_end_pruned(self, tmp_path):
        with pytest.raises(ValueError, match=r"N \* \(S1 \+ S2\).*training ends after 10"):
            self.trainer(tmp_path).register_hooks([RePrHook(RePrSchedule(3, 2, 2))])

    def test_unknown_compact(self):
        with pytest.raises(ValueError, match="COMPACT.* is 'maybe'. Set one of auto, on, off"):
            RePrHook(SCHEDULE, compact="maybe")

    def test_registered_after_resume(self, tmp_path):
        trainer = self.trainer(tmp_path)
        trainer.start_iter = 5
        with pytest.raises(ValueError, match="Register it before resume_or_load"):
            trainer.register_hooks([RePrHook(SCHEDULE)])

    def test_checkpoint_made_without_repr(self, tmp_path):
        cfg = plain_cfg(tmp_path)
        cfg.SOLVER.MAX_ITER = 1
        DefaultTrainer(cfg).train()
        cfg.SOLVER.MAX_ITER = 10
        trainer = DefaultTrainer(cfg)
        trainer.register_hooks([RePrHook(SCHEDULE)])
        trainer.resume_or_load(resume=True)
        with pytest.raises(ValueError, match="holds no RePr state"):
            trainer.train()

    def test_other_settings_on_resume(self, tmp_path):
        cfg = plain_cfg(tmp_path)
        cfg.SOLVER.MAX_ITER = 9
        cfg.SOLVER.CHECKPOINT_PERIOD = 3
        trainer = DefaultTrainer(cfg)
        trainer.register_hooks([RePrHook(SCHEDULE)])
        trainer.train()
        again = DefaultTrainer(cfg)
        again.register_hooks([RePrHook(SCHEDULE, prune_ratio=0.2, seed=3)])
        with pytest.raises(ValueError, match=r"prune_ratio was 0.3, is 0.2; seed was 0, is 3"):
            again.resume_or_load(resume=True)

    def test_amp_without_gpu(self, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        cfg = plain_cfg(tmp_path)
        model = build_model(cfg)
        trainer = AMPTrainer(model, [], build_optimizer(cfg, model))
        with pytest.raises(ValueError, match="AMP.ENABLED needs a GPU"):
            trainer.register_hooks([RePrHook(SCHEDULE)])

    def test_zero_filters_in_starting_weights_are_warned_of(self, tmp_path, caplog):
        cfg = plain_cfg(tmp_path)
        cfg.SOLVER.MAX_ITER = 9
        trainer = DefaultTrainer(cfg)
        hook = RePrHook(SCHEDULE)
        trainer.register_hooks([hook])
        with torch.no_grad():
            trainer.model.backbone.fpn_output3.weight[:2] = 0
        logging.getLogger("detectron2").propagate = True
        with caplog.at_level(logging.WARNING, "detectron2"):
            hook.before_train()
        assert "2 filters of zero norm" in caplog.text
        assert "backbone.fpn_output3 (2)" in caplog.text
