"""The physically smaller network of S2 is the masked one, up to the order of additions."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repr_det import RePr, RePrSchedule
from repr_det.engine.batches import training_loss
from repr_det.engine.hook import pays
from repr_det.method.compact import Compact, _Cut
from repr_det.method.modules import unchanged
from tests.detectors import plain_cfg
from tests.method.nets import NETS, OPTIMIZERS, batch, loss, net
from tests.method.side_by_side import clip_all_by_norm, clip_by_norm, clip_by_value, train_step

S1, S2, AFTER = 2, 4, 3


class Run:
    """A network with its optimizer and method, physically smaller in S2 or not."""

    def __init__(self, model, optimizer, compact, clip=None, ratio=0.3, copies=(), **arguments):
        self.model, self.clip, self.losses = model, clip, []
        self.dtype = next(model.parameters()).dtype
        self.optimizer = OPTIMIZERS[optimizer](model.parameters())
        schedule = RePrSchedule(S1, S2, 1)
        self.method = RePr(
            model, self.optimizer, schedule, ratio, batches=self.batches, loss=loss, copies=copies
        )
        self.compact = None
        self.shrunk = None
        if compact:
            self.compact = Compact(self.method, **arguments)

    def batches(self):
        return (batch(i, self.dtype) for i in range(90, 94))

    def until(self, end, begin=0):
        for i in range(begin, end):
            if self.compact and self.method.due(i):
                self.compact.grow()
            self.method.step(i)
            if self.compact and self.method.phase == "sub" and not self.compact.active:
                self.shrunk = self.compact.shrink()
            self.losses.append(train_step(self.model, self.optimizer, i, self.dtype, self.clip))
        return self


def flat_state(optimizer):
    return {
        f"{number}.{key}": value
        for number, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }


def without_idle_variances(run):
    """The model's state dict without what nothing reads: running variances of pruned channels."""
    state = {key: value.clone() for key, value in run.model.state_dict().items()}
    norms = run.method.graph.norms
    for name, mask in run.method.pruned.items():
        for link in norms.get(name, []):
            if f"{link.name}.running_var" in state:
                state[f"{link.name}.running_var"][link.channels_of(mask)] = 0
    return state


def assert_same(a, b, tolerance=1e-9):
    torch.testing.assert_close(a.losses, b.losses, rtol=tolerance, atol=tolerance)
    for mine, theirs in (
        (without_idle_variances(a), without_idle_variances(b)),
        (flat_state(a.optimizer), flat_state(b.optimizer)),
    ):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(
                value,
                theirs[key],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, k=key: f"{k}: {m}",
            )


def side_by_side(name, optimizer, clip=None):
    masked, compact = (Run(net(name), optimizer, on, clip) for on in (False, True))
    parameters = list(compact.model.parameters())
    shapes = [p.shape for p in parameters]
    for run in (masked, compact):
        run.until(S1 + S2)
    assert compact.compact.active
    assert any(p.shape != s for p, s in zip(parameters, shapes, strict=True))
    assert compact.shrunk.after.multiply_adds < compact.shrunk.before.multiply_adds
    assert compact.shrunk.after.parameters < compact.shrunk.before.parameters
    # What a checkpoint written now would hold.
    assert_same(masked, compact)
    compact.compact.grow()
    assert all(p is q for p, q in zip(parameters, compact.model.parameters(), strict=True))
    assert [p.shape for p in parameters] == shapes
    assert_same(masked, compact)
    for run in (masked, compact):
        run.until(S1 + S2 + AFTER, begin=S1 + S2)
    assert_same(masked, compact)
    return masked, compact


def hand_over(a, b):
    """Load one run's state into another's."""
    model, optimizer, method = (
        copy.deepcopy(x.state_dict()) for x in (a.model, a.optimizer, a.method)
    )
    b.model.load_state_dict(model)
    b.optimizer.load_state_dict(optimizer)
    b.method.load_state_dict(method)


EVERYDAY = {("chain", o) for o in OPTIMIZERS} | {(n, "momentum") for n in NETS}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pytest.param(n, o, marks=() if (n, o) in EVERYDAY else pytest.mark.slow)
        for n in NETS
        for o in OPTIMIZERS
    ],
)
def test_trains_as_the_masked_network(name, optimizer):
    side_by_side(name, optimizer)


@pytest.mark.parametrize("clip", [clip_by_norm, clip_all_by_norm, clip_by_value])
def test_clipping(clip):
    side_by_side("residual-bias", "momentum", clip)


@pytest.mark.parametrize("first", [True, False])
def test_checkpoint_of_one_mode_goes_on_in_the_other(first):
    middle = S1 + 2
    run = Run(net("residual"), "adam", first).until(middle)
    resumed = Run(net("residual"), "adam", not first)
    hand_over(run, resumed)
    assert [p.shape for p in resumed.model.parameters()] == [
        p.shape for p in net("residual").parameters()
    ]
    resumed.losses = run.losses[:]
    for one in (run, resumed):
        one.until(S1 + S2, begin=middle)
    assert [one.compact is not None and one.compact.active for one in (run, resumed)] == [
        first, not first
    ]  # fmt: skip
    assert_same(run, resumed)


def test_full_size_state_can_be_loaded_into_the_smaller_network():
    """As is done to evaluate averaged weights and go on with one's own."""
    run, other = (Run(net("residual"), "adam", True).until(S1 + 2) for _ in range(2))
    own = copy.deepcopy((other.model.state_dict(), other.optimizer.state_dict()))
    other.model.load_state_dict({k: 0 * v for k, v in own[0].items()})
    other.model.load_state_dict(own[0])
    other.optimizer.load_state_dict(own[1])
    for one in (run, other):
        one.until(S1 + S2, begin=S1 + 2)
    assert_same(run, other, 0)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_checkpoint_from_before_the_drop_comes_back_whole(optimizer):
    """As after a loss that is not finite: the network grows only once everything is loaded."""
    before = Run(net("residual"), optimizer, False).until(S1)
    run = Run(net("residual"), optimizer, True).until(S1 + 2)
    assert run.compact.active
    saved = copy.deepcopy((before.model.state_dict(), before.optimizer.state_dict()))
    run.model.load_state_dict(copy.deepcopy(saved[0]))
    run.optimizer.load_state_dict(copy.deepcopy(saved[1]))
    for _ in range(2):  # while it is small, and after
        found = run.model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in saved[0].items())
        states = flat_state(run.optimizer)
        assert all(torch.equal(states[k], v) for k, v in flat_state(before.optimizer).items())
        run.compact.grow()
    assert not run.compact.active


def test_module_alone_writes_full_size_tensors_through_a_wrapper():
    run = Run(net("chain"), "sgd", True).until(S1 + 1)
    assert run.model[7].weight.shape[0] < 8
    assert run.model[7].state_dict()["weight"].shape == (8, 8, 3, 3)
    wrapped = nn.DataParallel(run.model).state_dict()
    assert wrapped["module.7.weight"].shape == (8, 8, 3, 3)
    assert wrapped["module.8.running_mean"].shape == (8,)


def test_weights_loaded_into_a_copy_stay_out_of_the_network():
    """As where other weights are evaluated in the middle of S2."""
    run = Run(net("chain"), "momentum", compact=True)
    earlier = copy.deepcopy(run.model.state_dict())
    run.until(S1 + 1)
    assert run.compact.active
    before = copy.deepcopy(run.model.state_dict())
    other = copy.deepcopy(run.model)
    other.load_state_dict(before)
    with pytest.raises(RuntimeError, match="size mismatch"):  # filters that the copy lacks
        other.load_state_dict(earlier)
    for grown in (False, True):
        if grown:
            run.compact.grow()
        for key, value in run.model.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_averaged_copy_shrinks_and_grows_with_the_model():
    runs = []
    for on in (False, True):
        model = net("chain")
        average = copy.deepcopy(model)
        run = Run(model, "momentum", on, copies=[average])
        for i in range(S1 + S2 + AFTER):
            run.until(i + 1, begin=i)
            with torch.no_grad():
                for mine, theirs in zip(model.parameters(), average.parameters(), strict=True):
                    theirs.lerp_(mine, 0.5)
        runs.append(average.state_dict())
    for key, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][key], rtol=1e-9, atol=1e-9)


def test_zero_filters_of_the_smaller_network_are_counted():
    run = Run(net("chain"), "sgd", True).until(S1 + 1)
    layer = max(run.method.layers, key=lambda one: run.method.pruned[one.name].sum())
    assert run.shrunk.removed == run.method.num_pruned > 1
    assert run.method.count_zero_filters() == {}
    with torch.no_grad():
        layer.weight[0] = 0
    assert run.method.count_zero_filters() == {layer.name: 1}


def test_gradients_of_the_last_step_go_on():
    """For loops that accumulate gradients or zero them without setting them to None."""
    grads = []
    for on in (False, True):
        run = Run(net("residual"), "sgd", on).until(S1)
        run.method.step(S1)
        run.method.mask_gradients()
        if on:
            run.compact.shrink()
        loss(run.model, batch(7)).backward()
        if on:
            run.compact.grow()
        grads.append([p.grad for p in run.model.parameters()])
    for name, a, b in zip(dict(run.model.named_parameters()), *grads, strict=True):
        # What read a dropped filter at the last step reads nothing now.
        kept = b != 0
        torch.testing.assert_close(a[kept], b[kept], rtol=1e-9, atol=1e-9, msg=name)


def test_node_that_outlives_a_step_does_not_keep_old_shapes():
    run = Run(net("chain"), "sgd", True).until(S1)
    old = loss(run.model, batch(0))  # holds every parameter's node
    run.until(S1 + 1, begin=S1)
    assert old.requires_grad
    run.until(S1 + S2 + 1, begin=S1 + 1)


def test_measuring_leaves_everything_as_it_was():
    run = Run(net("residual"), "adam", True).until(S1)
    run.method.step(S1)
    dropout = torch.get_rng_state()
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    gradients = [p.grad.clone() for p in run.model.parameters()]
    assert run.compact.speedup(rounds=1).ratio > 0
    assert not run.compact.active
    assert torch.equal(torch.get_rng_state(), dropout)
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, before[0][key])
    for key, value in flat_state(run.optimizer).items():
        number, name = key.split(".")
        assert torch.equal(value, before[1]["state"][int(number)][name])
    for parameter, gradient in zip(run.model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


class Gpu:
    """A clock and a device that works off what was launched only while it is waited for.

    Args:
        masked: seconds of each pass of the masked network, in order.
        smaller: of the smaller one.
    """

    def __init__(self, masked, smaller):
        self.passes = {False: iter(masked), True: iter(smaller)}
        self.now = self.waiting = 0.0

    def perf_counter(self):
        return self.now

    def wait(self, device):
        self.now, self.waiting = self.now + self.waiting, 0.0

    def measured(self, monkeypatch):
        run = Run(net("chain"), "sgd", True).until(S1)
        run.method.step(S1)

        def on_gpu(model, data):
            self.waiting += next(self.passes[run.compact.active])
            return loss(model, data)

        run.compact._loss = on_gpu
        monkeypatch.setattr("repr_det.method.compact.time", self)
        monkeypatch.setattr("repr_det.method.compact._wait", self.wait)
        return run.compact.speedup()


def test_slower_network_is_not_chosen_whatever_disturbs_the_masked_one(monkeypatch):
    """Three turns of five are disturbed, so medians alone would say 1.4 times as fast."""
    disturbed = [1.0, 1.5] * 3 + [1.0] * 4
    speed = Gpu(disturbed, [1.05] * 10).measured(monkeypatch)
    assert speed.ratio == pytest.approx(1.5 / 1.05)
    assert speed.lowest == pytest.approx(1 / 1.05)
    assert not pays(speed, s2=10_000)


@pytest.mark.parametrize(("first", "expected"), [(1.0, True), (50.0, True), (70.0, False)])
def test_faster_network_is_chosen_if_its_first_run_costs_less_than_it_saves(
    monkeypatch, first, expected
):
    """In 600 iterations a network of 0.9 of the time saves 60; compiling is in the first."""
    speed = Gpu([5.0, 1.0] + [1.0] * 8, [first] + [0.9] * 9).measured(monkeypatch)
    assert speed == pytest.approx((1 / 0.9, 1 / 0.9, first - 0.9))
    assert pays(speed, s2=600) is expected


def test_processes_agree_once_whatever_fails_in_one_of_them(monkeypatch):
    """A second question that not all of them come to would be answered by another one."""
    asked = []

    def agree(found, group):
        asked.append(found)
        return [found]

    def fail(*arguments):
        raise MemoryError("made up")

    run = Run(net("residual"), "sgd", True).until(S1)
    run.method.step(S1)
    monkeypatch.setattr("repr_det.method.compact.objects_of_all_ranks", agree)
    monkeypatch.setattr(Compact, "_outputs", fail)
    with pytest.raises(RuntimeError, match="could not be run .MemoryError: made up"):
        run.compact.shrink()
    assert len(asked) == 1
    monkeypatch.setattr(Compact, "_seconds", fail)
    with pytest.raises(MemoryError):
        run.compact.speedup()
    assert len(asked) == 1
    assert not run.compact.active


def test_network_stays_as_it_was_where_making_it_smaller_fails_halfway(monkeypatch):
    copied = copy.deepcopy(net("chain"))
    run = Run(net("chain"), "momentum", True, copies=[copied]).until(S1)
    run.method.step(S1)
    shapes = [p.shape for p in run.model.parameters()]

    def assert_untouched():
        assert not run.compact.active
        assert [p.shape for p in run.model.parameters()] == shapes
        loss(run.model, batch(0)).backward()

    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1e-3)  # so what is pruned is not zero there
    with pytest.raises(RuntimeError, match="not zero"):
        run.compact.shrink()
    assert_untouched()
    with torch.no_grad():
        for mine, theirs in zip(copied.parameters(), run.model.parameters(), strict=True):
            mine.copy_(theirs)
    take, calls = _Cut.take, []

    def fail_late(self, full):
        calls.append(self)
        if len(calls) > 12:
            raise MemoryError("made up")
        return take(self, full)

    monkeypatch.setattr(_Cut, "take", fail_late)
    with pytest.raises(RuntimeError, match="made up"):
        run.compact.shrink()
    assert len(calls) == 13
    monkeypatch.undo()
    assert_untouched()
    assert run.compact.shrink().removed > 0


class ReadsWidth(nn.Module):
    """Code that reads a number of channels: with fewer of them it computes something else."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU())
        )
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = self.features(images)
        scale = {
            "shape": lambda: (x.shape[1] / 8) ** 0.5,
            "parameters": lambda: sum(p.numel() for p in self.parameters()) ** 0.5,
            "width": lambda: (self.features[2].out_channels / 8) ** 0.5,
            "evaluation": lambda: 1.0 if self.training else (x.shape[1] / 8) ** 0.5,
        }[self.how]()
        return self.head(x.mean((2, 3))) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["shape", "parameters", "width", "evaluation"])
def test_filters_stay_where_the_smaller_network_differs(how, dtype):
    run = Run(ReadsWidth(how).to(dtype), "sgd", True).until(S1)
    run.method.step(S1)
    shapes = [p.shape for p in run.model.parameters()]
    with pytest.raises(RuntimeError, match="the smaller network differs from the masked one"):
        run.compact.shrink()
    assert not run.compact.active and [p.shape for p in run.model.parameters()] == shapes


class Deforms(nn.Module):
    """A deformable conv, whose input channels have one map of offsets or one for each half."""

    def __init__(self, offset_groups):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.offsets = nn.Conv2d(8, offset_groups * 18, 3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = nn.functional.silu(self.stem(x))
        return self.head(nn.functional.silu(self.deform(x, self.offsets(x))).mean((2, 3)))


@pytest.mark.parametrize(("offset_groups", "removed"), [(1, 2), (2, 0)])
def test_input_channels_with_offsets_of_their_own_stay(offset_groups, removed):
    """With fewer channels in one half, the others would move to the other half's offsets."""
    torch.manual_seed(0)
    model = Deforms(offset_groups)
    data = batch(0, torch.float32)
    method = RePr(
        model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1), 0.25,
        include=["stem"], batches=lambda: iter([data]), loss=loss,
    )  # fmt: skip
    method.step(1)
    assert Compact(method).shrink().removed == removed
    assert model.deform.weight.shape[1] == 8 - removed


def test_inside_the_callers_autocast_no_weights_of_another_size_are_used():
    run = Run(net("chain-silu", torch.float32), "sgd", True).until(S1)
    images = batch(0, torch.float32)[0]
    with torch.autocast(images.device.type, torch.bfloat16):
        run.method.step(S1)
        run.model(images)
        assert run.compact.shrink().removed > 0
        run.model(images)
        run.compact.grow()
        run.model(images)


class MagnifiesRounding(nn.Module):
    """Far apart in float32 for two networks that are the same."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 3), nn.SiLU(), nn.Conv2d(64, 64, 3), nn.SiLU())
        )
        self.head = nn.Linear(64, 5)

    def forward(self, images):
        x = self.head(self.features(images).mean((2, 3)))
        # Some processors round sums of fewer channels to the same bits, so this rounds as well.
        x = x * (1 + self.features[2].out_channels * torch.finfo(x.dtype).eps)
        return x + (1e6 * x).sin().detach()


def test_rounding_does_not_keep_filters_in_the_network():
    torch.manual_seed(0)
    run = Run(MagnifiesRounding(), "sgd", True).until(S1)
    run.method.step(S1)
    run.optimizer.zero_grad()
    outputs = [run.model(batch(90, torch.float32)[0])]
    assert run.compact.shrink().removed > 0
    outputs.append(run.model(batch(90, torch.float32)[0]))
    assert (outputs[0] - outputs[1]).norm() > 1e-3 * outputs[0].norm()  # or nothing is tested


def test_removal_goes_on_where_nothing_can_be_counted(monkeypatch):
    def fail(self):
        raise NotImplementedError("no formula for this operation")

    monkeypatch.setattr(FlopCounterMode, "__enter__", fail)
    shrunk = Run(net("chain"), "sgd", True).until(S1 + 1).shrunk
    assert shrunk.removed > 0 and shrunk.before.multiply_adds is None


def test_cost_is_compared_within_the_cycle():
    """What a network costs may change: by layers that thaw, or by images of other sizes."""
    run = Run(net("chain"), "sgd", True).until(S1)
    run.method.step(S1)
    first = run.compact.shrink()
    run.compact.grow()
    run.model[0].weight.requires_grad_(False)
    second = run.compact.shrink()
    frozen = run.model[0].weight.numel()
    assert second.before.parameters < first.before.parameters
    assert first.after.parameters - second.after.parameters == frozen


def test_model_that_no_example_trains_is_refused_in_one_way():
    class NeedsTargets(nn.Sequential):
        def forward(self, x, targets=None):
            assert targets is not None or not self.training, "needs targets"
            return super().forward(x)

    model = NeedsTargets(*net("chain"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = RePr(model, optimizer, RePrSchedule(1, 5, 1))
    method.step(1)
    with pytest.raises(RuntimeError, match="needs targets"):
        Compact(method).shrink()


def test_compiled_model():
    losses = []
    for on in (False, True):
        model = net("chain")
        run = Run(model, "momentum", on)
        run.model = torch.compile(model, backend="eager")
        losses.append(run.until(S1 + S2 + AFTER).losses)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


def pruned_classifier(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = RePr(model, optimizer, RePrSchedule(1, 1, 1), 0.3)
    method.step(1)
    return model, optimizer, method


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in (
                "resnet50", "resnext50_32x4d", "densenet121", "googlenet", "shufflenet_v2_x0_5",
                "mobilenet_v3_small", "efficientnet_b0", "squeezenet1_0", "vgg11_bn",
            )
        ),
    ],
)  # fmt: skip
def test_classifiers_say_the_same(name):
    model, optimizer, method = pruned_classifier(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def run(training):
        with unchanged(model), torch.no_grad():
            model.train(training)
            torch.manual_seed(3)
            out = model(x)
        return out if isinstance(out, torch.Tensor) else out[0]

    expected = [run(False), run(True)]
    compact = Compact(method)
    shrunk = compact.shrink()
    assert shrunk.removed > 0
    assert shrunk.after.multiply_adds < 0.99 * shrunk.before.multiply_adds
    for training, values in zip((False, True), expected, strict=True):
        torch.testing.assert_close(run(training), values, rtol=1e-9, atol=1e-9)


def test_detector_has_the_same_gradients(tmp_path):
    model = build_model(plain_cfg(tmp_path))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    objects = Instances((64, 96))
    objects.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 50], [5, 20, 30, 60]]))
    objects.gt_classes = torch.tensor([3, 7])
    record = {"image": torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8), "instances": objects}

    def batches():
        return iter([[dict(record)]])

    method = RePr(model, optimizer, RePrSchedule(1, 1, 1), 0.3, batches=batches, loss=training_loss)
    compact = Compact(method)
    method.step(1)

    def gradients():
        model.zero_grad()
        with unchanged(model):
            model.train()
            torch.manual_seed(5)
            value = training_loss(model, *batches())
            value.backward()
        return value.item()

    expected = gradients(), [p.grad for p in model.parameters()]
    shrunk = compact.shrink()
    assert shrunk.after.multiply_adds < 0.9 * shrunk.before.multiply_adds
    # float32, in which norms over six positions multiply rounding: measured 3e-5.
    assert gradients() == pytest.approx(expected[0], rel=1e-5)
    compact.grow()
    for (name, parameter), gradient in zip(model.named_parameters(), expected[1], strict=True):
        # What reads a pruned channel has no gradient at all.
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-3 * scale, msg=name)
