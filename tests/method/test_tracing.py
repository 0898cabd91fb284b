"""Around a filter: norms and readers, found in real architectures."""

from __future__ import annotations

import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from repr_det.method.graph import reader_of
from repr_det.method.removal import Removable
from repr_det.method.tracing import trace
from tests.device import DEVICE
from tests.method.found import dead_channels
from tests.method.nets import NETS, PreActivation, Residual, batch, chain, loss, net


def norm_names(graph, conv):
    return [link.name for link in graph.norms.get(conv, [])]


def one_to_one(link, width):
    every = torch.arange(width)
    return torch.equal(link.filters, every) and torch.equal(link.channels, every)


WIDTH = 12

LAYOUTS = {
    "channel by channel": lambda c: [("a", c)],
    "pixels of a map": lambda c: [("a", c // 4)],
    "channels of all pixels": lambda c: [("a", c % 4)],
    "shuffled": lambda c: [("ab"[c % 2], c // 2)],
    "unshuffled": lambda c: [("a", c % 6 * 2 + c // 6)],
    "several of one layer": lambda c: [("a", c // 2 + 6), ("a", c // 2)],
    "two of one layer, far apart": lambda c: [("a", c // 2), ("a", c // 2 + 6)],
    "backwards": lambda c: [("a", WIDTH - 1 - c)],
    "a sum": lambda c: [("a", c), ("b", c)],
    "side by side": lambda c: [("ab"[c // 6], c % 6)],
    "padded": lambda c: [("a", c)] if 3 <= c < 9 else [],
    "unknown": lambda c: None if c % 5 == 2 else [("a", c)],
    "of a layer that stays": lambda c: [("a", c), ("c", c)] if c % 3 else [("a", c)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_is_dead_while_all_its_filters_are_pruned(layout):
    sources = [LAYOUTS[layout](channel) for channel in range(WIDTH)]
    made_of = tuple(None if some is None else frozenset(some) for some in sources)
    reader = reader_of("reader", nn.Conv2d(WIDTH, 1, 1), made_of)
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(20):
        pruned = {name: torch.rand(WIDTH, generator=generator) < 0.7 for name in "ab"}
        expected = [
            bool(some) and all(name in pruned and bool(pruned[name][i]) for name, i in some)
            for some in sources
        ]
        assert reader.dead(pruned).tolist() == expected
        found += sum(expected)
    assert found > 20


def test_layer_that_reads_nothing():
    assert reader_of("reader", nn.Conv2d(1, 1, 1), ()).dead({}).shape == (0,)


# --- Detectron2


def detector(config, *options):
    model_zoo = pytest.importorskip("detectron2.model_zoo")
    from detectron2.modeling import build_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = model_zoo.get_config(config)
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *options])
        return build_model(cfg)


@pytest.fixture(scope="module")
def fpn():
    return trace(detector("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))


@pytest.fixture(scope="module")
def c4():
    return trace(detector("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"))


@pytest.fixture(scope="module")
def retinanet():
    return trace(detector("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))


@pytest.mark.parametrize("name", ["fpn", "c4", "retinanet"])
def test_detectron2_pairs_every_frozen_norm_with_its_conv(name, request):
    graph = request.getfixturevalue(name)
    body = [n for n in graph.convs if ".bottom_up." in n or n.startswith("backbone.res")]
    body += [n for n in graph.convs if n.startswith("roi_heads.res5")] + ["backbone.stem.conv1"]
    paired = [n for n in body if n in graph.convs]
    # ResNet-50: 53 convs with a norm each; those of C4's stem and res5 lie under other names.
    assert len(set(paired)) == 53
    for conv in paired:
        (link,) = graph.norms[conv]
        assert link.name == f"{conv}.norm"
        assert type(link.module).__name__ == "FrozenBatchNorm2d"
        assert one_to_one(link, graph.convs[conv].out_channels)


def test_detectron2_stem_and_prediction_layers(fpn, retinanet):
    assert fpn.stems == {"backbone.bottom_up.stem.conv1"}
    assert fpn.heads == {
        "proposal_generator.rpn_head.objectness_logits", "proposal_generator.rpn_head.anchor_deltas"
    }  # fmt: skip
    assert retinanet.heads == {"head.cls_score", "head.bbox_pred"}


def test_fpn_inside_a_bottleneck(fpn):
    conv = "backbone.bottom_up.res3.1.conv"
    assert dead_channels(fpn, {f"{conv}1": [3, 7]}) == {f"{conv}2": [3, 7]}
    assert dead_channels(fpn, {f"{conv}2": [5]}) == {f"{conv}3": [5]}


def test_fpn_residual_sum_is_silent_only_where_all_parties_are(fpn):
    stage = "backbone.bottom_up.res2."
    parties = ["0.shortcut", "0.conv3", "1.conv3", "2.conv3"]
    everyone = {f"{stage}{party}": [4] for party in parties}
    some = {f"{stage}{party}": [4] for party in parties[:2]}
    # Two parties: the sum behind the first block; all four: whatever reads the stage.
    assert dead_channels(fpn, some) == {f"{stage}1.conv1": [4]}
    assert dead_channels(fpn, everyone) == {
        f"{stage}1.conv1": [4], f"{stage}2.conv1": [4], "backbone.fpn_lateral2": [4],
        "backbone.bottom_up.res3.0.conv1": [4], "backbone.bottom_up.res3.0.shortcut": [4],
    }  # fmt: skip
    assert dead_channels(fpn, {f"{stage}0.conv3": [4]}) == {}


def test_fpn_top_down_sum(fpn):
    lateral = "backbone.fpn_lateral"
    assert dead_channels(fpn, {f"{lateral}5": [9]}) == {"backbone.fpn_output5": [9]}
    assert dead_channels(fpn, {f"{lateral}4": [9]}) == {}
    assert dead_channels(fpn, {f"{lateral}5": [9], f"{lateral}4": [9]}) == {
        "backbone.fpn_output5": [9], "backbone.fpn_output4": [9]
    }  # fmt: skip


def test_fpn_levels_share_their_readers(fpn):
    """RPN and box head read all levels with one weight: silent only if silent in every level."""
    output = "backbone.fpn_output"
    rpn, box = "proposal_generator.rpn_head.conv", "roi_heads.box_head.fc1"
    levels = {f"{output}{i}": [2] for i in (2, 3, 4)}
    assert dead_channels(fpn, levels) == {}
    # The boxes are pooled from levels 2 to 5 into 7 x 7, flattened channel by channel.
    everywhere = levels | {f"{output}5": [2]}
    assert dead_channels(fpn, everywhere) == {rpn: [2], box: list(range(2 * 49, 3 * 49))}


def test_c4_box_head_reads_res4(c4):
    stage = [
        n for n in c4.convs if n.startswith("backbone.res4") and n.endswith(("conv3", "shortcut"))
    ]
    assert len(stage) == 7
    found = dead_channels(c4, {name: [11] for name in stage})
    assert found["roi_heads.res5.0.conv1"] == found["roi_heads.res5.0.shortcut"] == [11]
    assert found["proposal_generator.rpn_head.conv"] == [11]
    last = [f"roi_heads.res5.{n}" for n in ("0.shortcut", "0.conv3", "1.conv3", "2.conv3")]
    found = dead_channels(c4, {name: [6] for name in last})
    # Pooled over positions before the predictor reads it.
    assert found["roi_heads.box_predictor.cls_score"] == [6]
    assert found["roi_heads.box_predictor.bbox_pred"] == [6]


def test_retinanet_head_is_shared_between_levels(retinanet):
    assert dead_channels(retinanet, {"head.cls_subnet.0": [1]}) == {"head.cls_subnet.2": [1]}
    levels = [f"backbone.fpn_output{i}" for i in (3, 4, 5)]
    levels += ["backbone.top_block.p6", "backbone.top_block.p7"]
    found = dead_channels(retinanet, {name: [8] for name in levels})
    assert found["head.cls_subnet.0"] == found["head.bbox_subnet.0"] == [8]
    assert "head.cls_subnet.0" not in dead_channels(retinanet, {name: [8] for name in levels[:-1]})


# --- torchvision


def classifier(name, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(torchvision.models, name)(weights=None, **arguments)


def test_resnet18():
    graph = trace(classifier("resnet18"))
    assert len(graph.convs) == 20
    assert graph.stems == {"conv1"}
    assert graph.heads == set()
    assert norm_names(graph, "layer2.0.downsample.0") == ["layer2.0.downsample.1"]
    for conv in graph.convs:
        (link,) = graph.norms[conv]
        assert one_to_one(link, graph.convs[conv].out_channels)
    assert dead_channels(graph, {"layer1.0.conv1": [0]}) == {"layer1.0.conv2": [0]}
    last = ["layer4.0.downsample.0", "layer4.0.conv2", "layer4.1.conv2"]
    assert dead_channels(graph, {name: [5] for name in last})["fc"] == [5]


def test_vgg16_linear_layer_reads_the_flattened_map():
    graph = trace(classifier("vgg16", init_weights=False))
    assert len(graph.convs) == 13
    assert graph.norms == {}
    assert dead_channels(graph, {"features.28": [1]}) == {"classifier.0": list(range(49, 98))}
    assert dead_channels(graph, {"features.0": [3]}) == {"features.2": [3]}


def test_googlenet_auxiliary_heads_run_only_in_training():
    graph = trace(classifier("googlenet", init_weights=False))
    assert "aux1.conv.conv" in graph.convs
    assert norm_names(graph, "aux1.conv.conv") == ["aux1.conv.bn"]
    # Concatenation of four branches: 64, 128, 32, 32 channels.
    found = dead_channels(graph, {"inception3a.branch2.1.conv": [10]})
    for branch in ("branch1.conv", "branch2.0.conv", "branch3.0.conv", "branch4.1.conv"):
        assert found[f"inception3b.{branch}"] == [74]
    found = dead_channels(graph, {"inception4a.branch1.conv": [0]})
    assert found["aux1.conv.conv"] == [0]


def test_auxiliary_heads_of_a_model_that_trains_on_real_batches_only():
    network = classifier("googlenet", init_weights=False)

    class NeedsLabels(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, labels=None):
            if self.training and labels is None:
                raise ValueError("no labels")
            return self.network(x)

    model = NeedsLabels()
    graph = trace(model, lambda: model(torch.zeros(2, 3, 64, 64), labels=1))
    found = dead_channels(graph, {"network.inception4a.branch1.conv": [0]})
    assert found["network.aux1.conv.conv"] == [0]


def test_gates_are_what_a_sigmoid_alone_reads():
    graph = trace(classifier("mobilenet_v3_small"))
    gates = {name for name in graph.convs if name.endswith("fc2")}
    assert len(gates) == 9 and graph.gates == gates

    class Swish(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = self.b(self.a(x))
            return self.c(y * y.sigmoid())

    assert trace(Swish()).gates == set()


def test_mobilenet_depthwise_keeps_a_channel_in_its_place():
    graph = trace(classifier("mobilenet_v2"))
    block = "features.3.conv."
    assert graph.convs[f"{block}1.0"].groups == 144
    # The depthwise conv has filters of its own: it is a reader, and the channel ends there.
    assert dead_channels(graph, {f"{block}0.0": [7]}) == {f"{block}1.0": [7]}
    assert dead_channels(graph, {f"{block}1.0": [7]}) == {f"{block}2": [7]}


def test_densenet_filters_are_read_through_norms_of_all_later_layers():
    graph = trace(classifier("densenet121"))
    conv = "features.denseblock1.denselayer1.conv2"
    links = graph.norms[conv]
    layers = [f"features.denseblock1.denselayer{i}.norm1" for i in range(2, 7)]
    assert [link.name for link in links] == [*layers, "features.transition1.norm"]
    for link in links:
        assert torch.equal(link.channels, torch.arange(64, 96))
        assert torch.equal(link.filters, torch.arange(32))
    found = dead_channels(graph, {conv: [1]})
    assert found == {
        **{f"features.denseblock1.denselayer{i}.conv1": [65] for i in range(2, 7)},
        "features.transition1.conv": [65],
    }


@pytest.mark.parametrize(
    "name", ["shufflenet_v2_x0_5", "efficientnet_b0", "squeezenet1_0", "mnasnet0_5"]
)
def test_what_is_said_to_be_silent_is_silent(name):
    """Prune a tenth of every layer; each reader's dead inputs must be zero when the model runs."""
    torch.manual_seed(0)
    model = classifier(name).eval()
    graph = trace(model)
    masks = {}
    with torch.no_grad():
        for conv, module in graph.convs.items():
            masks[conv] = torch.arange(module.out_channels) % 10 == 3
            module.weight[masks[conv]] = 0
            if module.bias is not None:
                module.bias[masks[conv]] = 0
            for link in graph.norms.get(conv, []):
                channels = link.channels_of(masks[conv])
                link.module.weight[channels] = link.module.bias[channels] = 0
    dead = {r.name: r.dead(masks) for r in graph.readers.values()}
    assert sum(int(d.sum()) for d in dead.values()) > 20
    seen = []

    def check(reader_name):
        def hook(module, args):
            x = args[0].transpose(0, 1) if args[0].dim() > 2 else args[0].T
            assert x[dead[reader_name]].abs().sum() == 0, reader_name
            seen.append(reader_name)

        return hook

    for reader_name, reader in graph.readers.items():
        reader.module.register_forward_pre_hook(check(reader_name))
    model(torch.randn(1, 3, 64, 64))
    assert len(set(seen)) == len(graph.readers)


# --- small networks


class Shortcut(nn.Module):
    """A residual block whose shortcut halves the map and pads channels with zeros (option A)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.conv1(self.stem(x))
        padded = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.last(F.relu(self.norm2(self.conv2(x)) + padded))


def test_padded_channels_are_zero():
    graph = trace(Shortcut())
    # Channels 0, 1, 6, 7 of the sum are conv2's alone; 2 to 5 are conv1's 0 to 3 as well.
    assert dead_channels(graph, {"conv2": [0, 3, 7]}) == {"last": [0, 7]}
    assert dead_channels(graph, {"conv2": [0, 3], "conv1": [1]}) == {"last": [0, 3], "conv2": [1]}


def written_beside(y, x):
    padded = torch.zeros_like(y)
    padded[:, :2] = x[:, :2]
    return y + padded


def added_in_place(y, x):
    y = y.clone()
    y[:, :2] += x[:, :2]
    return y


def replaced_in_place(y, x):
    y = y.clone()
    y[:, :2] = x[:, :2]
    return y


@pytest.mark.parametrize("combine", [written_beside, added_in_place, replaced_in_place])
def test_tensor_that_is_written_into_through_a_view(combine):
    class Into(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.last(self.norm(combine(self.conv(x), x)))

    graph = trace(Into())
    # Channel 0 of what `last` reads is the stem's as well, whatever `conv` gives.
    assert dead_channels(graph, {"conv": [0]}) == {}
    assert norm_names(graph, "conv") == norm_names(graph, "stem") == []
    assert graph.stems == {"stem"}


@pytest.mark.parametrize("widths", [(8, 16, 24), (16, 16, 16)])
def test_weights_that_are_computed_at_every_access(widths):
    a, b, c = widths
    convs = [nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 1), nn.Conv2d(b, c, 1), nn.Conv2d(c, 2, 1)]
    convs[1:3] = map(nn.utils.parametrizations.weight_norm, convs[1:3])
    graph = trace(nn.Sequential(*convs))
    assert list(graph.readers) == ["0", "1", "2", "3"]
    assert [len(reader.unknown) for reader in graph.readers.values()] == [3, *widths]


@pytest.mark.parametrize("keep", ["hook", "attribute"])
def test_channels_that_someone_keeps_stay(keep):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = F.relu(self.a(x))
            if keep == "attribute":
                self.features = y
            return self.c(self.b(y))

    model, kept = Keeps(), {}
    if keep == "hook":
        model.a.register_forward_hook(lambda module, args, out: kept.update(features=out))
    every = {name: torch.ones(4, dtype=torch.bool) for name in ("a", "b")}
    assert list(Removable(trace(model)).choose(every).filters) == ["b"]


def test_weight_shared_by_two_convs_is_one_reader_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.one(self.a(x)) + self.two(self.b(x))

    graph = trace(Twice())
    assert dead_channels(graph, {"a": [1]}) == {}
    assert dead_channels(graph, {"a": [1], "b": [1]}) == {"one": [1]}


def test_conv_that_runs_twice_reads_both():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(self.conv(self.stem(x)))

    graph = trace(Again())
    assert dead_channels(graph, {"stem": [2]}) == dead_channels(graph, {"conv": [2]}) == {}
    assert dead_channels(graph, {"stem": [2], "conv": [2]}) == {"conv": [2]}


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 6), nn.BatchNorm2d(6), nn.InstanceNorm2d(6, affine=True)]
)
def test_norms_of_all_kinds_are_paired(norm):
    graph = trace(nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.ReLU(), nn.Conv2d(6, 2, 1)))
    assert norm_names(graph, "0") == ["1"]
    assert dead_channels(graph, {"0": [5]}) == {"3": [5]}


def test_norm_that_mixes_channels_without_a_scale_hides_what_is_behind_it():
    norm = nn.GroupNorm(2, 6, affine=False)
    graph = trace(nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.ReLU(), nn.Conv2d(6, 2, 1)))
    assert dead_channels(graph, {"0": [5]}) == {}


def test_layer_norm_over_the_last_dimension():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 5, 1), nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x):
            return self.linear(self.norm(self.conv(x).permute(0, 2, 3, 1)))

    graph = trace(Last())
    (link,) = graph.norms["conv"]
    assert (link.name, link.dim) == ("norm", 3)
    assert dead_channels(graph, {"conv": [4]}) == {"linear": [4]}


def test_norm_after_a_sum_belongs_to_no_conv():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.last(self.norm(self.a(x) + self.b(x)))

    graph = trace(Sum())
    assert graph.norms == {}
    # Its beta would let a constant through.
    assert dead_channels(graph, {"a": [1], "b": [1]}) == {}


class Outside(nn.Module):
    """Looks like a conv and computes where torch's dispatcher cannot see it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size, self.groups = inputs, outputs, 1, 1
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        values = torch.einsum("oi,nihw->nohw", self.weight[:, :, 0, 0], x).detach().numpy().copy()
        return self.norm(torch.from_numpy(values))


def test_conv_class_that_runs_outside_the_dispatcher():
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), Outside(4, 6), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    assert norm_names(graph, "1") == ["1.norm"]
    assert dead_channels(graph, {"1": [5]}) == {"3": [5]}
    assert dead_channels(graph, {"0": [2]}) == {"1": [2]}


def test_operation_that_wakes_zeros_hides_what_is_behind_it():
    class Shifted(nn.Module):
        def __init__(self, operation):
            super().__init__()
            self.a, self.b, self.operation = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), operation

        def forward(self, x):
            return self.b(self.operation(self.a(x)))

    for operation in (
        torch.sigmoid,
        lambda x: x + 1,
        torch.exp,
        lambda x: x.flip(1),
        lambda x: x**0,
    ):
        assert dead_channels(trace(Shifted(operation)), {"a": [1]}) == {}
    for operation in (torch.tanh, lambda x: 2 * x, F.silu, lambda x: x * torch.sigmoid(x.mean())):
        assert dead_channels(trace(Shifted(operation)), {"a": [1]}) == {"b": [1]}


# --- how the model is run


class Counts(nn.Module):
    """Makes and moves a number of its own, as RetinaNet does with its loss normaliser."""

    def forward(self, x):
        self.normalizer = 0.9 * getattr(self, "normalizer", 100.0) + 1.0
        return x


def test_trace_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(chain(), nn.Dropout(0.5), Counts())
    model.train()
    model[0][1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    trace(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.grad is None for p in model.parameters())


def test_compiled_parts_are_seen():
    model = Residual()
    expected = trace(model)
    model.block1 = torch.compile(model.block1, backend="eager")
    model.block2.compile(backend="eager")
    found = trace(model)
    assert list(found.convs) == list(expected.convs)
    assert {c: norm_names(found, c) for c in found.convs} == {
        c: norm_names(expected, c) for c in expected.convs
    }


def test_dense_block_readers():
    graph = trace(PreActivation(growth=4, layers=3))
    assert [link.name for link in graph.norms["convs.0"]] == ["norms.1", "norms.2", "norms.3"]
    assert dead_channels(graph, {"convs.0": [1]}) == {"convs.1": [7], "convs.2": [7], "linear": [7]}


class Particular(nn.Module):
    """Takes a pair, so no example image fits it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, pair):
        return self.second(self.first(pair.image)) * pair.factor


def test_model_that_cannot_be_run_is_told():
    with pytest.raises(ValueError, match="could not run Particular on an example image .*batches="):
        trace(Particular())
    pair = SimpleNamespace(image=torch.zeros(1, 3, 4, 4), factor=2.0)
    model = Particular()
    assert dead_channels(trace(model, lambda: model(pair)), {"first": [1]}) == {"second": [1]}


def test_model_without_layers_is_told():
    with pytest.raises(ValueError, match="needs conv or linear layers, but LayerNorm has none"):
        trace(nn.LayerNorm(3))


def test_training_mode_that_fails_leaves_what_evaluation_showed():
    class OnlyEvaluates(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = self.a(x)
            if self.training:
                self.a(y[:, :3])
                raise RuntimeError("needs targets")
            return self.b(y)

    graph = trace(OnlyEvaluates())
    assert dead_channels(graph, {"a": [0]}) == {"b": [0]}
    assert graph.stems == {"a"}


def test_intermediate_results_do_not_pile_up():
    """A large batch is followed in the memory that running it needs."""
    results, alive = [], []

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(20))

        def forward(self, x):
            for conv in self.convs:
                x = F.relu(conv(x) + 0.0 * x)
                results.append(weakref.ref(x))
                alive.append(sum(result() is not None for result in results))
            return x

    trace(Deep())
    assert len(alive) >= 20
    assert max(alive) <= 2


def everything_found(graph):
    """What :func:`trace` found, as plain values."""
    found = {
        name: getattr(graph, name)
        for name in ("visible", "stems", "heads", "gates", "unsuitable", "partly", "not_run")
    }
    found |= {name: list(getattr(graph, name)) for name in ("convs", "linears")}
    found["norms"] = {
        conv: [(link.name, link.filters.tolist(), link.channels.tolist()) for link in links]
        for conv, links in graph.norms.items()
    }
    found["readers"] = {
        name: (
            reader.unknown.tolist(),
            {of: [x.tolist() for x in both] for of, both in reader.filters.items()},
        )
        for name, reader in graph.readers.items()
    }
    for name in ("groups", "fixed"):
        found[name] = {conv: value.tolist() for conv, value in getattr(graph, name).items()}
    return found


@pytest.mark.parametrize("name", NETS)
def test_autocast_changes_nothing_of_what_is_found(name):
    """It hands each conv a copy of its weight, and not the weight."""
    model, data = net(name, torch.float32), batch(0, torch.float32)

    def in_mixed_precision():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return loss(model, data)

    plain = everything_found(trace(model, lambda: loss(model, data)))
    assert any(filters for _, filters in plain["readers"].values())
    assert everything_found(trace(model, in_mixed_precision)) == plain


@pytest.mark.parametrize("written", [None, "itself", "a view"])
def test_a_cast_weight_that_is_written_into_is_another(written):
    class Shifted(nn.Conv2d):
        def forward(self, x):
            weight = self.weight.double()
            if written:
                (weight if written == "itself" else weight[:]).add_(1.0)
            return F.conv2d(x.double(), weight).float()

    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), Shifted(4, 4, 1), nn.Conv2d(4, 2, 1)))
    assert ("1" in graph.unsuitable) == bool(written)
