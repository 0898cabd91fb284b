from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from repr_det.classification import ClassificationTrainer
from repr_det.classification.schemes import (
    DenseSparseDenseHook,
    Distillation,
    OrthogonalityLoss,
    distillation_loss,
    load_teacher,
    orthogonality_penalty,
    sparsity_masks,
)
from repr_det.errors import UserError
from tests.classification.settings import make_arrays, register_corners, small_cfg


def test_orthogonality_penalty_by_hand():
    # Cosines: filters 0 and 1 are orthogonal, filter 2 has 1/sqrt(2) with both.
    weight = torch.tensor([[3.0, 0.0], [0.0, 0.5], [2.0, 2.0]]).view(3, 1, 1, 2)
    assert orthogonality_penalty(weight).item() == pytest.approx(4 / math.sqrt(2))


def test_filters_of_zero_norm_do_not_enter_the_orthogonality_penalty():
    """Those that RePr has dropped: value and gradients are the smaller network's."""
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    smaller = weight[[0, 2, 3]].clone().requires_grad_()
    weight[[1, 4]] = 0
    weight.requires_grad_()
    penalties = [orthogonality_penalty(w) for w in (weight, smaller)]
    assert penalties[0].item() == pytest.approx(penalties[1].item(), rel=1e-6)
    for penalty in penalties:
        penalty.backward()
    assert not weight.grad[[1, 4]].any()
    assert torch.allclose(weight.grad[[0, 2, 3]], smaller.grad, atol=1e-6)


def test_orthogonality_loss_sums_convs_and_lowers_the_overlap():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(5, 2))
    loss = OrthogonalityLoss(network, 0.01)
    value = loss(None, None)
    expected = 0.0
    for conv in (network[0], network[1]):
        rows = conv.weight.detach().flatten(1)
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if i != j:
                    expected += abs(float(a @ b / (a.norm() * b.norm())))
    assert value.item() == pytest.approx(0.01 * expected, rel=1e-5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        loss(None, None).backward()
        optimizer.step()
    assert loss(None, None) < 0.9 * value


def test_distillation_loss_by_hand():
    student, teacher = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 0.0]])
    t = 2.0
    p = 1 / (1 + math.exp(-(2.0 - 0.0) / t))
    q = 1 / (1 + math.exp(-(1.0 - 3.0) / t))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert distillation_loss(student, teacher, t).item() == pytest.approx(t * t * kl, rel=1e-5)
    assert distillation_loss(teacher, teacher, t).item() == pytest.approx(0, abs=1e-7)


@pytest.fixture
def teacher_file(tmp_path):
    cfg = small_cfg()
    torch.manual_seed(7)
    model = build_model(cfg)
    path = tmp_path / "teacher.pth"
    torch.save({"model": model.state_dict(), "iteration": 3}, path)
    return path, model


def test_orthogonality_by_config():
    cfg = small_cfg()
    cfg.MODEL.CLASSIFIER.ORTHO_LOSS = 0.2
    model = build_model(cfg)
    images, labels = make_arrays(6)
    losses = model({"image": images, "label": labels})
    convs = [module for module in model.network.modules() if isinstance(module, nn.Conv2d)]
    expected = 0.2 * sum(orthogonality_penalty(conv.weight) for conv in convs)
    assert expected > 0 and torch.allclose(losses["loss_ortho"], expected)


def test_distillation_by_config(teacher_file):
    path, teacher = teacher_file
    cfg = small_cfg()
    cfg.DISTILL.TEACHER = "c3_8"
    cfg.DISTILL.WEIGHTS = str(path)
    cfg.DISTILL.TEMPERATURE = 3.0
    cfg.DISTILL.ALPHA = 0.7
    torch.manual_seed(1)
    student = build_model(cfg)
    images, labels = make_arrays(6)
    losses = student({"image": images, "label": labels})
    x = (images.float() - 100) / 50
    student_logits, teacher_logits = student.network(x), teacher.network(x)
    cross_entropy = nn.functional.cross_entropy(student_logits, labels)
    assert torch.allclose(losses["loss_cls"], 0.3 * cross_entropy)
    expected = 0.7 * distillation_loss(student_logits, teacher_logits, 3.0)
    assert torch.allclose(losses["loss_distill"], expected)
    # The teacher neither trains nor enters the student's checkpoint.
    assert len(list(student.parameters())) == len(list(teacher.parameters()))
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert not student.extra_losses["loss_distill"].teacher.training
    student.eval()
    student.train()
    assert not student.extra_losses["loss_distill"].teacher.training


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(teacher_file):
    path, teacher = teacher_file
    cfg = small_cfg()
    cfg.DISTILL.TEACHER = cfg.MODEL.CLASSIFIER.NAME
    cfg.DISTILL.WEIGHTS = str(path)
    cfg.DISTILL.TEMPERATURE = 1.0
    student = build_model(cfg)
    student.load_state_dict(teacher.state_dict())
    images, labels = make_arrays(6)
    loss = student({"image": images, "label": labels})["loss_distill"]
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_teacher_that_is_missing_or_another(tmp_path, teacher_file):
    path, _ = teacher_file
    network = build_model(small_cfg()).network
    for missing in ("", str(tmp_path / "none.pth")):
        with pytest.raises(UserError, match="Train the teacher first"):
            load_teacher(network, missing)
    with pytest.raises(ValueError, match="is no checkpoint of a Sequential teacher"):
        load_teacher(nn.Sequential(nn.Linear(2, 2)), str(path))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_teacher(network, str(path))


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_teachers_file_is_executed(tmp_path):
    torch.save({"model": Touch(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_teacher(nn.Linear(2, 2), str(tmp_path / "evil.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("t", "alpha"), [(0, 0.5), (-1, 0.5), (1, -0.1), (1, 1.1)])
def test_distillation_out_of_range(t, alpha):
    with pytest.raises(ValueError, match="DISTILL"):
        Distillation(nn.Identity(), t, alpha)


def test_negative_orthogonality_loss():
    with pytest.raises(ValueError, match="ORTHO_LOSS is -0.1. Set 0 or more"):
        OrthogonalityLoss(nn.Identity(), -0.1)


def test_masks_take_the_smallest_of_each_layer():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    network[0].weight.data = torch.tensor([-0.1, 0.2]).view(2, 1, 1, 1)
    network[3].weight.data = torch.tensor([[10.0, -30.0], [20.0, -5.0]])
    masks = sparsity_masks(network, 0.5)
    assert {name: mask.flatten().tolist() for name, mask in masks.items()} == {
        "0.weight": [False, True],
        "3.weight": [False, True, True, False],
    }


class ConstantLoader:
    def __iter__(self):
        images, labels = make_arrays(8)
        while True:
            yield {"image": images, "label": labels}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def dsd_trainer(hook, build_optimizer=sgd):
    torch.manual_seed(0)
    model = build_model(small_cfg())
    trainer = SimpleTrainer(model, ConstantLoader(), build_optimizer(model.parameters()))
    trainer.register_hooks([hook])
    return trainer


def zeros(trainer):
    return {
        name: int((p == 0).sum())
        for name, p in trainer.model.named_parameters()
        if name.endswith("weight")
    }


def test_dense_sparse_dense_and_resumption_in_the_sparse_part():
    sizes = {
        n: p.numel() for n, p in build_model(small_cfg()).named_parameters() if p.dim() in (2, 4)
    }
    whole = dsd_trainer(DenseSparseDenseHook(3, 4, 0.3))
    seen = []

    run_step = whole.run_step

    def run_and_watch():
        run_step()
        seen.append(zeros(whole))

    whole.run_step = run_and_watch
    whole.train(0, 10)
    none = dict.fromkeys(sizes, 0)
    third = {name: int(0.3 * size) for name, size in sizes.items()}
    assert seen[:3] == [none] * 3
    assert seen[3:7] == [third] * 4
    # Where a ReLU is silent on this batch nothing moves what came back.
    assert all(now[name] < third[name] / 2 for now in seen[7:] for name in third)

    first = dsd_trainer(DenseSparseDenseHook(3, 4, 0.3))
    first.train(0, 5)
    state = {"trainer": first.state_dict(), "model": first.model.state_dict()}
    state["trainer"]["iteration"] = 4
    second = dsd_trainer(DenseSparseDenseHook(3, 4, 0.3))
    second.model.load_state_dict(state["model"])
    second.load_state_dict(state["trainer"])
    second.train(5, 10)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1)


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=0.002, momentum=0.5)


def clipped(parameters):
    cfg = small_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.05
    return maybe_add_gradient_clipping(cfg, sgd(parameters))


@pytest.mark.parametrize("build_optimizer", [sgd, adam, rmsprop, clipped])
@pytest.mark.parametrize("resumed_at", [None, 5])
def test_the_sparse_part_is_that_of_a_sparse_network(build_optimizer, resumed_at):
    """Beside a loop that masks weights, their state, and gradients as soon as they are there."""
    trainer = dsd_trainer(DenseSparseDenseHook(3, 4, 0.3), build_optimizer)
    if resumed_at is None:
        trainer.train(0, 10)
    else:
        trainer.train(0, resumed_at)
        state = copy.deepcopy((trainer.model.state_dict(), trainer.state_dict()))
        trainer = dsd_trainer(DenseSparseDenseHook(3, 4, 0.3), build_optimizer)
        trainer.model.load_state_dict(state[0])
        trainer.load_state_dict(state[1])
        trainer.train(resumed_at, 10)

    torch.manual_seed(0)
    model = build_model(small_cfg())
    weights = [p for p in model.parameters() if p.dim() > 1]
    optimizer = build_optimizer(model.parameters())
    images, labels = make_arrays(8)
    first, second = ("momentum_buffer", "exp_avg"), ("exp_avg_sq", "square_avg")
    for iteration in range(10):
        states = [(w, key, s) for w in weights for key, s in optimizer.state[w].items()]
        if iteration == 3:
            kept = {}
            for w in weights:
                count = int(0.3 * w.numel())
                kept[w] = w.detach().abs() > w.detach().abs().flatten().kthvalue(count).values
                w.data *= kept[w]
            for w, _, s in (entry for entry in states if entry[1] in first + second):
                s *= kept[w]
        if iteration == 7:  # the returned ones scale their steps as their neighbours do
            for w, _, s in (entry for entry in states if entry[1] in second):
                s[~kept[w]] = s[kept[w]].mean()
        optimizer.zero_grad()
        model({"image": images, "label": labels})["loss_cls"].backward()
        if 3 <= iteration < 7:
            for w in weights:
                w.grad *= kept[w]
        optimizer.step()
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_dense_sparse_dense_that_ends_sparse():
    hook = DenseSparseDenseHook(6, 3, 0.3)
    hook.check_fits(10)
    for max_iter in (9, 6, 5):
        with pytest.raises(ValueError, match=rf"6 \+ 3 = 9 .* ends after {max_iter}\."):
            hook.check_fits(max_iter)


@pytest.mark.parametrize("arguments", [(0, 5, 0.3), (5, 0, 0.3), (5, 5, 0), (5, 5, 1)])
def test_dense_sparse_dense_out_of_range(arguments):
    with pytest.raises(ValueError, match="DSD"):
        DenseSparseDenseHook(*arguments)


def test_dense_sparse_dense_resumed_without_masks_is_refused():
    """A checkpoint made without DSD, in the part that would have to be sparse."""
    trainer = dsd_trainer(DenseSparseDenseHook(3, 4, 0.3))
    with pytest.raises(ValueError, match="resumes at iteration 5, in the sparse part of DSD"):
        trainer.train(5, 10)
    trainer = dsd_trainer(DenseSparseDenseHook(3, 4, 0.3))
    trainer.train(7, 10)  # behind it


def test_sparse_part_resumed_without_dense_sparse_dense_is_refused(tmp_path):
    register_corners()
    cfg = small_cfg(str(tmp_path))
    trainer = ClassificationTrainer(cfg)
    state = trainer.state_dict()
    state.setdefault("hooks", {})["DenseSparseDenseHook"] = {"masks": {"a": torch.ones(1)}}
    with pytest.raises(ValueError, match="DSD.ENABLED is False. Resume with DSD"):
        trainer.load_state_dict(state)


def test_dense_sparse_dense_resumed_with_other_settings_is_refused():
    state = DenseSparseDenseHook(3, 4, 0.3).state_dict()
    told = r"DSD.SPARSE_ITERS was 4, is 5; DSD.SPARSITY was 0.3, is 0.4\). Resume with the same"
    with pytest.raises(ValueError, match=told):
        DenseSparseDenseHook(3, 5, 0.4).load_state_dict(state)
