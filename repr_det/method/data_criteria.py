"""Criteria that use training batches: features, gradients, curvature, and the loss itself.

Each runs the model on the first :data:`BATCHES` batches, in the mode that it is in: training mode,
when the controller ranks. A filter's feature map is the channel of the norm that follows the conv,
after a ReLU, which most networks have there: negative values count as zero. Without a norm it is
the output of the conv module. Where several norms read a filter (dense blocks), it is their mean.

Every rank uses its own batches, as many as it has. Its sums and counts are added to those of the
other ranks once, at the end. No reduction happens while the model runs.

Feature maps and gradients differ in scale from layer to layer. Molchanov et al. (Pruning
Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017, section 2.2) divide a
layer's scores by their l2 norm before layers are ranked together; where that is done here, the
docstring says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repr_det.errors import UserError
from repr_det.method.holding import zero_filters
from repr_det.method.layers import FilterLayer
from repr_det.method.modules import unchanged
from repr_det.method.ranks import sum_over_ranks
from repr_det.method.settings import NO_BATCHES

if TYPE_CHECKING:
    from repr_det.method.criteria import Data, Scores

BATCHES = 8
"""How many batches a criterion uses."""

DIFFERENTIATES = {"gradients", "taylor", "hessian"}
"""Names of the criteria that differentiate the loss."""

HESSIAN_PROBES = 4
"""Random vectors for each batch that estimate the diagonal of the Hessian."""


def activations(layers: Sequence[FilterLayer], data: Data) -> Scores:
    """Minus the mean of a filter's feature map: filters that seldom respond are pruned first.

    The "activation" criterion of Molchanov et al. (ICLR 2017), divided by the layer's l2 norm as
    they do.
    """
    return _negative(_per_layer_norm(_feature_means(layers, data, torch.relu)))


def apoz(layers: Sequence[FilterLayer], data: Data) -> Scores:
    """Average percentage of zeros in a filter's feature map, as a share (Hu et al., 2016).

    Shares can be compared between layers without a division.
    """
    return _feature_means(layers, data, lambda feature: feature <= 0)


def gradients(layers: Sequence[FilterLayer], data: Data) -> Scores:
    """Minus the mean |gradient| of the loss with respect to a filter's weights.

    Filters that hardly learn are pruned first. The paper names this criterion and does not define
    it; the definition is ours. Divided by the layer's l2 norm.
    """
    totals, batches = _zeros(layers), 0
    for batch in _batches(data):
        for layer, gradient in zip(layers, _weight_gradients(layers, data, batch), strict=True):
            totals[layer.name] += layer.matrix(gradient).double().abs().mean(dim=1)
        batches += 1
    totals, _, _ = _over_ranks(data, batches, totals)
    return _negative(_per_layer_norm(totals))  # the number of batches cancels


def taylor(layers: Sequence[FilterLayer], data: Data) -> Scores:
    """Minus the first-order estimate of how the loss changes if a filter is removed.

    ``|mean over positions of (dC/dz * z)|`` of the feature map z of one image, averaged over images
    and divided by the layer's l2 norm (Molchanov et al., ICLR 2017, equations 6 to 9). The product
    is the same before and after a ReLU.
    """
    totals, counts, batches = _zeros(layers), _zeros(layers), 0
    for batch in _batches(data):
        batches += 1
        gates: list[tuple[_Site, Tensor, int]] = []

        def multiply(site: _Site, out: Tensor, gates: list = gates) -> Tensor:
            # A factor of one for each image and channel has the derivative sum(dC/dz * z).
            dims = (0, site.dim % out.dim())  # twice the first where there is no batch
            shape = [n if d in dims else 1 for d, n in enumerate(out.shape)]
            gate = out.new_ones(shape).requires_grad_()
            gates.append((site, gate, out.numel() // max(gate.numel(), 1)))
            return out * gate

        # Backward is inside, too: checkpointing computes features again there.
        with torch.enable_grad(), _hooked(layers, multiply):
            loss = data.loss(data.model, batch)
            wanted = list(gates)
            found = torch.autograd.grad(loss, [gate for _, gate, _ in wanted], allow_unused=True)
        for (site, gate, positions), gradient in zip(wanted, found, strict=True):
            if gradient is not None and len(gate):
                images = len(gate) if site.dim % gate.dim() else 1
                per_image = gradient.reshape(images, -1).double() / positions
                site.add(totals, per_image.abs().mean(dim=0))
                site.add(counts, torch.ones_like(per_image[0]))
    totals, counts, _ = _over_ranks(data, batches, totals, counts)
    return _negative(_per_layer_norm(_means(totals, counts)))


def hessian(layers: Sequence[FilterLayer], data: Data) -> Scores:
    """Minus the saliency ``sum(H_ii w_i^2) / 2`` of a filter's weights, H the loss's Hessian.

    Optimal Brain Damage (LeCun, Denker and Solla, NeurIPS 1989, equation 5), summed over a filter.
    The diagonal is estimated without bias from products of H with random vectors (Hutchinson,
    1990): with signs z and v = z w, the mean of ``v_i (H v)_i`` is ``H_ii w_i^2``. Saliencies are
    in units of the loss, so they can be compared between layers without a division.

    Raises:
        RuntimeError: the loss has no second derivatives; see :func:`check_derivatives`.
    """
    totals, batches = _zeros(layers), 0
    for batch in _batches(data):
        for name, saliency in _saliencies(layers, data, batch, HESSIAN_PROBES).items():
            totals[name] += saliency
        batches += 1
    totals, _, batches = _over_ranks(data, batches, totals)
    return _negative({name: total / batches for name, total in totals.items()})


def check_derivatives(criterion: str, layers: Sequence[FilterLayer], data: Data) -> None:
    """Refuse a model whose loss a criterion of :data:`DIFFERENTIATES` cannot differentiate.

    Raises:
        UserError: the model uses reentrant checkpointing, which ``torch.autograd.grad`` does not
            support. Or, for :func:`hessian`, an operation such as RoIAlign has no second
            derivative.
    """
    batch = next(_batches(data), None)
    if batch is None:  # this rank has none
        return
    with torch.enable_grad():
        loss = data.loss(data.model, batch)
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        raise UserError(
            f"RePr: criterion {criterion!r} differentiates the loss, but that of loss= has no "
            f"gradient. Return it without detach(), or set another criterion."
        )
    if "CheckpointFunctionBackward" in _operations_of(loss):
        raise UserError(
            f"RePr: criterion {criterion!r} cannot differentiate through reentrant checkpointing. "
            f"Call torch.utils.checkpoint with use_reentrant=False, or set another criterion."
        )
    if criterion != "hessian":
        return
    try:
        _saliencies(layers, data, batch, probes=1)
    except RuntimeError as error:
        raise UserError(
            f"RePr: criterion 'hessian' needs second derivatives, which this model's loss does not "
            f"have ({str(error).splitlines()[0]}). Set another criterion, for example taylor."
        ) from error


def _operations_of(loss: Tensor) -> set[str]:
    """Autograd's names of the operations that a loss is computed with."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions]
    return {node.name() for node in seen}


def oracle(layers: Sequence[FilterLayer], data: Data) -> Scores:
    """Minus the rise of the loss when only one filter is zeroed: the paper's greedy oracle.

    The paper counts the accuracy lost on held-out training images. Here it is the loss, which every
    task has and which can be compared between layers. It costs one forward pass for each filter
    and batch; ``data.progress`` shows it.
    """
    batches = list(_batches(data))
    of_whole = _total_loss(data, batches)
    scores = _zeros(layers)
    filters = [(layer, i) for layer in layers for i in range(layer.num_filters)]
    for layer, i in data.progress(filters):
        with _zeroed(layer, i):
            scores[layer.name][i] = of_whole - _total_loss(data, batches)
    scores, _, _ = _over_ranks(data, len(batches), scores)
    return scores


def _batches(data: Data) -> Iterator[Any]:
    """The first batches of this rank.

    Raises:
        UserError: ``batches`` or ``loss`` was not passed.
    """
    if data.batches is None or data.loss is None:
        raise UserError("RePr: this criterion looks at training batches. Pass batches= and loss=.")
    yield from itertools.islice(data.batches(), BATCHES)


def _over_ranks(
    data: Data, batches: int, totals: Scores, counts: Scores | None = None
) -> tuple[Scores, Scores, int]:
    """Totals, counts and the number of batches of all ranks together, by one reduction.

    Raises:
        UserError: no rank had a batch.
    """
    counts = counts or {}
    own = {(0, name): total for name, total in totals.items()}
    own |= {(1, name): count for name, count in counts.items()}
    own[2, ""] = torch.tensor([batches], dtype=torch.float64)
    found = sum_over_ranks(own, data.group)
    seen = round(float(found[2, ""]))
    if not seen:
        raise UserError(NO_BATCHES)
    return {n: found[0, n] for n in totals}, {n: found[1, n] for n in counts}, seen


def _means(totals: Scores, counts: Scores) -> Scores:
    return {name: total / counts[name].clamp(min=1) for name, total in totals.items()}


def _zeros(layers: Sequence[FilterLayer]) -> Scores:
    return {
        layer.name: torch.zeros(layer.num_filters, dtype=torch.float64, device=layer.weight.device)
        for layer in layers
    }


def _negative(scores: Scores) -> Scores:
    return {name: -score for name, score in scores.items()}


def _per_layer_norm(scores: Scores) -> Scores:
    tiny = torch.finfo(torch.float64).tiny
    return {name: score / score.norm().clamp(min=tiny) for name, score in scores.items()}


class _Site:
    """A module whose output holds the feature maps of filters, of one or several layers.

    Attributes:
        module: a norm, or a conv or linear layer that no norm follows.
        dim: the dimension of its output that counts channels. Negative where no norm follows, since
            single images have no batch dimension.
    """

    def __init__(self, module: nn.Module, dim: int) -> None:
        self.module = module
        self.dim = dim
        self._parts: list[tuple[str, Tensor, Tensor]] = []

    def holds(self, name: str, filters: Tensor, channels: Tensor) -> None:
        """Record that these channels are these filters of a layer."""
        self._parts.append((name, filters, channels))

    def add(self, totals: Scores, by_channel: Tensor) -> None:
        """Add values of shape (channels,) to the totals of the filters of these channels."""
        for name, filters, channels in self._parts:
            values = by_channel[channels.to(by_channel.device)].double()
            totals[name].index_add_(0, filters.to(values.device), values)


def _sites(layers: Sequence[FilterLayer]) -> list[_Site]:
    sites: dict[nn.Module, _Site] = {}
    for layer in layers:
        for link in layer.norms:
            site = sites.setdefault(link.module, _Site(link.module, link.dim))
            site.holds(layer.name, link.filters, link.channels)
        if not layer.norms:
            every = torch.arange(layer.num_filters)
            dim = -1 if isinstance(layer.module, nn.Linear) else 1 - layer.weight.dim()
            site = sites.setdefault(layer.module, _Site(layer.module, dim))
            site.holds(layer.name, every, every)
    return list(sites.values())


def _hooked(
    layers: Sequence[FilterLayer], hook: Callable[[_Site, Tensor], Tensor | None]
) -> ExitStack:
    """While inside, call ``hook`` with each output of each site. What it returns replaces it."""
    hooks = ExitStack()
    for site in _sites(layers):
        hooks.enter_context(
            site.module.register_forward_hook(lambda module, args, out, site=site: hook(site, out))
        )
    return hooks


def _feature_means(
    layers: Sequence[FilterLayer], data: Data, statistic: Callable[[Tensor], Tensor]
) -> Scores:
    """Mean of a statistic of the features over images and positions, by filter."""
    totals, counts, batches = _zeros(layers), _zeros(layers), 0

    def look(site: _Site, out: Tensor) -> None:
        values = statistic(out.detach()).transpose(0, site.dim)
        values = values.reshape(len(values), -1)
        site.add(totals, values.sum(dim=1, dtype=torch.float64))
        seen = torch.full((len(values),), values.shape[1], dtype=torch.float64)
        site.add(counts, seen.to(values.device))

    with torch.no_grad(), _hooked(layers, look):
        for batch in _batches(data):
            data.loss(data.model, batch)
            batches += 1
    totals, counts, _ = _over_ranks(data, batches, totals, counts)
    return _means(totals, counts)


def _weight_gradients(
    layers: Sequence[FilterLayer], data: Data, batch: Any, create_graph: bool = False
) -> list[Tensor]:
    """The loss's gradient with respect to each layer's weight; zero where it does not depend."""
    weights = [layer.weight for layer in layers]
    with torch.enable_grad():
        loss = data.loss(data.model, batch)
        found = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def _saliencies(layers: Sequence[FilterLayer], data: Data, batch: Any, probes: int) -> Scores:
    """An estimate of ``sum(H_ii w_i^2) / 2`` over each filter's weights, on one batch."""
    totals = _zeros(layers)
    weights = [layer.weight for layer in layers]
    gradients = _weight_gradients(layers, data, batch, create_graph=True)
    curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    for _ in range(probes if curved else 0):
        vectors = [w.detach() * _signs(w, data.generator) for w in weights]
        products = torch.autograd.grad(
            [gradients[i] for i in curved],
            weights,
            [vectors[i] for i in curved],
            retain_graph=True,
            allow_unused=True,
        )
        for layer, vector, product in zip(layers, vectors, products, strict=True):
            if product is not None:
                rows = layer.matrix(vector * product).double()
                totals[layer.name] += rows.sum(dim=1) / (2 * probes)
    return totals


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator).to(like.device, like.dtype)
    return 2 * signs - 1


def _total_loss(data: Data, batches: Sequence[Any]) -> float:
    # Each evaluation starts from the same buffers and random state, so that only the filter counts.
    with unchanged(data.model), torch.no_grad():
        return sum(float(data.loss(data.model, batch)) for batch in batches)


@contextmanager
def _zeroed(layer: FilterLayer, index: int) -> Iterator[None]:
    chosen = torch.zeros(layer.num_filters, dtype=torch.bool)
    chosen[index] = True
    with torch.no_grad():
        values = [(slot, slot.read()) for slot in layer.filter_slots(chosen)]
        means = [(m, m.clone()) for link in layer.norms for m, _ in link.running_statistics()]
        zero_filters(layer, chosen, None)
        try:
            yield
        finally:
            for slot, value in values:
                slot.write(value)
            for mean, value in means:
                mean.copy_(value)
