"""Statistics of a model on data: what weights alone do not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial

import torch
from torch import Tensor, nn

from minipact.errors import MergeError, check_known, listing

Batch = Tensor | tuple[Tensor, Tensor]
Parameters = dict[str, Tensor]

LABELS = ("true", "expected", "empirical", "argmax")
ESTIMATES = ("per_sample", "batch_mean_square")

# ---- Fisher information --------------------------------------------------------------------------


def fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    labels: str = "true",
    estimate: str = "per_sample",
    chunk: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of a classifier's weights.

    F_i = mean over samples x of E_y (d log p(y|x) / d theta_i)^2: how fast the model's own answers
    change, in Kullback-Leibler divergence, when weight i moves. The square is taken for every sample.

    Args:
        model: maps inputs [N, ...] to logits [N, C]; evaluated in eval mode, returned as found.
        batches: inputs [N, ...], or pairs (inputs, labels [N]) with classes 0..C-1.
        labels: where y comes from. "true": one label per sample, drawn from the model's p(y|x).
            "expected": every class, weighted by p(y|x); exact, at C times the cost. "empirical": the
            data's labels; "argmax": the likeliest class. The last two are squared gradients of a
            loss, not the Fisher information.
        estimate: "per_sample"; or "batch_mean_square", sum_b N_b (mean gradient of batch b)^2 / N,
            as some released code has it. This is NOT the Fisher information: for gradients that
            average to zero it is too small by the factor N_b, otherwise cross terms of different
            samples enter, and it depends on how the data is batched. For comparisons only.
        chunk: samples whose gradients are held at once: chunk times the model's memory.
        generator: draws the labels of "true".

    Returns:
        name -> tensor with the names and shapes of `model.named_parameters()`; float64 for float64
        parameters, else float32. No parameter's `.grad` is touched.

    Raises:
        MergeError: no samples, labels that do not fit, logits that are not [N, C], a gradient
            that is not finite, or an unknown option.
    """
    check_known("labels", [labels], LABELS)
    check_known("estimate", [estimate], ESTIMATES)
    mean_first = estimate == "batch_mean_square"
    if mean_first and labels == "expected":
        # The expected gradient of a log-likelihood is zero for every sample, whatever the model.
        raise MergeError("labels='expected' has no batch_mean_square: it would be zero everywhere")
    return _mean_over_samples(model, batches, labels, chunk, generator, Tensor.square, mean_first)


def gradient_magnitudes(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    labels: str = "empirical",
    chunk: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Mean over samples of abs(d log p(y, given x) / d theta_i), the magnitude taken for every sample.

    At the base, on a task's data, it is what TATR weighs: the statistic "gradient" of a merge. Source: Sun et
    al. 2025 (arXiv 2501.15065), who take 128 samples a task. Arguments, result and errors as in `fisher`.
    """
    check_known("labels", [labels], LABELS)
    return _mean_over_samples(model, batches, labels, chunk, generator, Tensor.abs, False)


def _mean_over_samples(
    model: nn.Module,
    batches: Iterable[Batch],
    labels: str,
    chunk: int,
    generator: torch.Generator | None,
    of: Callable[[Tensor], Tensor],
    mean_first: bool,
) -> dict[str, Tensor]:
    """Mean over samples of a function of their gradients; see `_batch_sums`."""
    if chunk < 1:
        raise MergeError(f"chunk={chunk}: must be at least 1")
    parameters = {name: lifted(p.detach()) for name, p in model.named_parameters()}
    if not parameters:
        raise MergeError("the model has no parameters")

    device = next(iter(parameters.values())).device
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    with evaluation(model):
        for batch in batches:
            x, given = on_device(batch, device)
            answers = _answers(model, parameters, x, given, labels, generator)
            sums = _batch_sums(model, parameters, x, answers, chunk, of, mean_first)
            for name, s in sums.items():
                total[name] += s
            count += len(x)
    if count == 0:
        raise MergeError("no batches: statistics need at least one sample")
    bad = [name for name, f in total.items() if not torch.isfinite(f).all()]
    if bad:
        raise MergeError(f"gradients of {listing(bad)} are not finite: check weights and inputs")
    return {name: f / count for name, f in total.items()}


def lifted(x: Tensor) -> Tensor:
    """Half types in float32: squares of their gradients would underflow."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode and plain attention inside; every module's mode as found outside."""
    # Imported here, so that a torch that lacks it can do everything else.
    from torch.nn.attention import SDPBackend, sdpa_kernel

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # The fused kernels have no batching rule, so vmap would run them sample by sample.
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Inputs, lifted from half types like the weights are, and labels if there are any."""
    y: Tensor | None = None
    if isinstance(batch, Tensor):
        x = batch
    else:
        x, y = batch
    if x.ndim == 0 or len(x) == 0:
        raise MergeError(f"a batch of shape {tuple(x.shape)} is empty: leave it out")
    if x.is_floating_point():
        x = lifted(x)
    if y is not None:
        y = y.to(device)
    return x.to(device), y


def logits_of(model: nn.Module, parameters: Parameters, x: Tensor) -> Tensor:
    """The model's answers with these parameters; buffers that are not among them are lifted likewise."""
    buffers = {name: x for name, x in model.named_buffers() if name not in parameters}
    for name, buffer in buffers.items():
        if buffer.is_floating_point():
            buffers[name] = lifted(buffer)
    logits: Tensor = torch.func.functional_call(model, (parameters, buffers), (x,))
    return logits


# ---- Labels to differentiate for -----------------------------------------------------------------


@torch.no_grad()
def _answers(
    model: nn.Module,
    parameters: Parameters,
    x: Tensor,
    given: Tensor | None,
    labels: str,
    generator: torch.Generator | None,
) -> list[tuple[Tensor, Tensor]]:
    """Labels [N] to differentiate for, each with the weights [N] of the squares."""
    logits = logits_of(model, parameters, x)
    if logits.ndim != 2 or len(logits) != len(x):
        raise MergeError(f"model gives {tuple(logits.shape)} for {len(x)} inputs: need [N, C]")
    p = logits.softmax(-1)
    if labels == "expected":
        constant = torch.zeros(len(x), dtype=torch.long, device=p.device)
        return [(constant + c, p[:, c]) for c in range(p.shape[1])]
    if labels == "true":
        y = drawn_labels(p, generator)
    elif labels == "argmax":
        y = p.argmax(-1)
    else:
        y = known_classes(given, len(x), p.shape[1])
    return [(y, p.new_ones(len(x)))]


def drawn_labels(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """One label per sample from probabilities [N, C], by the inverse of the distribution function."""
    device = generator.device if generator else torch.device("cpu")
    u = torch.rand(len(p), 1, generator=generator, dtype=torch.float64, device=device)
    below = p.double().cumsum(-1) < u.to(p.device)
    return below.sum(-1).clamp(max=p.shape[1] - 1)  # rounding may leave the last sum below 1


def known_classes(given: Tensor | None, samples: int, classes: int) -> Tensor:
    """The data's labels, checked."""
    if given is None:
        raise MergeError("labels='empirical' needs batches of pairs (inputs, labels)")
    if given.shape != (samples,) or given.is_floating_point():
        raise MergeError(f"labels {given.dtype} {tuple(given.shape)}: need {samples} class numbers")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= classes:
        raise MergeError(f"labels {low}..{high}: use 0..{classes - 1}")
    return given.long()


# ---- Gradients of every sample -------------------------------------------------------------------


def _batch_sums(
    model: nn.Module,
    parameters: Parameters,
    x: Tensor,
    answers: list[tuple[Tensor, Tensor]],
    chunk: int,
    of: Callable[[Tensor], Tensor],
    mean_first: bool,
) -> dict[str, Tensor]:
    """Sum of a function of the samples' gradients; with mean_first, N times that of their mean."""
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for y, weight in answers:
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            for name, g in _gradients(model, parameters, x[rows], y[rows]).items():
                if mean_first:
                    sums[name] += g.sum(0)
                else:
                    sums[name] += torch.einsum("n,n...->...", weight[rows].to(g), of(g))
    if mean_first:
        return {name: len(x) * of(s / len(x)) for name, s in sums.items()}
    return sums


def _gradients(model: nn.Module, parameters: Parameters, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient of log p(y|x) for each of n samples, name -> [n, *shape]."""

    def log_likelihood(weights: Parameters, x: Tensor, y: Tensor) -> Tensor:
        logits = logits_of(model, weights, x[None])
        return -nn.functional.cross_entropy(logits, y[None])

    per_sample = torch.func.vmap(torch.func.grad(log_likelihood), in_dims=(None, 0, 0))
    gradients: dict[str, Tensor] = per_sample(parameters, x, y)
    return gradients


# ---- Covariances of inputs -----------------------------------------------------------------------


@torch.no_grad()
def input_covariances(model: nn.Module, batches: Iterable[object]) -> dict[str, Tensor]:
    """For each linear layer, the mean of x x^T over the inputs x [n] that it sees: [n, n] in float64.

    It is the statistic "covariance" of a merge, which RegMean takes from each fine-tuned model on unlabelled
    data of its own task. Source: Jin et al. 2023 (arXiv 2212.09849). Every token and position counts as an
    input; so does padding, so leave it out.

    Args:
        model: evaluated in eval mode, returned as found.
        batches: what the model takes: inputs, a tuple whose first entry is, or keywords as a mapping.

    Returns name of the weight -> covariance, for every nn.Linear, and both projections of
    nn.MultiheadAttention, the joint one where queries, keys and values are one tensor. Raises MergeError
    without batches or such layers, and where one is not finite.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(weight: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).double()
        totals[weight] = totals.get(weight, 0) + rows.mT @ rows
        counts[weight] = counts.get(weight, 0) + len(rows)

    with evaluation(model), _seen_inputs(model, see):
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, tuple | list) else batch)
    if not totals:
        raise MergeError("no linear layer saw an input: give batches, and a model with nn.Linear")
    if bad := [name for name, x in totals.items() if not torch.isfinite(x).all()]:
        raise MergeError(f"inputs of {listing(bad)} are not finite: check weights and inputs")
    return {name: x / counts[name] for name, x in totals.items()}


@contextmanager
def _seen_inputs(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, see(name of the weight, inputs) is called whenever a linear layer runs."""

    def linear(weight: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(weight, inputs[0])

    def attention(
        weight: str, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        query, key, value = (*inputs, *(named[n] for n in ("query", "key", "value") if n in named))[
            :3
        ]
        if query is key is value:
            see(weight, query)

    def mixture(
        weight: str,
        module: nn.MultiheadAttention,
        inputs: tuple[Tensor, ...],
        named: dict[str, Tensor],
    ) -> None:
        run: Callable[..., tuple[Tensor, object]] = _before_projection(module).forward
        see(weight, run(*inputs, **named)[0])

    hooks = []
    for name, module in model.named_modules():
        beginning = f"{name}." if name else ""
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(partial(linear, f"{beginning}weight")))
        if isinstance(module, nn.MultiheadAttention):
            watches = [partial(mixture, f"{beginning}out_proj.weight")]
            if module.in_proj_weight is not None:
                watches.append(partial(attention, f"{beginning}in_proj_weight"))
            for watch in watches:
                hooks.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _before_projection(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """The same attention with an identity for its output projection, whose inputs no hook can see."""
    found = copy(module)
    width = module.embed_dim
    identity = nn.Linear(width, width).to(module.out_proj.weight)
    nn.init.eye_(identity.weight)
    nn.init.zeros_(identity.bias)
    found._modules = {"out_proj": identity}
    return found
