"""Load-bearing weights, one by one: where they are, and what other tasks do to them.

A is the victim task, B an interfering one. Everything here works on state dicts and masks; the Fisher
information that `lbw_mask` asks for comes from `minipact.data_statistics`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minipact.errors import MergeError, listing

State = Mapping[str, Tensor]

OUT_OF_SCOPE = ("head", "norm", "ln_", "logit_scale")
MAX_FOR_QUANTILE = 10_000_000

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
        update, information = _checked(name, tau, fisher)
        small = update < _quantile(update, low, seed, name)
        crucial = small & (information > _quantile(information, high, seed, name))
        safe = small & (information < _quantile(information, low, seed, name))
        size = int(crucial.sum())
        if equalise:
            size = min(size, int(safe.sum()))
            if size == 0:
                continue
            crucial = _draw(crucial, size, seed, name, "crucial")
            safe = _draw(safe, size, seed, name, "safe")
        groups.crucial[name] = crucial
        groups.safe[name] = safe
        groups.random[name] = _draw(torch.ones_like(small), size, seed, name, "random")
        groups.low[name] = _draw(small, size, seed, name, "low")
    if not groups.crucial:
        raise MergeError("no tensor has both crucial and safe weights: are all updates equal?")
    return groups


def _in_scope(name: str, x: Tensor) -> bool:
    if not x.is_floating_point() or x.ndim < 2:
        return False
    return not any(part in name for part in OUT_OF_SCOPE)


def _checked(name: str, tau: State, fisher: State) -> tuple[Tensor, Tensor]:
    """|tau| and Fisher information of one tensor, on the device of tau."""
    if name not in fisher:
        raise MergeError(f"fisher lacks '{name}': use the names of the task vector")
    update = _lift(tau[name]).abs()
    information = _lift(fisher[name]).to(update.device)
    if update.shape != information.shape:
        shapes = f"tau {tuple(update.shape)} and fisher {tuple(information.shape)}"
        raise MergeError(f"'{name}': {shapes} differ")
    if not (torch.isfinite(update).all() and torch.isfinite(information).all()):
        raise MergeError(f"'{name}': tau or fisher holds NaN or infinity")
    return update, information


def _lift(x: Tensor) -> Tensor:
    """Half types and integers in float32, so that sizes and quantiles are exact enough to compare."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _quantile(x: Tensor, q: float, seed: int, name: str) -> Tensor:
    """Quantile over all entries of a tensor, or over a sample of them where there are very many."""
    flat = x.flatten()
    if len(flat) > MAX_FOR_QUANTILE:
        generator = _generator(seed, "quantile", name)
        rows = torch.randint(len(flat), (MAX_FOR_QUANTILE,), generator=generator)
        flat = flat[rows.to(flat.device)]
    return torch.quantile(flat.double(), q).to(x.dtype)


def _draw(among: Tensor, size: int, seed: int, name: str, group: str) -> Tensor:
    """Mask of `size` random entries of a mask.

    Every entry of the tensor gets a random key and the smallest keys win, so that another choice of
    one entry in `among` changes one entry of the result, not the whole draw.
    """
    generator = _generator(seed, group, name)
    keys = torch.rand(among.numel(), generator=generator, dtype=torch.float64)
    keys = keys.masked_fill(~among.flatten().cpu(), math.inf)
    smallest = keys.topk(size, largest=False).indices
    drawn = torch.zeros(among.numel(), dtype=torch.bool)
    drawn[smallest] = True
    return drawn.view(among.shape).to(among.device)


def _generator(seed: int, purpose: str, name: str) -> torch.Generator:
    """CPU generator for one use on one tensor; CRC-32, unlike `hash`, is the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}/{name}".encode()))


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
    a = squares[..., inside].sqrt()
    b = squares[..., ~inside].sqrt()
    if a.shape[-1] == 0 or b.shape[-1] == 0:
        return torch.full_like(squares[..., 0], math.nan)
    variance = (a.var(-1, correction=0) + b.var(-1, correction=0)) / 2
    return (a.mean(-1) - b.mean(-1)) / (variance + 1e-12).sqrt()


def permutation_test(
    mask: Tensor, tau_B: Tensor, repeats: int = 1000, *, generator: torch.Generator | None = None
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
    d, size = len(inside), int(inside.sum())
    # Equal sums in another order differ by rounding, and must count as equal.
    observed = squares[..., inside].sum(-1) * (1 - 1e-12)
    device = generator.device if generator else torch.device("cpu")
    at_least = torch.zeros_like(observed)
    for _ in range(repeats):
        order = torch.randperm(d, generator=generator, device=device)
        chosen = order[:size].to(squares.device)
        at_least += squares[..., chosen].sum(-1) >= observed
    p = (at_least + 1) / (repeats + 1)
    undefined = (squares.sum(-1) == 0) | (size == 0)
    return p.masked_fill(undefined, math.nan)


def _flat(mask: Tensor, tau_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mask [d] and squares of tau_B [..., d] in float64."""
    tasks = max(0, tau_B.ndim - mask.ndim)  # dimensions in front of the weight's own
    if mask.dtype != torch.bool or tau_B.shape[tasks:] != mask.shape:
        raise MergeError(
            f"mask {mask.dtype} {tuple(mask.shape)} does not fit tau_B {tuple(tau_B.shape)}: use a "
            "boolean mask with the shape of the weight"
        )
    squares = tau_B.double().square()
    return mask.flatten(), squares.reshape(*tau_B.shape[:tasks], mask.numel())


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
    if made.any():
        adjusted[made] = _stepped_up(adjusted[made])
    return adjusted.view(p.shape)


def _stepped_up(p: Tensor) -> Tensor:
    """Of p-values [n > 0]: each times n over its rank, but never more than a larger one's result."""
    values, order = p.sort(descending=True)
    ranks = torch.arange(len(values), 0, -1, device=values.device)
    steps = (values * len(values) / ranks).clamp(max=1)
    result = torch.empty_like(values)
    result[order] = torch.cummin(steps, 0).values
    return result


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
        raise MergeError(f"masks name {listing(unknown)}, which weights or values lack")
    for name, mask in masks.items():
        shapes = {tuple(x.shape) for x in (mask, weights[name], values[name])}
        if mask.dtype != torch.bool or len(shapes) > 1:
            raise MergeError(f"'{name}': need a boolean mask and equal shapes, not {shapes}")
    result = {}
    for name, x in weights.items():
        if name in masks:
            result[name] = torch.where(masks[name], values[name].to(x), x)
        else:
            result[name] = x.clone()
    return result
