"""Training with merging in mind: aTLAS, TaLoS and ATM.

They are no part of `merge`, since they need a model, data and gradients:

    aTLAS    which multiple of which task vector, tensor by tensor?     atlas, Coefficients
    TaLoS    which weights may a task change at all?                    talos_mask, masked
    ATM      how often do tasks meet while they train?                  atm_step

Models, bases and task vectors that are given are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor, nn

from minipact.alignment import Aligned, aligned
from minipact.data_statistics import (
    Batch,
    Parameters,
    drawn_labels,
    evaluation,
    known_classes,
    lifted,
    logits_of,
    on_device,
)
from minipact.errors import MergeError, check_known, listing
from minipact.methods import Function, Method, register
from minipact.steps import Tasks, default_policy, named_tasks
from minipact.tensors import State, add_update, meta_of, task_matrices

Head = Callable[[Tensor], Tensor]
Heads = Mapping[str, Head]
Batches = Iterable[Batch]
Finetune = Callable[[dict[str, Tensor]], State]

OBJECTIVES = ("labels", "entropy")
SCORES = ("logit", "logprob")
SCORED = (nn.Linear, nn.MultiheadAttention, nn.Conv2d, nn.LayerNorm)
DAMPING = 0.1  # of entries that are out already, while the rest is scored

# ---- aTLAS: learned coefficients -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class Coefficients:
    """One factor for each task and tensor, as `atlas` learns them.

    Attributes:
        tasks, names: of the T tasks and of the P tensors, those that `merge` would merge.
        values: C [T, P].
        losses: mean over the steps of each epoch.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    values: Tensor
    losses: tuple[float, ...] = ()

    def apply(self, base: State, tasks: Tasks) -> Mapping[str, Tensor]:
        """base + sum_t C[t] * (task_t - base): a lazy mapping, a tensor is computed when asked for.

        Tensors without a factor are the base's. Raises MergeError where tasks or tensors are not those of the
        coefficients, where C is no finite [T, P], or where models do not fit together.
        """
        named = named_tasks(tasks)
        if tuple(named) != self.tasks:
            raise MergeError(
                f"coefficients are for tasks {listing(self.tasks)}, not {listing(named)}"
            )
        shape = (len(self.tasks), len(self.names))
        if self.values.shape != shape or not torch.isfinite(self.values).all():
            raise MergeError(f"coefficients must be finite and of shape {shape}")
        models = aligned(base, named, _is_learned)
        if unknown := [name for name in self.names if name not in base]:
            raise MergeError(f"the base lacks {listing(unknown)}: is it the right base?")
        columns = self.values.detach().cpu().unbind(1)
        return _Scaled(models.base, models.tasks, dict(zip(self.names, columns, strict=True)))


class _Scaled(Mapping[str, Tensor]):
    """The base plus task vectors, each tensor of each task with its own factor."""

    def __init__(self, base: State, tasks: Mapping[str, State], factors: Parameters) -> None:
        self._base, self._tasks, self._factors = base, tasks, factors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._factors:
            return add_update(name, self._base[name], None, 0.0)
        D = task_matrices(name, self._base, self._tasks)  # [T, ...]
        delta = torch.einsum("t,t...->...", self._factors[name].to(D), D)
        return add_update(name, self._base[name], delta, 1.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def meta(self, name: str) -> Tensor:
        """Shape and dtype of a tensor."""
        return meta_of(self._base, name)


def atlas(
    model: nn.Module,
    base: State,
    tasks: Tasks,
    batches: Batches | Mapping[str, Batches],
    *,
    heads: Heads | None = None,
    objective: str = "labels",
    lr: float = 0.1,
    epochs: int = 10,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    generator: torch.Generator | None = None,
) -> Coefficients:
    """aTLAS: learn how much of each task vector to add to each tensor, from a few examples.

    theta = theta_0 + sum_t C[t, p] tau_t for tensor p. Only C [T, P] is trained, from 0, by AdamW with a
    cosine schedule; backbone, task vectors and heads are frozen. Defaults are those for few shots; on many
    labelled examples of all tasks the paper takes lr=1e-3 and epochs=20. Its code keeps the best epoch by
    accuracy; here the last one is returned. Source: Zhang et al. 2024 (arXiv 2407.02880).

    Args:
        model: maps inputs [N, ...] to logits [N, C], or to what the heads take; it has the base's names.
            Its device does the work and holds base and task vectors. Runs in eval mode, returned as found.
        base, tasks: as in `merge`. What the base does not name, such as a head, stays the model's own.
        batches: pairs (inputs, labels [N]), run through in every epoch; or target -> such batches, whose
            losses are added up. Targets need not be tasks. Held in memory.
        heads: target -> function from the model's output to logits; None where the model gives logits.
        objective: "labels", cross-entropy; "entropy", the mean entropy of the answers, which takes no labels
            and so works on test inputs: ours, the paper has pseudo-labels there.
        lr, epochs, weight_decay: of AdamW. clip: largest norm of the gradient of C.
        generator: draws the order of the batches in each epoch; None keeps theirs.

    Returns:
        Coefficients, whose `apply(base, tasks)` is the model.

    Raises:
        MergeError: models that do not fit together or hold NaN, names that the model lacks, no batches,
            labels or logits that do not fit, an option out of range, or a loss that is not finite.
    """
    check_known("objective", [objective], OBJECTIVES)
    _check_training(lr, epochs, weight_decay, clip)
    models = aligned(base, named_tasks(tasks), _is_learned)
    origin, vectors, rest = _tensors_for(model, models)
    targets = _targets(batches, heads)
    first = next(iter(origin.values()))
    C = first.new_zeros(len(models.tasks), len(origin)).requires_grad_()
    optimizer = torch.optim.AdamW([C], lr=lr, weight_decay=weight_decay)
    count = epochs * max(len(found) for found in targets.values())
    losses: list[float] = []
    with evaluation(model), torch.enable_grad():
        for _ in range(epochs):
            for step in _steps(targets, generator):
                weights = rest | _combined(origin, vectors, C)
                parts = [
                    _loss(model, weights, batch, (heads or {}).get(target), objective)
                    for target, batch in step
                ]
                loss = torch.stack(parts).sum()
                losses.append(_finite(loss, len(losses)))
                # autograd.grad, as backward would leave gradients in heads that are modules
                (C.grad,) = torch.autograd.grad(loss, [C])
                nn.utils.clip_grad_norm_([C], clip)
                optimizer.param_groups[0]["lr"] = lr * _cosine((len(losses) - 1) / count)
                optimizer.step()
    means = torch.tensor(losses).view(epochs, -1).mean(1).tolist() if losses else []
    return Coefficients(tuple(models.tasks), tuple(origin), C.detach(), tuple(means))


def _check_training(lr: float, epochs: int, weight_decay: float, clip: float) -> None:
    if not (0 < lr < math.inf and 0 <= weight_decay < math.inf and clip > 0 and epochs >= 0):
        given = f"lr={lr}, epochs={epochs}, weight_decay={weight_decay}, clip={clip}"
        raise MergeError(f"{given}: lr and clip must be above 0, the others 0 or more")


def _is_learned(name: str, tensor: Tensor) -> bool:
    """Whether a tensor gets factors: where `merge` would merge it, so not where it is a buffer."""
    return tensor.is_floating_point() and default_policy(name, tensor) != "copy"


def _tensors_for(model: nn.Module, models: Aligned) -> tuple[Parameters, Parameters, Parameters]:
    """Base and task vectors [T, ...] by name, and what the model runs with beside; on its device, lifted."""
    base, own = models.base, dict(model.named_parameters())
    known = own | dict(model.named_buffers())
    names = [name for name in base if _is_learned(name, meta_of(base, name))]
    if unknown := [name for name in names if name not in known]:
        hint = "give both the same names, and leave out second copies of tied tensors"
        raise MergeError(f"the model lacks {listing(unknown)}: {hint}")
    if other := [name for name in names if known[name].shape != meta_of(base, name).shape]:
        raise MergeError(f"{listing(other)}: other shapes in the model than in the base")
    if not names:
        raise MergeError("the base has no floating-point tensors to learn factors for")
    device = known[names[0]].device
    vectors = {n: task_matrices(n, base, models.tasks, device=device) for n in names}
    origin = {n: base[n].detach().to(vectors[n]) for n in names}
    copied = {n: base[n].detach().to(device) for n in base if n in known and n not in origin}
    rest = {n: lifted(x.detach()) for n, x in (own | copied).items() if n not in origin}
    return origin, vectors, rest


def _targets(
    batches: Batches | Mapping[str, Batches], heads: Heads | None
) -> dict[str, list[Batch]]:
    """Batches by target, "" for the only one; checked against the heads."""
    by_target = batches if isinstance(batches, Mapping) else {"": batches}
    targets = {str(name): list(found) for name, found in by_target.items()}
    if empty := [name for name, found in targets.items() if not found]:
        where = "" if empty == [""] else f" for {listing(empty)}"
        raise MergeError(f"no batches{where}: training needs at least one")
    if not targets:
        raise MergeError("no batches: training needs at least one")
    if heads is not None and set(heads) != set(targets):
        raise MergeError(f"heads are for {listing(heads)}, batches for {listing(targets)}")
    return targets


def _steps(
    targets: dict[str, list[Batch]], generator: torch.Generator | None
) -> Iterator[list[tuple[str, Batch]]]:
    """The steps of an epoch: one batch of each target, fewer where some have run out."""
    columns = [
        [(target, found[i]) for i in _order(len(found), generator)]
        for target, found in sorted(targets.items())
    ]
    for row in zip_longest(*columns):
        yield [pair for pair in row if pair is not None]


def _order(count: int, generator: torch.Generator | None) -> list[int]:
    if generator is None:
        return list(range(count))
    found: list[int] = torch.randperm(count, generator=generator, device=generator.device).tolist()
    return found


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _combined(origin: Parameters, vectors: Parameters, C: Tensor) -> Parameters:
    """theta_0 + sum_t C[t, p] tau_t for each tensor p."""
    return {
        name: origin[name] + torch.einsum("t,t...->...", c.to(vectors[name]), vectors[name])
        for name, c in zip(origin, C.unbind(1), strict=True)
    }


def _loss(
    model: nn.Module, weights: Parameters, batch: Batch, head: Head | None, objective: str
) -> Tensor:
    """Mean over a batch of the cross-entropy, or of the entropy of the answers."""
    x, y = on_device(batch, next(iter(weights.values())).device)
    logits = _answers(model, weights, x, head)
    if objective == "entropy":
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1).mean()
    if y is None:
        raise MergeError("objective='labels' needs batches of pairs (inputs, labels)")
    return nn.functional.cross_entropy(logits, known_classes(y, len(x), logits.shape[1]))


def _answers(model: nn.Module, weights: Parameters, x: Tensor, head: Head | None) -> Tensor:
    """Logits [N, C] of the model with these weights."""
    found = logits_of(model, weights, x)
    logits = found if head is None else head(found)
    if logits.ndim != 2 or len(logits) != len(x):
        raise MergeError(f"logits are {tuple(logits.shape)} for {len(x)} inputs: need [N, C]")
    return logits


def _finite(loss: Tensor, step: int) -> float:
    found = float(loss.detach())
    if not math.isfinite(found):
        raise MergeError(f"the loss is {found} at step {step}: check inputs, or take a smaller lr")
    return found


# ---- TaLoS: where a task may train ---------------------------------------------------------------


def talos_mask(
    model: nn.Module,
    batches: Batches,
    *,
    head: Head | None = None,
    sparsity: float = 0.9,
    rounds: int = 4,
    score: str = "logit",
    chunk: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """TaLoS: the weights that matter least to the base's answers, which a task may train.

    A weight's score is the sum over samples x of the squared derivative of one class's output, the class
    drawn from the model's own p(y|x). After round q = 1..rounds, a share (1 - sparsity)^(q / rounds) of all
    entries is still in: those that score lowest, by one threshold for the whole model. Entries that are out
    stay out, and count a tenth of their value while the others are scored again. Train inside `masked`.
    Source: Iurada et al. 2025 (arXiv 2504.02620); their code also trains what it does not score.

    Args:
        model: the pre-trained one: inputs [N, ...] to logits [N, C], or to what the head takes; in eval mode,
            returned as found. Scored are weights and biases of nn.Linear, nn.MultiheadAttention, nn.Conv2d
            and nn.LayerNorm that require gradients, so freeze a head that stays as it is.
        batches: inputs, or pairs whose labels are not used; run through in every round, held in memory.
        head: from the model's output to logits [N, C], for one sample too; None where the model gives them.
        sparsity: share of the scored entries that is frozen in the end, in [0, 1); counts are rounded.
        rounds: 1 or more.
        score: "logit", as the released code has it; "logprob" makes it the diagonal Fisher information.
        chunk: samples whose gradients are held at once: chunk times the model's memory.
        generator: draws the classes.

    Returns:
        name of a parameter -> booleans of its shape, True where it may train; others are to stay frozen.

    Raises:
        MergeError: no batches, nothing to score, nothing that would be left to train, logits that are
            not [N, C], scores that are not finite, or an option out of range.
    """
    check_known("score", [score], SCORES)
    if not (0 <= sparsity < 1 and rounds >= 1 and chunk >= 1):
        hint = "sparsity must be in [0, 1), rounds and chunk at least 1"
        raise MergeError(f"sparsity={sparsity}, rounds={rounds}, chunk={chunk}: {hint}")
    kept = list(batches)
    if not kept:
        raise MergeError("no batches: scores need at least one sample")
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in _scored(model).items()}
    total = sum(m.numel() for m in mask.values())
    if round(total * (1 - sparsity)) == 0:
        raise MergeError(f"sparsity={sparsity} leaves none of {total} entries to train")
    with evaluation(model):
        for q in range(1, rounds + 1):
            scores = _scores(model, mask, kept, head, score, chunk, generator)
            mask = _lowest(scores, mask, round(total * (1 - sparsity) ** (q / rounds)))
    return mask


def _scored(model: nn.Module) -> Parameters:
    """Trainable parameters of the layers that TaLoS scores."""
    owned = {
        id(p) for m in model.modules() if isinstance(m, SCORED) for p in m.parameters(recurse=False)
    }
    pairs = model.named_parameters()
    found: Parameters = {n: p for n, p in pairs if id(p) in owned and p.requires_grad}
    if not found:
        kinds = ", ".join(kind.__name__ for kind in SCORED)
        raise MergeError(f"no parameters to score: they are those of {kinds}, with gradients")
    return found


def _scores(
    model: nn.Module,
    mask: Parameters,
    batches: Sequence[Batch],
    head: Head | None,
    score: str,
    chunk: int,
    generator: torch.Generator | None,
) -> Parameters:
    """Sum over samples of the squared derivatives of a drawn class's output, for the masked parameters."""
    everything = {name: lifted(p.detach()) for name, p in model.named_parameters()}
    damped = {n: torch.where(m, everything[n], DAMPING * everything[n]) for n, m in mask.items()}
    rest = {name: x for name, x in everything.items() if name not in mask}

    def output(weights: Parameters, x: Tensor, y: Tensor) -> Tensor:
        logits = _answers(model, rest | weights, x[None], head)
        found = logits.log_softmax(-1) if score == "logprob" else logits
        return found.gather(1, y[None, None]).squeeze()

    per_sample = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0, 0))
    totals = {name: torch.zeros_like(x) for name, x in damped.items()}
    for batch in batches:
        x, _ = on_device(batch, next(iter(damped.values())).device)
        with torch.no_grad():
            p = _answers(model, rest | damped, x, head).softmax(-1)
        y = drawn_labels(p, generator)
        for xs, ys in zip(torch.split(x, chunk), torch.split(y, chunk), strict=True):
            for name, g in per_sample(damped, xs, ys).items():
                totals[name] += g.square().sum(0)
    if bad := [name for name, x in totals.items() if not torch.isfinite(x).all()]:
        raise MergeError(f"scores of {listing(bad)} are not finite: check weights and inputs")
    return totals


def _lowest(scores: Parameters, mask: Parameters, count: int) -> Parameters:
    """The count entries with the lowest scores among those of the mask; the first ones where scores tie."""
    known = [torch.where(mask[n], x.double(), math.inf).flatten() for n, x in scores.items()]
    ranked = torch.cat(known).argsort(stable=True)
    flat = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
    flat[ranked[:count]] = True
    parts = torch.split(flat, [x.numel() for x in scores.values()])
    return {n: part.view_as(x) for (n, x), part in zip(scores.items(), parts, strict=True)}


@contextmanager
def masked(
    model: nn.Module, optimizer: torch.optim.Optimizer, mask: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside, steps of any optimizer move only the entries of the mask; the others keep their bits.

    Gradients of frozen entries are zero as soon as they are computed, so that clipping does not count them;
    after a step their momentum is cleared and their value restored, whatever weight decay did. So the task
    vector is exactly as sparse as the mask. Takes memory for one more copy of the parameters::

        with masked(model, optimizer, talos_mask(model, batches)):
            ...  # the usual loop: loss.backward(), optimizer.step()

    Args:
        model, optimizer: the optimizer's parameters are the model's.
        mask: name -> booleans of the parameter's shape; parameters that it does not name are frozen.

    Raises MergeError where the mask does not fit the model, or the optimizer has other parameters.
    """
    names = {p: name for name, p in model.named_parameters()}
    _check_mask(mask, {name: p for p, name in names.items()})
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if strange := sum(p not in names for p in own):
        raise MergeError(f"{strange} parameters of the optimizer are not the model's")
    held = []
    for p in own:
        free = mask.get(names[p], torch.zeros_like(p, dtype=torch.bool)).to(p.device)
        held.append((p, ~free, p.detach().clone()))
    handles = [
        p.register_hook(partial(_without, frozen)) for p, frozen, _ in held if p.requires_grad
    ]
    restore = partial(_restore, held)
    handles.append(optimizer.register_step_post_hook(lambda optimizer, *_: restore(optimizer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_mask(mask: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    if unknown := [name for name in mask if name not in parameters]:
        raise MergeError(f"the model lacks {listing(unknown)} of the mask")
    if other := [n for n, x in mask.items() if x.shape != parameters[n].shape]:
        raise MergeError(f"mask: {listing(other)} have other shapes than in the model")
    if numbers := [name for name, x in mask.items() if x.dtype != torch.bool]:
        raise MergeError(f"mask: {listing(numbers)} must be booleans")


def _without(frozen: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(frozen, 0)


@torch.no_grad()
def _restore(
    held: Sequence[tuple[Tensor, Tensor, Tensor]], optimizer: torch.optim.Optimizer
) -> None:
    """Values of frozen entries as at the start, and zero for what the optimizer remembers of them."""
    for p, frozen, start in held:
        p.copy_(torch.where(frozen, start, p))
        for x in optimizer.state.get(p, {}).values():
            if isinstance(x, Tensor) and x.ndim > 0 and x.shape == p.shape:  # no counters of steps
                x.masked_fill_(frozen, 0)


# ---- ATM: tuning and merging in turn -------------------------------------------------------------


def atm_step(
    theta: State, finetune_fns: Sequence[Finetune] | Mapping[str, Finetune], alpha: float = 1.0
) -> dict[str, Tensor]:
    """ATM: one round of tuning every task from the same weights and merging what came of it.

    theta + alpha / T sum_t (theta_t - theta), with theta_t what task t makes of theta. When every task takes
    one full-batch step of SGD, that is a gradient step on the mean of the tasks' losses; more steps between
    merges drift away from it. Source: Zhou et al. 2024 (arXiv 2411.03055).

    Args:
        theta: name -> tensor.
        finetune_fns: for each task a function from a copy of theta, its to keep, to the tuned weights. As a
            list or by task; they run one after the other, tasks with names in the order of those.
        alpha: 1 takes the mean of the tuned weights.

    Returns:
        A new state dict in theta's dtypes; what is not floating-point is theta's.

    Raises:
        MergeError: no functions, alpha not finite, or tuned weights that lack a name, differ in shape, or
            hold NaN.
    """
    if not math.isfinite(alpha):
        raise MergeError(f"alpha={alpha}: must be finite")
    pairs = finetune_fns.items() if isinstance(finetune_fns, Mapping) else enumerate(finetune_fns)
    functions = {str(label): function for label, function in pairs}
    if not functions:
        raise MergeError("no functions to fine-tune with: give one for each task")
    if isinstance(finetune_fns, Mapping):
        functions = dict(sorted(functions.items()))
    totals: dict[str, Tensor] = {}
    for label, function in functions.items():
        tuned = function({name: x.detach().clone() for name, x in theta.items()})
        models = aligned(theta, named_tasks({label: tuned}), _is_float)
        for name in [n for n, x in theta.items() if x.is_floating_point()]:
            D = task_matrices(name, models.base, models.tasks)
            totals[name] = totals.get(name, 0) + D[0]
    factor = alpha / len(functions)
    return {name: add_update(name, x, totals.get(name), factor) for name, x in theta.items()}


def _is_float(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point()


# ---- Registry ------------------------------------------------------------------------------------

_SOURCES = {
    "atlas": (atlas, "Zhang et al. 2024, arXiv 2407.02880"),
    "talos": (talos_mask, "Iurada et al. 2025, arXiv 2504.02620"),
    "atm": (atm_step, "Zhou et al. 2024, arXiv 2411.03055"),
}
for _name, (_function, _source) in _SOURCES.items():
    # Listed, but not called by the engine, so what they return need be no tensor.
    register(Method(_name, "training", cast(Function, _function), _source, "tensor"))
