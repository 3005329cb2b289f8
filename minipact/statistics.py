"""Weights seen one by one: Fisher information, load-bearing weights, and what other tasks do to them.

Holds what needs a model or data besides weights. A is the victim task, B an interfering one. Needs
`minipact.merging` and torch only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipact.merging import Generator, MergeError, State, _check_known, _generator, _lift, _listing

Batch = Tensor | tuple[Tensor, Tensor]

LABELS = ("true", "expected", "empirical", "argmax")
OUT_OF_SCOPE = ("head", "norm", "ln_", "logit_scale")
MAX_FOR_QUANTILE = 10_000_000

# ---- Fisher information --------------------------------------------------------------------------


def fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    labels: str = "true",
    estimate: str = "per_sample",
    chunk: int = 32,
    generator: Generator = None,
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
    _check_known("labels", [labels], LABELS)
    _check_known("estimate", [estimate], ("per_sample", "batch_mean_square"))
    mean_first = estimate == "batch_mean_square"
    if mean_first and labels == "expected":
        # The expected gradient of a log-likelihood is zero for every sample, whatever the model.
        raise MergeError("labels='expected' has no batch_mean_square: it would be zero everywhere")
    if chunk < 1:
        raise MergeError(f"chunk={chunk}: must be at least 1")
    parameters = {name: _lift(p.detach()) for name, p in model.named_parameters()}
    if not parameters:
        raise MergeError("the model has no parameters")
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    with _evaluation(model):
        for batch in batches:
            x, given = _on_device(batch, next(iter(parameters.values())))
            answers = _answers(model, parameters, x, given, labels, generator)
            for name, s in _batch_sums(model, parameters, x, answers, chunk, mean_first).items():
                total[name] += s
            count += len(x)
    if count == 0:
        raise MergeError("no batches: the Fisher information needs at least one sample")
    bad = [name for name, f in total.items() if not torch.isfinite(f).all()]
    if bad:
        raise MergeError(f"gradients of {_listing(bad)} are not finite: check weights and inputs")
    return {name: f / count for name, f in total.items()}


def _batch_sums(
    model: nn.Module,
    parameters: dict[str, Tensor],
    x: Tensor,
    answers: list[tuple[Tensor, Tensor]],
    chunk: int,
    mean_first: bool,
) -> dict[str, Tensor]:
    """Sum of the samples' squared gradients; with mean_first, N times the square of their mean."""
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for y, weight in answers:
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            for name, g in _gradients(model, parameters, x[rows], y[rows]).items():
                sums[name] += g.sum(0) if mean_first else _sum_of_squares(g, weight[rows])
    return {n: s.square() / len(x) for n, s in sums.items()} if mean_first else sums


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode and plain attention inside; every module's mode as found outside."""
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


def _on_device(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Inputs, lifted from half types like the weights are, and labels if there are any."""
    x, y = (batch, None) if isinstance(batch, Tensor) else batch
    if x.ndim == 0 or len(x) == 0:
        raise MergeError(f"a batch of shape {tuple(x.shape)} is empty: leave it out")
    if x.is_floating_point():
        x = _lift(x)
    return x.to(like.device), None if y is None else y.to(like.device)


def _logits(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    buffers = {n: _lift(b) if b.is_floating_point() else b for n, b in model.named_buffers()}
    logits: Tensor = torch.func.functional_call(model, (parameters, buffers), (x,))
    return logits


@torch.no_grad()
def _answers(
    model: nn.Module,
    parameters: dict[str, Tensor],
    x: Tensor,
    given: Tensor | None,
    labels: str,
    generator: Generator,
) -> list[tuple[Tensor, Tensor]]:
    """Labels [N] to differentiate for, each with the weights [N] of the squares."""
    logits = _logits(model, parameters, x)
    if logits.ndim != 2 or len(logits) != len(x):
        raise MergeError(f"model gives {tuple(logits.shape)} for {len(x)} inputs: need [N, C]")
    p = logits.softmax(-1)
    ones, classes = p.new_ones(len(x)), p.shape[1]
    if labels == "expected":
        return [(torch.full_like(p[:, 0], c, dtype=torch.long), p[:, c]) for c in range(classes)]
    if labels == "argmax":
        return [(p.argmax(-1), ones)]
    if labels == "true":
        device = generator.device if generator else torch.device("cpu")
        u = torch.rand(len(x), 1, generator=generator, dtype=torch.float64, device=device)
        drawn = (p.double().cumsum(-1) < u.to(p.device)).sum(-1)
        return [(drawn.clamp(max=classes - 1), ones)]
    if given is None:
        raise MergeError("labels='empirical' needs batches of pairs (inputs, labels)")
    if given.shape != x.shape[:1] or given.is_floating_point():
        raise MergeError(f"labels {given.dtype} {tuple(given.shape)}: need {len(x)} class numbers")
    if int(given.min()) < 0 or int(given.max()) >= classes:
        raise MergeError(f"labels {int(given.min())}..{int(given.max())}: use 0..{classes - 1}")
    return [(given.long(), ones)]


def _gradients(
    model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Gradient of log p(y|x) for each of n samples, name -> [n, *shape]."""

    def log_likelihood(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = _logits(model, weights, x[None])
        return -nn.functional.cross_entropy(logits, y[None])

    per_sample = torch.func.vmap(torch.func.grad(log_likelihood), in_dims=(None, 0, 0))
    gradients: dict[str, Tensor] = per_sample(parameters, x, y)
    return gradients


def _sum_of_squares(g: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("n,n...->...", weight.to(g), g.square())


# ---- Load-bearing weights ------------------------------------------------------------------------


@dataclass(frozen=True)
class LBWMasks:
    """Groups of single weights of a fine-tuned model, each tensor name -> boolean mask.

    `crucial`: small update and high Fisher information, the load-bearing weights. `safe`: small update and
    low Fisher information. `random`: drawn from all entries of the tensor. `low`: drawn from the
    entries with a small update, whatever their Fisher information.
    """

    crucial: dict[str, Tensor]
    safe: dict[str, Tensor]
    random: dict[str, Tensor]
    low: dict[str, Tensor]


def lbw_mask(
    tau: State,
    fisher: State,
    low: float = 0.3,
    high: float = 0.7,
    *,
    equalise: bool = True,
    seed: int = 0,
) -> LBWMasks:
    """Find the weights that a task hardly moved but relies on, with control groups, in each tensor.

    Small update: the size of tau lies below its quantile `low`. Crucial: small update and Fisher
    information above its quantile `high`; safe: small update and Fisher information below its
    quantile `low`. Quantiles are taken per tensor, over at most 10^7 random entries. In scope are
    floating-point tensors with two dimensions or more whose name holds none of `head`, `norm`,
    `ln_`, `logit_scale`.

    Args:
        tau: name -> task vector of the victim.
        fisher: name -> diagonal Fisher information of its fine-tuned model, same shapes.
        low, high: quantiles, 0 < low <= high < 1.
        equalise: draw as many entries for every group of a tensor as its smaller group of crucial and
            safe has; tensors where one of the two is empty (many equal updates, a frozen tensor)
            are left out. False keeps crucial and safe whole, even empty, and draws
            as many random and low ones as there are crucial ones.
        seed: with the CRC-32 of the tensor's name it seeds the draws: the same in every process and
            for every order of tensors.

    Source: Shi et al. 2026 (arXiv 2606.18627), released analysis; group `low` is our addition.

    Raises:
        MergeError: a tensor is missing, misshapen or not finite, a quantile is out of range, or no
            tensor is left.
    """
    if not 0 < low <= high < 1:
        raise MergeError(f"low={low}, high={high}: must satisfy 0 < low <= high < 1")
    names = sorted(name for name, x in tau.items() if _in_scope(name, x))
    if not names:
        raise MergeError("tau holds no tensor in scope: two dimensions or more, no head or norm")
    groups = LBWMasks({}, {}, {}, {})
    for name in names:
        a, f = _checked(name, tau, fisher)
        small = a < _quantile(a, low, seed, name)
        crucial = small & (f > _quantile(f, high, seed, name))
        safe = small & (f < _quantile(f, low, seed, name))
        size = int(crucial.sum())
        if equalise:
            size = min(size, int(safe.sum()))
            if size == 0:
                continue
            crucial = _draw(crucial, size, seed, name, "crucial")
            safe = _draw(safe, size, seed, name, "safe")
        groups.crucial[name], groups.safe[name] = crucial, safe
        groups.random[name] = _draw(torch.ones_like(small), size, seed, name, "random")
        groups.low[name] = _draw(small, size, seed, name, "low")
    if not groups.crucial:
        raise MergeError("no tensor has both crucial and safe weights: are all updates equal?")
    return groups


def _in_scope(name: str, x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim >= 2 and not any(s in name for s in OUT_OF_SCOPE)


def _checked(name: str, tau: State, fisher: State) -> tuple[Tensor, Tensor]:
    """|tau| and Fisher information of one tensor."""
    if name not in fisher:
        raise MergeError(f"fisher lacks '{name}': use the names of the task vector")
    a, f = _lift(tau[name]).abs(), _lift(fisher[name]).to(tau[name].device)
    if a.shape != f.shape:
        raise MergeError(f"'{name}': tau {tuple(a.shape)} and fisher {tuple(f.shape)} differ")
    if not (torch.isfinite(a).all() and torch.isfinite(f).all()):
        raise MergeError(f"'{name}': tau or fisher holds NaN or infinity")
    return a, f


def _quantile(x: Tensor, q: float, seed: int, name: str) -> Tensor:
    flat = x.flatten()
    if len(flat) > MAX_FOR_QUANTILE:
        rows = torch.randint(
            len(flat), (MAX_FOR_QUANTILE,), generator=_generator(seed, "quantile", name)
        )
        flat = flat[rows.to(flat.device)]
    return torch.quantile(flat.double(), q).to(x.dtype)


def _draw(among: Tensor, size: int, seed: int, name: str, group: str) -> Tensor:
    """Mask of `size` random entries of a mask.

    Every entry of the tensor gets a random key and the smallest keys win, so that another choice of
    one entry in `among` changes one entry of the result, not the whole draw.
    """
    keys = torch.rand(among.numel(), generator=_generator(seed, group, name), dtype=torch.float64)
    keys = keys.masked_fill(~among.flatten().cpu(), math.inf)
    drawn = torch.zeros(among.numel(), dtype=torch.bool)
    drawn[keys.topk(size, largest=False).indices] = True
    return drawn.view(among.shape).to(among.device)


# ---- How strongly other tasks overwrite them -----------------------------------------------------


def enrichment(mask: Tensor, tau_B: Tensor) -> Tensor:
    """Share of a task's squared update that falls on a mask, over the mask's share of entries.

    (sum over mask of tau_B^2 / sum of tau_B^2) / (size of mask / d): 1 where B has no preference, above 1
    where it overwrites the mask more than its size explains.

    Args:
        mask: [shape] boolean, d entries.
        tau_B: [shape] update of the interfering task, or [..., shape] for several.

    Returns:
        [...] in float64; NaN where the mask is empty or tau_B is zero.

    Raises:
        MergeError: the shapes do not fit, or the mask is not boolean.
    """
    inside, squares = _flat(mask, tau_B)
    return squares[..., inside].mean(-1) / squares.mean(-1)


def cohens_d(mask: Tensor, tau_B: Tensor) -> Tensor:
    """Difference of the mean sizes of tau_B inside and outside of a mask, in standard deviations.

    (mean_in - mean_out) / sqrt((var_in + var_out) / 2 + 1e-12), population variances. Arguments,
    shapes and errors as in `enrichment`; NaN where the mask is empty or full.
    """
    inside, squares = _flat(mask, tau_B)
    a, b = squares[..., inside].sqrt(), squares[..., ~inside].sqrt()
    if a.shape[-1] == 0 or b.shape[-1] == 0:
        return torch.full_like(squares[..., 0], math.nan)
    spread = ((a.var(-1, correction=0) + b.var(-1, correction=0)) / 2 + 1e-12).sqrt()
    return (a.mean(-1) - b.mean(-1)) / spread


def permutation_test(
    mask: Tensor, tau_B: Tensor, repeats: int = 1000, *, generator: Generator = None
) -> Tensor:
    """One-sided p-value of an enrichment: how often a random mask of the same size has at least as much.

    p = (number of random masks with an enrichment >= the observed one, plus 1) / (repeats + 1), so
    the smallest possible value is 1 / (repeats + 1). Several tasks share the same random masks.
    Costs `repeats` permutations of d numbers.

    Args:
        mask, tau_B: as in `enrichment`.
        repeats: number of random masks.
        generator: draws them.

    Returns:
        [...] in float64; NaN where the enrichment is.

    Raises:
        MergeError: as `enrichment`, or repeats is below 1.
    """
    if repeats < 1:
        raise MergeError(f"repeats={repeats}: must be at least 1")
    inside, squares = _flat(mask, tau_B)
    size, d = int(inside.sum()), len(inside)
    # Equal sums in another order differ by rounding, and must count as equal.
    observed = squares[..., inside].sum(-1) * (1 - 1e-12)
    device = generator.device if generator else torch.device("cpu")
    at_least = torch.zeros_like(observed)
    for _ in range(repeats):
        chosen = torch.randperm(d, generator=generator, device=device)[:size].to(squares.device)
        at_least += squares[..., chosen].sum(-1) >= observed
    undefined = (squares.sum(-1) == 0) | (size == 0)
    return ((at_least + 1) / (repeats + 1)).masked_fill(undefined, math.nan)


def _flat(mask: Tensor, tau_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mask [d] and squares of tau_B [..., d] in float64."""
    if mask.dtype != torch.bool or tau_B.shape[max(0, tau_B.ndim - mask.ndim) :] != mask.shape:
        raise MergeError(
            f"mask {mask.dtype} {tuple(mask.shape)} does not fit tau_B {tuple(tau_B.shape)}: use a "
            "boolean mask with the shape of the weight"
        )
    lead = tau_B.shape[: tau_B.ndim - mask.ndim]
    return mask.flatten(), tau_B.double().square().reshape(*lead, mask.numel())


def benjamini_hochberg(p: Tensor) -> Tensor:
    """P-values adjusted for multiple tests by Benjamini and Hochberg's step-up procedure.

    Rejecting where the result is at most q keeps the expected share of false discoveries at q or less,
    for independent (or positively dependent) tests. Source: Benjamini and Hochberg 1995.

    Args:
        p: p-values, any shape; NaN marks a test that was not made: it does not count and stays NaN.

    Returns:
        Adjusted p-values in p's shape, float64.

    Raises:
        MergeError: a p-value lies outside 0..1.
    """
    if bool(((p < 0) | (p > 1)).any()):
        raise MergeError("p-values must lie between 0 and 1")
    adjusted = p.to(torch.float64, copy=True).flatten()
    made = ~adjusted.isnan()
    values, order = adjusted[made].sort(descending=True)
    ranks = torch.arange(len(values), 0, -1, device=values.device)
    steps = (values * len(values) / ranks).clamp(max=1)
    result = torch.empty_like(values)
    result[order] = torch.cummin(steps, 0).values if len(steps) else steps
    adjusted[made] = result
    return adjusted.view(p.shape)


# ---- Ablation ------------------------------------------------------------------------------------


def overwrite(weights: State, masks: State, values: State) -> dict[str, Tensor]:
    """State dict with `values` where a mask is true and `weights` elsewhere.

    The groups of the ablation all have this form, applied to A's fine-tuned weights: `values` are the
    pre-trained weights (G1), those plus alpha * tau_B (G2, G3, G6), or plus noise (G7, G8).

    Args:
        weights: name -> tensor.
        masks: name -> boolean mask; tensors without a mask are copied.
        values: name -> tensor for every mask, cast to the weight's dtype.

    Returns:
        New tensors for all names of `weights`; nothing is shared with or changed in the inputs.

    Raises:
        MergeError: a mask's name is missing in weights or values, or a shape or dtype does not fit.
    """
    unknown = [name for name in masks if name not in weights or name not in values]
    if unknown:
        raise MergeError(f"masks name {_listing(unknown)}, which weights or values lack")
    for name, mask in masks.items():
        shapes = {tuple(x.shape) for x in (mask, weights[name], values[name])}
        if mask.dtype != torch.bool or len(shapes) > 1:
            raise MergeError(f"'{name}': need a boolean mask and equal shapes, not {shapes}")
    return {
        name: torch.where(masks[name], values[name].to(x), x) if name in masks else x.clone()
        for name, x in weights.items()
    }
