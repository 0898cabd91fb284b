"""Follows every channel through a real run of a model.

Shows which norm follows a layer and which layers and operations read its channels. :func:`trace`
runs the model under a :class:`_Tracer`, which notes in a :class:`Found` what it sees.
:func:`_graph` makes a graph of the notes. What operations do with channels is in
:mod:`repr_det.method.channels`.

Symbolic tracing fails, since Detectron2's backbones branch on their inputs. Types and names of
modules say too little: Detectron2's FrozenBatchNorm2d is no torch BatchNorm.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from repr_det.errors import UserError
from repr_det.method.channels import (
    CONTRACTIONS,
    CONVOLUTIONS,
    GATES,
    PARTS,
    PRODUCTS,
    READS,
    SHAPE_ONLY,
    SHIFTS,
    Call,
    Channels,
    Filter,
    Sources,
    Tag,
    filters_of,
    infinite_at_zero,
    is_own_norm,
    keeps_places,
    merged,
)
from repr_det.method.examples import Example, examples
from repr_det.method.found import Found
from repr_det.method.graph import ChannelGraph, Reader, groups_of, reader_of, visible_units
from repr_det.method.layers import NormLink, column_layout
from repr_det.method.modules import (
    eager,
    is_conv,
    is_norm,
    is_plain_linear,
    mixes_channels,
    named_modules,
    norm_channels,
    num_filters,
    unchanged,
    unwrap,
    with_input,
)
from repr_det.method.origins import FUNCTIONAL, Origin, share_memory, tensors_in, together
from repr_det.method.sharing import (
    irregular_layers,
    names_and_holders,
    overlaid_layers,
    shared_layers,
)
from repr_det.method.trials import counts_channels, is_per_filter, is_silent, keeps_zeros


@dataclass
class _OpenConv:
    """A conv whose forward is running.

    Attributes:
        name: of the conv.
        input: the tag of its input.
        seen: whether its convolution has passed through the dispatcher.
    """

    name: str
    input: Tag | None
    seen: bool = False


class _Tracer(TorchDispatchMode):
    """Follows channels through several runs of a model.

    Module hooks mark where a conv, a norm or a linear layer begins and ends. All other operations
    on tensors pass through :meth:`__torch_dispatch__`.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(named_modules(model))
        self.convs = {n: m for n, m in self.modules.items() if is_conv(m)}
        self.linears = {n: m for n, m in self.modules.items() if is_plain_linear(m)}
        self.spatial = {n: m.weight.dim() - 2 for n, m in self.convs.items()}
        self.parameters, self.holders = names_and_holders(self.modules)
        self.shared = shared_layers(self.modules, self.holders)
        self.found = Found(
            irregular=irregular_layers(self.modules, self.shared),
            borrowed=overlaid_layers(self.modules),
        )
        self._own = {n: [*map(id, m._parameters.values())] for n, m in self.modules.items()}
        # By identity, and weak: to keep all tensors of a batch would need more memory than a
        # training step.
        self._tags: MutableMapping[Tensor, Tag] = WeakTensorKeyDictionary()
        self._origins: MutableMapping[Tensor, Origin] = WeakTensorKeyDictionary()
        # The further results of an operation (the indices of a pooling) have the channels of the
        # first, but are not zero. The value is the first's tag. It is pinned where they are used.
        self._companions: MutableMapping[Tensor, Tag] = WeakTensorKeyDictionary()
        # Copies of parameters in another precision, as autocast makes them.
        self._casts: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._open: list[_OpenConv] = []
        self._inside = 0  # number of norms and linear layers that are running

    def run(self, model: nn.Module, run: Callable[[], Any], training: bool) -> None:
        """Follow one run. A run that fails leaves no trace in :attr:`found`."""
        before = self.found.copy()
        try:
            with unchanged(model), torch.no_grad(), eager(), self._watching():
                model.train(training)
                output = run()
                self._lose_all("the output of the model", output)
                self._lose_what_is_kept()
        except BaseException:
            self.found = before
            raise
        finally:
            self._open.clear()
            self._inside = 0
            for notes in (self._tags, self._origins, self._companions, self._casts):
                notes.clear()

    # --- what is known of a tensor

    def _tag(self, tensor: Any) -> Tag | None:
        return self._tags.get(tensor) if isinstance(tensor, Tensor) else None

    def _set_tag(self, tensor: Tensor, tag: Tag | None) -> None:
        if tag is None:
            self._tags.pop(tensor, None)
        else:
            self._tags[tensor] = tag

    def _lose_all(self, what: str, values: Any) -> None:
        """Lose the channels of all tensors in some values, attributes of objects included.

        Args:
            what: what they go into, for messages.
            values: tensors, containers and objects.
        """
        seen: set[int] = set()
        waiting = tree_leaves(values)
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                self.found.lose(what, self._tag(value))
                self.found.pin(self._companions.get(value))
            elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
                waiting += tree_leaves(list(vars(value).values()))

    def _lose_what_is_kept(self) -> None:
        """Lose the channels of tensors that outlive the run: something may still use them.

        For example, a forward hook keeps features for a loss, or the model keeps an attribute. The
        output may be an object of any kind.
        """
        if self._tags or any(origin.weights for origin in self._origins.values()):
            gc.collect()  # nobody uses what only a cycle of references keeps
        self.found.lose("something that outlives the forward pass", *self._tags.values())
        for tensor, origin in self._origins.items():
            if origin.weights and tensor.numel() > 1:
                self.found.irregular |= origin.weights
        self.found.pin(*self._companions.values())

    def _origin(self, values: Any) -> Origin:
        return together(
            self._origins.get(tensor, Origin(weighted=id(tensor) in self.parameters))
            for tensor in tensors_in(values)
        )

    def _set_origin(self, values: Any, origin: Origin) -> None:
        for tensor in tensors_in(values):
            self._origins[tensor] = origin

    # --- layers

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Attach the module hooks, and follow operations."""
        hooks = ExitStack()
        for name, module in self.modules.items():
            if name in self.convs:
                enter, leave = self._enter_conv, self._leave_conv
            elif is_norm(module):
                enter, leave = self._enter_norm, self._leave_norm
            elif isinstance(module, nn.Linear):
                enter, leave = self._enter_linear, self._leave_linear
            elif any(True for _ in module.parameters(recurse=False)):
                enter, leave = None, self._leave_other
            else:
                continue
            if enter is not None:
                hook = with_input(enter, name)
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            hook = with_input(leave, name)
            # On linear layers and norms before the user's hooks, which may change their output.
            first = leave in (self._leave_linear, self._leave_norm)
            hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True, prepend=first))
        with hooks, self:
            yield

    def _has_other_users(self, name: str) -> bool:
        return name in self.found.irregular or name in self.shared

    def _enter(self, name: str, values: Any) -> None:
        """Record that a layer runs, and whether with its own parameters."""
        self.found.ran.add(name)
        self.found.irregular |= self._weights_in(values)
        present = [*map(id, self.modules[name]._parameters.values())]
        if present != self._own[name]:  # torch.func.functional_call
            self.found.borrowed.add(name)
            self.found.irregular.update(*(self.holders.get(one, ()) for one in present))

    def _enter_conv(self, name: str, x: Any, values: Any) -> None:
        module, tag, origin = self.modules[name], self._tag(x), self._origin(values)
        if self._has_other_users(name) or module.in_channels == module.groups:
            # In a depthwise conv each filter has one input channel, which must stay with it.
            self.found.pin(tag)
        self._enter(name, values)
        if isinstance(x, Tensor):
            self.found.shapes.setdefault(name, x.shape)
        if not origin.layers:
            self.found.stems.add(name)
        self.found.read |= origin.layers
        dim = x.dim() - self.spatial[name] - 1 if isinstance(x, Tensor) else 1
        self._add_input(name, tag, module.in_channels, dim)
        self._open.append(_OpenConv(name, tag))

    def _leave_conv(self, name: str, x: Any, values: Any, out: Any) -> None:
        seen = self._open.pop().seen
        if not seen and isinstance(out, Tensor):
            # The convolution ran outside of torch's dispatcher, as in a compiled extension.
            tag = self._fresh(name, out.dim() - self.spatial[name] - 1)
            self._set_tag(out, tag)
            self.found.pin(self._tag(x), tag)
        if self._tag(out) is None and not any(map(is_norm, self.modules[name].modules())):
            self.found.doubtful.add(name)
        self._set_origin(out, Origin(frozenset([name]), frozenset([name])))

    def _fresh(self, name: str, dim: int = 1) -> Tag:
        """The tag of the output of a conv or linear layer."""
        count = num_filters(self.modules[name])
        return Tag(dim, tuple(frozenset([(name, i)]) for i in range(count)))

    def _enter_linear(self, name: str, x: Any, values: Any) -> None:
        module = self.modules[name]
        self._enter(name, values)
        origin = self._origin(values)
        if not origin.layers and name in self.linears:
            self.found.stems.add(name)
        self.found.read |= origin.layers
        dim = x.dim() - 1 if isinstance(x, Tensor) else -1
        self._add_input(name, self._tag(x), module.in_features, dim)
        if name in self.linears:
            self._inside += 1
        else:
            self.found.irregular.add(name)
            self._lose_all(f"{name}, a linear layer with its own forward", values)
        if self._has_other_users(name):
            self.found.pin(self._tag(x))

    def _leave_linear(self, name: str, x: Any, values: Any, out: Any) -> None:
        self._set_origin(out, Origin(frozenset([name])))
        if name not in self.linears:
            self._lose_all(name, out)
            for tensor in tensors_in(out):
                self._set_tag(tensor, None)
            return
        self._inside -= 1
        if not self._inside:
            self._set_tag(out, self._fresh(name, out.dim() - 1))

    def _leave_other(self, name: str, x: Any, values: Any, out: Any) -> None:
        """Other modules with parameters are the origin of an output that comes from no layer."""
        if not self._inside and not self._origin(out).layers:
            self.found.read |= self._origin(values).layers
            self._set_origin(out, Origin(frozenset([name])))

    def _add_input(self, name: str, tag: Tag | None, width: int, dim: int) -> None:
        known = tag is not None and tag.dim == dim and len(tag.sources) == width
        sources = tag.sources if known else (None,) * width
        if not known:
            self.found.lose(f"the layer {name} in another shape", tag)
        if name in self.found.inputs:
            self.found.tie(self.found.inputs[name], sources)
            sources = merged(self.found.inputs[name], sources)
        self.found.inputs[name] = sources

    def _enter_norm(self, name: str, x: Any, values: Any) -> None:
        self._enter(name, values)
        self.found.used.update(self.parameters[id(p)] for p in self.modules[name].parameters())
        opened = self._open[-1] if self._open and not self._inside else None
        if opened is not None and not opened.seen and isinstance(x, Tensor) and not self._tag(x):
            # A norm inside a conv that runs outside of the dispatcher.
            self._set_tag(x, self._fresh(opened.name))
        self._inside += 1

    def _leave_norm(self, name: str, x: Any, values: Any, out: Any) -> None:
        if self._inside == 1:
            self._set_origin(out, self._origin(values))
            others = [self._tag(tensor) for tensor in tensors_in(values) if tensor is not x]
            self.found.lose(f"the norm {name}", *others)
            if isinstance(x, Tensor) and isinstance(out, Tensor) and x.shape == out.shape:
                self._set_tag(out, self._through_norm(name, x, self._tag(x), values))
            else:
                self._lose_all(f"the norm {name}", values)
        self._inside -= 1

    def _through_norm(self, name: str, x: Tensor, tag: Tag | None, values: Any) -> Tag | None:
        module = self.modules[name]
        width = norm_channels(module)
        known = (
            tag is not None and width == len(tag.sources) and counts_channels(module, x, tag.dim)
        )
        if not known:
            self.found.lose(f"the norm {name} in another shape", tag)
            self.found.mixed.update((name, channel) for channel in range(width or 0))
            return None
        if mixes_channels(module) or self._has_other_users(name):
            self.found.pin(tag)
        if mixes_channels(module) and getattr(module, "weight", None) is None:
            # Its statistics shift a zero channel, and there is no scale to hold at zero.
            self.found.lose(f"the norm {name} without a scale", tag)
            return None
        if name in self.found.borrowed or not keeps_zeros(module, x, tag.dim, *values):
            self.found.irregular.add(name)
            self.found.lose(f"the norm {name}, which does not keep zeros", tag)
        sources: list[Sources] = []
        for channel, source in enumerate(tag.sources):
            if source is None or len(source) != 1:
                self.found.lose(f"the norm {name} with others", Tag(tag.dim, (source,)))
                self.found.mixed.add((name, channel))
                sources.append(None)
                continue
            (conv, index) = next(iter(source))
            self.found.links[conv, name, channel] = index
            self.found.link_dims[conv, name] = tag.dim
            sources.append(source)
        return Tag(tag.dim, tuple(sources))

    # --- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        operation = func._schema.name if hasattr(func, "_schema") else ""
        weights = self._notice_use(args, kwargs, operation)
        if not operation:  # takes functions: torch.cond, flex_attention
            self._lose_all(str(func), (args, kwargs))
            out = func(*args, **kwargs)
            self._set_origin(out, self._origin((args, kwargs)))
            return out
        call = Call(func, args, kwargs, self._tag)
        origin = Origin(weighted=True, weights=weights) if weights else self._next_origin(call)
        tags = call.run()
        if call.op == "aten::_to_copy" and id(call["self"]) in self.parameters:
            self._casts[call.out] = call["self"]
        for tensor in call.written():
            self.found.irregular.update(self.holders.get(id(tensor), ()))
            for cast in [one for one in self._casts if share_memory(one, tensor)]:
                del self._casts[cast]  # no longer the parameter's values
        if call.op in CONVOLUTIONS and self._open:
            tags = [self._convolved(call)]
        else:
            self.found.pin(*call.pinned)
            for pair in call.tied:
                self.found.tie(*pair)
            if call.tied:
                tags = [self._without_sums(tag) for tag in tags]
            self._note_losses(call, tags)
        outputs = tensors_in(call.out)
        self._forget_written(call, outputs, origin)
        self._set_origin(outputs, origin)
        for tensor, tag in zip(outputs, tags, strict=False):
            self._set_tag(tensor, tag)
            if tag is None and tags[0] is not None:
                self._companions[tensor] = tags[0]
        return call.out

    def _without_sums(self, tag: Tag | None) -> Tag | None:
        """The tag without sums of units of linear layers: these are not followed."""
        if tag is None:
            return None
        sums = (s and len(s) > 1 and any(n in self.linears for n, _ in s) for s in tag.sources)
        alone = (None if is_sum else s for is_sum, s in zip(sums, tag.sources, strict=True))
        return Tag(tag.dim, tuple(alone))

    def _note_losses(self, call: Call, tags: list[Tag | None]) -> None:
        """Record layers with a filter that goes into an operation and not out of it."""
        known = [tag.sources for tag in tags if tag is not None]
        for tag in filter(None, infinite_at_zero(call)):
            self.found.unsuitable.update(name for name, _ in filters_of(tag.sources))
        if call.op in SHAPE_ONLY or (known and call.op in PARTS):
            return
        for tag in filter(None, itertools.chain.from_iterable(call.given.values())):
            if not any(sources is tag.sources for sources in known):
                for name, _ in filters_of(tag.sources).difference(*map(filters_of, known)):
                    self.found.lost.setdefault(name, call.op)

    def _notice_use(self, args: tuple, kwargs: dict, operation: str) -> frozenset[str]:
        """Record weights that meet data outside of their layer. Pin channels of companions.

        Returns:
            The layers whose weights are all that the operation takes, as in a penalty on weights.
            What does not meet data later has no influence on channels.
        """
        tensors, data = tensors_in((args, kwargs)), []
        used: frozenset[str] = frozenset()
        for tensor in tensors:
            if (companion := self._companions.get(tensor)) is not None:
                self.found.pin(companion)
            if id(tensor) in self.parameters:
                self.found.used.add(self.parameters[id(tensor)])
            weights = self._weights_in(tensor)
            used |= weights
            if not weights:
                data.append(tensor)
        meets = operation in CONTRACTIONS or not operation
        if data and (meets or any(self._origin(x).layers and x.numel() > 1 for x in data)):
            self.found.irregular |= used
            return frozenset()
        return used

    def _weights_in(self, values: Any) -> frozenset[str]:
        """The layers from whose weights alone some tensors are computed, outside of the layers."""
        opened = {one.name for one in self._open}
        found: set[str] = set()
        for tensor in tensors_in(values):
            holders = self.holders.get(id(tensor), ())
            if not opened.intersection(holders):
                found.update(holders)
            if (origin := self._origins.get(tensor)) is not None:
                found |= origin.weights
        return frozenset(found)

    def _next_origin(self, call: Call) -> Origin:
        """The origin of an operation's result. Records which layers are read, and which gate."""
        names = READS.get(call.op) or list(call.given)
        each = [self._origin(call[name]) for name in names]
        origin = together(each)
        if any(one.weighted and not one.layers for one in each):
            self._note_scaled(call)
        if is_own_norm(call):
            self.found.unsuitable |= self._origin(call["input"]).convs
        if call.op in CONTRACTIONS:
            if origin.weighted:  # a product with a weight outside of layers
                self.found.read |= origin.layers
                return Origin(frozenset([FUNCTIONAL]))
            return origin._replace(convs=frozenset(), shifted=frozenset())
        if call.op in GATES:
            (tag,) = call.given["self"]
            self._note_gates(origin.convs, tag)
            return origin._replace(shifted=origin.convs)
        from_layers = [one for one in each if one.layers]
        if call.op in SHIFTS and len(from_layers) == 1:
            return origin._replace(shifted=origin.convs)
        if call.op in PRODUCTS and len(from_layers) == 2:
            self._note_gates(origin.shifted, None)
        return origin

    def _note_scaled(self, call: Call) -> None:
        """Record layers whose filters meet a parameter that is more than a number."""
        shapes = (call.shapes(name) for name, tags in call.given.items() if not any(tags))
        is_layer = call.op in CONVOLUTIONS and self._open
        if not is_layer and any(shape.numel() > 1 for some in shapes for shape in some):
            for tag in filter(None, itertools.chain.from_iterable(call.given.values())):
                self.found.scaled.update(name for name, _ in filters_of(tag.sources))

    def _note_gates(self, convs: Collection[str], tag: Tag | None) -> None:
        """Record the filters of a tag as gates, or without a tag all filters of these convs."""
        if tag is not None and None not in tag.sources:
            self.found.gating |= filters_of(tag.sources)
            return
        for name in convs:
            self.found.gating |= filters_of(self._fresh(name).sources)

    def _convolved(self, call: Call) -> Tag:
        """The tag of the result of a convolution inside a conv."""
        opened = self._open[-1]
        module, x = self.modules[opened.name], self._tag(call["input"])
        # A single image has no batch dimension until here, so its channels were counted by another.
        same = x == (opened.input and Tag(1, opened.input.sources))
        weight = self._casts.get(call["weight"], call["weight"])
        plain = weight is module._parameters.get("weight")
        if opened.seen or not plain or not same:
            self.found.irregular.add(opened.name)
            self.found.lose(f"the layer {opened.name}", x)
        opened.seen = True
        # Offsets and masks of a deformable convolution.
        others = (tags for name, tags in call.given.items() if name != "input")
        self.found.pin(*itertools.chain.from_iterable(others))
        if (call["offset_groups"] or 1) > 1:
            self.found.pin(x)  # each group of input channels has offsets of its own
        return self._fresh(opened.name)

    def _forget_written(self, call: Call, outputs: list[Tensor], origin: Origin) -> None:
        """Forget the tags of tensors that were written into, or share memory with one."""
        written = call.written()
        if not written or keeps_places(call.op):
            return
        results = {id(tensor) for tensor in outputs}
        for other in list(self._origins):
            if id(other) not in results and any(share_memory(other, one) for one in written):
                self._origins[other] = together([self._origins[other], origin])
                self.found.lose(call.op, self._tag(other))
                self._set_tag(other, None)


def trace(model: nn.Module, batch: Callable[[], Any] | None = None) -> ChannelGraph:
    """Follow the channels of every conv and linear layer through a model.

    The model runs without gradients: on a training batch in training mode, then on an example image
    (or the batch, if no example works) in evaluation mode, which may use other parts. Without a
    batch, or where that fails, it runs on the example image in both modes. The model and the random
    state are unchanged afterwards.

    Args:
        model: any module with conv or linear layers; wrappers are looked through.
        batch: runs the model on a training batch.

    Returns:
        ChannelGraph: the sources of a channel are unknown after an operation without a rule.

    Raises:
        UserError: the model has no conv or linear layer, holds modules compiled by ``torch.jit``,
            or could not be run on an example image.
        RuntimeError: it could be run neither on the batch nor on an example image.
    """
    model = unwrap(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UserError(
            "RePr cannot look into modules that torch.jit has compiled. Pass the model itself."
        )
    tracer = _Tracer(model)
    if not tracer.convs and not tracer.linears:
        raise UserError(
            f"RePr needs conv or linear layers, but {type(model).__name__} has none. Use another "
            f"model."
        )
    example = _run(tracer, model, batch)
    graph = _graph(tracer)
    graph.example = example.run if example else None
    return graph


def _run(tracer: _Tracer, model: nn.Module, batch: Callable[[], Any] | None) -> Example | None:
    """Follow a batch and an example as :func:`trace` says. Returns the example that worked."""
    failures: list[Exception] = []

    def worked(run: Callable[[], Any], training: bool) -> bool:
        try:
            tracer.run(model, run, training)
        except Exception as error:  # an unknown model may raise anything
            failures.append(error)
            return False
        return True

    trained = batch is not None and worked(batch, True)
    found: Example | None = None
    seen = next(iter(tracer.found.shapes.values()), None)
    layer = next(iter((tracer.convs or tracer.linears).values()))
    for example in examples(model, layer, seen if trained else None):
        if found is not None and example.kind != found.kind:
            continue
        if found is None and worked(example.run, False):
            found = example
        if not trained and worked(example.run, True):
            found, trained = found or example, True
        if trained and (found is not None or batch is not None):
            break
    if trained and found is None and batch is not None:
        worked(batch, False)  # it may use other parts, too
    if not trained and found is None:
        name, first = type(model).__name__, failures[0]
        if isinstance(first, UserError):
            raise first
        reason = f"{type(first).__name__}: {first}".splitlines()[0]
        if batch is not None:  # probably a bug: the traceback says where
            raise RuntimeError(
                f"RePr could not run {name} on a training batch ({reason})."
            ) from first
        raise UserError(
            f"RePr could not run {name} on an example image ({reason}). "
            f"Pass batches= and loss= so that it can use real ones."
        )
    return found


# --- from what was found to a graph


def _graph(tracer: _Tracer) -> ChannelGraph:
    found = tracer.found
    found.irregular |= found.borrowed
    convs = {name: conv for name, conv in tracer.convs.items() if name in found.ran}
    heads = convs.keys() - found.read
    used = found.ran | found.irregular  # attention uses its projection's weight without calling it
    linears = {name: layer for name, layer in tracer.linears.items() if name in used}
    layers, not_run = {**convs, **linears}, _not_run(tracer)
    several, doubtful = found.irregular | tracer.shared.keys(), found.irregular | found.doubtful
    for name in layers if not_run else heads | (several & layers.keys()):
        found.pin(tracer._fresh(name))
    for name in several & found.inputs.keys():
        found.pin(Tag(1, found.inputs[name]))
    for name in found.irregular & found.inputs.keys():
        found.lose(f"the layer {name}, whose weight is used elsewhere", Tag(1, found.inputs[name]))
    readers = _readers(tracer)
    _around_norms(found, several)
    read = {
        (conv, index)
        for reader in readers.values()
        for conv, (_, filters) in reader.filters.items()
        for index in filters.tolist()
    }
    widths = {name: num_filters(layer) for name, layer in layers.items()}
    return ChannelGraph(
        convs=convs,
        linears=linears,
        visible=visible_units(linears, found.irregular, found.lost, read),
        norms=_links(tracer),
        readers=readers,
        stems=found.stems,
        heads=heads,
        gates={name for name, _ in found.gating - read},
        unsuitable={
            *(convs.keys() & (found.borrowed | found.unsuitable)),
            *(
                conv
                for conv, norm, channel in found.links
                if norm in found.irregular or (norm, channel) in found.mixed
            ),
            *(
                name
                for name in convs.keys() & found.shapes.keys()
                if not is_per_filter(convs[name], found.shapes[name])
                or (name in doubtful and not is_silent(convs[name], found.shapes[name]))
            ),
        },
        groups=groups_of(found.tied, widths),
        fixed={
            name: torch.tensor([(name, index) in found.fixed for index in range(width)])
            for name, width in widths.items()
        },
        partly={
            **dict.fromkeys(found.scaled & layers.keys(), "a parameter outside of layers"),
            **{name: found.lost[name] for name in layers.keys() & found.lost},
        },
        not_run=not_run,
    )


def _not_run(tracer: _Tracer) -> list[str]:
    """Parameters and norms that no run used. On another batch they may read any channel."""
    found, names = tracer.found, set(tracer.parameters.values())
    for layer, module in tracer.modules.items():
        own = {f"{layer}.{key}" if layer else key for key in module._parameters}
        if layer in found.ran:
            names -= own
        elif is_norm(module) and not own & names:
            names.add(layer)  # without gamma and beta, or frozen
    return sorted(names - found.used)


def _links(tracer: _Tracer) -> dict[str, list[NormLink]]:
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for (conv, norm, channel), index in sorted(tracer.found.links.items()):
        pairs.setdefault((conv, norm), []).append((channel, index))
    norms: dict[str, list[NormLink]] = {}
    order = {name: place for place, name in enumerate(tracer.modules)}
    for conv, norm in sorted(pairs, key=lambda both: (order[both[0]], order[both[1]])):
        channels, filters = torch.tensor(pairs[conv, norm]).T.contiguous()
        dim = tracer.found.link_dims[conv, norm]
        link = NormLink(norm, tracer.modules[norm], filters, channels, dim)
        norms.setdefault(conv, []).append(link)
    return norms


def _around_norms(found: Found, several: Collection[str]) -> None:
    """Tie filters that share a channel of a norm. Lose those that share it with something else."""
    first: dict[tuple[str, int], Filter] = {}
    for (conv, norm, channel), index in found.links.items():
        one = first.setdefault((norm, channel), (conv, index))
        if one != (conv, index):
            found.tied.add((one, (conv, index)))
        if (norm, channel) in found.mixed:
            found.lost.setdefault(conv, f"the norm {norm}, which something else goes into")
        if (norm, channel) in found.mixed or norm in several:
            found.fixed.add((conv, index))


def _readers(tracer: _Tracer) -> dict[str, Reader]:
    """Layers and the sources of their input channels.

    Layers that share one weight are one reader. Its sources are merged. They are all unknown where
    something else uses the weight, a layer did not run, or the layers read it in different ways.
    """
    inputs = tracer.found.inputs
    readers: dict[str, Reader] = {}
    taken: set[str] = set()
    for name in inputs:
        if name in taken:
            continue
        module = tracer.modules[name]
        weight = module._parameters.get("weight")
        sharing = [name] if weight is None else tracer.holders[id(weight)]
        taken.update(sharing)
        alone = not tracer.found.irregular.intersection(sharing)
        alike = len({column_layout(tracer.modules[other]) for other in sharing}) == 1
        sources: Channels = (None,) * len(inputs[name])
        if alone and alike and inputs.keys() >= set(sharing):
            sources = inputs[name]
            for other in sharing:
                sources = merged(sources, inputs[other])
        readers[name] = reader_of(name, module, sources)
    return readers
