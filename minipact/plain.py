"""Model merging as equations: every method of minipact, plainly, in one file that needs torch only.

W0 [m, n] is a pre-trained weight, D [T, m, n] its T task matrices W_t - W0; a layer computes W x. A purifier
cleans D, a rule turns it into one update [m, n], and `merge` does both for a whole model:

    merged = merge(base, [cars, signs], rule="tsv_m", purify=["pact"], scale=1.0)

Copy this file. It checks nothing, takes full SVDs, and holds the models in memory; the package has the same
methods with the same names, options and defaults, checked, faster, and streamed.
"""

import re

import torch
from torch.nn.functional import pad

# ---- Singular vectors, in float64; directions are columns ----------------------------------------


def svd(x, tol, rank=None):
    """U [m, k], S [k], V [n, k]: leading singular triples of x [m, n], all with S > tol S_1."""
    U, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    k = int((S > tol * S[:1]).sum())
    if rank is not None:
        k = min(k, count(rank, len(S), S[:k]))
    return U[:, :k], S[:k], Vh[:k].mT


def count(rank, size, S):
    """How many directions a rank means: a count, a share of size, or "energy:0.85" of sum S^2."""
    if isinstance(rank, str):
        held = S.square().cumsum(0) / S.square().sum()
        return int((held < float(rank.removeprefix("energy:"))).sum()) + 1
    if isinstance(rank, float):
        return max(1, int(rank * size + 1e-9))
    return rank


def roundoff(x):
    """The share of the largest singular value below which a direction of x is rounding."""
    return 1e-12 if x.dtype == torch.float64 else 1e-5


def basis(A, tol):
    """Orthonormal basis of the span of A's columns, by rank: QR would return a full one."""
    if A.norm() <= 1e-6:  # an update that covers the whole core leaves only rounding of it
        return A[:, :0]
    return svd(A, max(tol, 1e-12))[0]


def polar(A, tol):
    """U V^T of A = U S V^T on its range; completing it would fill what PACT cleared."""
    U, _, V = svd(A, tol)
    return U @ V.mT


def unit(D):
    """Each task matrix over its norm, in float64; zero stays zero."""
    norms = D.double().norm(dim=(1, 2), keepdim=True)
    return D.double() / norms.where(norms > 0, 1)


# ---- Purifiers: (W0, D) -> D or D -> D -----------------------------------------------------------


def pact(W0, D, *, core=0.05, task=0.04, tol=1e-3, strength=1.0):
    """PACT: keep each task off the load-bearing walls of the others (Shi et al. 2026).

    A task's wall is the part of the core V0 that its own update leaves alone. K, k and p count directions
    of the core, of an update, and of a shield, the union of all other tasks' walls; one task has none.
    """
    V0 = svd(W0, roundoff(W0), core)[2]  # [n, K]
    updates = [svd(d, roundoff(d), task)[2] for d in D]  # [n, k] each
    walls = [basis(V0 - V @ (V.mT @ V0), tol) for V in updates]
    filtered = []
    for j, d in enumerate(D):
        others = [V0[:, :0], *walls[:j], *walls[j + 1 :]]
        shield = basis(torch.cat(others, dim=1), tol).to(d)  # [n, p]
        filtered.append(d - strength * d @ shield @ shield.mT)
    return torch.stack(filtered)


def sift(W0, D, *, core=0.05):
    """SIFT: take the pre-trained core out of every task (Shi et al. 2026)."""
    V0 = svd(W0, roundoff(W0), core)[2].to(D)
    return D - D @ V0 @ V0.mT


def dare(D, p=0.9, *, rescale=True, generator=None):
    """DARE: drop each entry of D [T, ...] with probability p, rescale the rest (Yu et al. 2024)."""
    draws = torch.stack([torch.rand(d.shape, generator=generator) for d in D])
    kept = torch.where(draws.to(D.device) >= p, D, 0)
    return kept / (1 - p) if rescale else kept


def wiener(D, *, claims=30.0, ridge=1.0, side="both"):
    """Weigh what each task needs against what the others claim, on both sides (minipact, unpublished).

    X_j minimises |A^(1/2) (X - D_j) a^(1/2)|^2 + claims |B^(1/2) X b^(1/2)|^2. On the output side C_i is
    D_i D_i^T with mean eigenvalue 1, A = C_j + ridge I and B the mean of the other C_i; a and b are the same
    of the input side, D_i^T D_i. A side that is left out has identities.
    """
    if len(D) == 1:
        return D
    ones = torch.ones(D.shape[1:]).to(D.device, torch.float64)
    e, Q = seats(D, ridge) if side != "input" else (ones[:, 0], torch.diag(ones[:, 0]))
    f, R = seats(D.mT, ridge) if side != "output" else (ones[0], torch.diag(ones[0]))
    X = Q @ D.double() @ R.mT / (1 + claims * e[..., None] * f[..., None, :])
    X = torch.linalg.solve(Q, X)
    return torch.linalg.solve(R, X.mT).mT.to(D)


def seats(D, ridge):
    """e [T, m] and Q [T, m, m] with A = Q^T Q and B = Q^T diag(e) Q, see `wiener`."""
    E = unit(D)
    C = D.shape[1] * E @ E.mT
    L = torch.linalg.cholesky(C + ridge * torch.eye(D.shape[1]).to(C))
    B = (C.sum(0) - C) / (len(D) - 1)
    half = torch.linalg.solve_triangular(L, B, upper=False).mT
    e, U = torch.linalg.eigh(torch.linalg.solve_triangular(L, half, upper=False))
    return e, (L @ U).mT


# ---- Rules: D -> one update ----------------------------------------------------------------------


def task_arithmetic(D, reduce="sum"):
    """The sum or the mean of the task vectors D [T, ...] (Ilharco et al. 2023)."""
    return D.sum(0) if reduce == "sum" else D.mean(0)


def ties(D, density=0.2, reduce="mean"):
    """TIES: trim small entries of D [T, ...], elect a sign, merge what agrees (Yadav et al. 2023)."""
    flat = D.reshape(len(D), D[0].numel())
    kept = max(1, int(density * flat.shape[1] + 1e-9))
    floor = flat.abs().topk(kept).values[:, -1:]
    trimmed = torch.where(flat.abs() >= floor, flat, 0)
    sign = trimmed.sum(0).sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0)
    if reduce == "max":
        merged = sign * agreeing.abs().amax(0)
    elif reduce == "sum":
        merged = agreeing.sum(0)
    else:
        merged = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    return merged.view_as(D[0])


def tsv_m(D, *, rank=None):
    """TSV-Merge: truncate each task, whiten all singular vectors, add (Gargiulo et al. 2025)."""
    k = max(1, min(D[0].shape) // len(D)) if rank is None else rank
    triples = [svd(d, roundoff(D), k) for d in D]
    U, S, V = (torch.cat(parts, dim=-1) for parts in zip(*triples, strict=True))
    return (polar(U, roundoff(D)) * S @ polar(V, roundoff(D)).mT).to(D)


def iso_c(D, *, mean_over="all"):
    """Iso-C: the sum of the tasks with a flat spectrum (Marczak et al. 2025)."""
    U, S, V = svd(D.sum(0), roundoff(D))
    return (mean_singular_value(S, D, mean_over) * U @ V.mT).to(D)


def iso_cts(D, common=0.8, *, mean_over="all"):
    """Iso-CTS: common directions and some of each task's own, flat (Marczak et al. 2025)."""
    size = min(D[0].shape)
    own = min(round((size - int(size * common)) / len(D)), (size - 1) // len(D))
    U0, S0, V0 = svd(D.sum(0), roundoff(D), size - own * len(D))
    triples = [(U0, S0, V0)]
    for d in D.double():
        U, S, V = svd(d - U0 @ (U0.mT @ d), roundoff(D), own)
        real = S > roundoff(D) * d.norm()  # where d lies in the common part, the rest is rounding
        triples.append((U[:, real], S[real], V[:, real]))
    U, S, V = (torch.cat(parts, dim=-1) for parts in zip(*triples, strict=True))
    flat = polar(U, roundoff(D)) @ polar(V, roundoff(D)).mT
    return (mean_singular_value(S, D, mean_over) * flat).to(D)


def mean_singular_value(S, D, mean_over):
    """Over all min(m, n) singular values as published, or over those that are not rounding."""
    return S.sum() / (min(D[0].shape) if mean_over == "all" else max(1, len(S)))


def wudi(D, *, ridge=1e-3):
    """WUDI: do on each task's own inputs, for which its update stands, what that does (Cheng et al. 2025).

    The M with the least sum_i |(M - D_i) D_i^T|^2 / |D_i|^2, solved exactly where the paper descends;
    RegMean with D_i^T D_i for the covariance of the inputs. ridge is in units of its mean eigenvalue.
    """
    if not D.any():
        return D.sum(0)
    E = unit(D)
    F = (E @ D.double().mT).flatten(0, 1)  # [T m, m]: E M^T = F is to hold
    E = E.flatten(0, 1)  # [T m, n]
    if ridge == 0:
        U, S, V = svd(E, roundoff(D))
        return (F.mT @ U / S @ V.mT).to(D)
    G = E.mT @ E
    G += ridge * G.trace() / len(G) * torch.eye(len(G)).to(G)
    return torch.linalg.solve(G, F.mT @ E, left=False).to(D)


def ace(D, *, epsilon=1e-2):
    """ACE-Merging: covariances from updates centred over the outputs (CVPR 2026, arXiv 2603.02945).

    As in the authors' code. Ours: an update without a covariance, zero or with equal rows, is left out, a
    single one is not uneven, and directions of rounding size get nothing.
    """
    X = D.double()
    Z = X - X.mean(1, keepdim=True)
    seen = Z.norm(dim=(1, 2)) > roundoff(D) * X.norm(dim=(1, 2))
    X, Z = X[seen], Z[seen]
    if not len(X):
        return torch.zeros_like(D[0])
    squares = X.square().sum((1, 2))
    logs = squares.log()
    uneven = len(X) > 1 and logs.var() > 0.3 * (logs.mean() ** 2 + 1e-12)
    traces, size = Z.square().sum((1, 2), keepdim=True), squares.mean()
    if not uneven:
        traces, size = torch.ones_like(traces), 1
    C = Z.mT @ Z / traces  # [T, n, n]
    loaded = C + epsilon / traces * torch.eye(C.shape[-1]).to(C)
    shared = C.sum(0).mean(0) / size  # [n], added to every row
    M = torch.linalg.solve(loaded.sum(0) + shared, (Z @ loaded).sum(0), left=False)
    if uneven:
        fused = M + (X @ (C - loaded.mean(0))).sum(0)
        U, S, V = svd(fused, roundoff(D), 0.3)
        M = M + S.sum() / count(0.3, min(M.shape), S) * U @ V.mT
    return M.to(D)


# ---- A model per task ----------------------------------------------------------------------------


def tsv_compress(D, *, rank=None):
    """TSV-Compress: U [T, m, k], S [T, k], V [T, n, k] of each task (Gargiulo et al. 2025)."""
    k = max(1, min(D[0].shape) // len(D)) if rank is None else rank
    triples = [svd(d, roundoff(D), k) for d in D]
    widest = max(len(S) for _, S, _ in triples)
    U, S, V = (
        torch.stack([pad(x, (0, widest - x.shape[-1])) for x in parts]).to(D)
        for parts in zip(*triples, strict=True)
    )
    return U, S, V


def tsv_decompress(U, S, V):
    """The task matrices [T, m, n] again, as far as their triples hold them."""
    return U * S.unsqueeze(-2) @ V.mT


# ---- Whole models --------------------------------------------------------------------------------

PURIFIERS = (pact, sift, dare, wiener)
RULES = (task_arithmetic, ties, tsv_m, iso_c, iso_cts, wudi, ace)
METHODS = {f.__name__: f for f in (*PURIFIERS, *RULES)}
FLAT = ("dare", "task_arithmetic", "ties")  # these act on all tensors, the others on matrices
BASED = ("pact", "sift")  # purifiers that look at W0
SIDED = ("wudi", "ace")  # rules that tell inputs from outputs
TABLES = ("text_projection", "token_embedding", "embed_tokens", "word_embeddings", "wte.")
TRANSPOSED = re.compile(r"(^|visual\.)proj$|(^|\.)h\.\d+\.(attn|mlp)\.c_(attn|fc|proj)\.weight")


def kind(name, x):
    """How a tensor is treated: as "matrix", "matrix_T" (stored for x @ W), "vector" or "copy"."""
    if not x.is_floating_point() or name.endswith(("running_mean", "running_var")):
        return "copy"
    if x.ndim != 2 or any(table in name for table in TABLES):
        return "vector"
    return "matrix_T" if TRANSPOSED.search(name) else "matrix"


def wide(x, device):
    """x on the device, in float32 or wider."""
    return x.to(device, torch.promote_types(x.dtype, torch.float32))


def purified(D, W0, how, purify, run):
    """D behind all purifiers; those for matrices see inputs as columns."""
    for name in purify:
        inputs = (W0, D) if name in BASED else (D,)
        if name in FLAT or how == "matrix":
            D = run(name, *inputs)
        elif how == "matrix_T":
            D = run(name, *(x.mT for x in inputs)).mT
    return D


def merged_by(rule, D, kinds, run):
    """One update for each tensor; a flat rule sees them all as one, a sided one inputs as columns."""
    if rule not in FLAT or not D:
        return {n: merged_alone(rule, d, kinds[n], run) for n, d in D.items()}
    sizes = [d[0].numel() for d in D.values()]
    rows = [d.reshape(len(d), size) for d, size in zip(D.values(), sizes, strict=True)]
    parts = run(rule, torch.cat(rows, dim=1)).split(sizes)
    return {n: part.view_as(D[n][0]) for n, part in zip(D, parts, strict=True)}


def merged_alone(rule, D, how, run):
    """One update for one tensor, by a rule on matrices."""
    if how == "vector":
        return D.mean(0)
    if how == "matrix_T" and rule in SIDED:
        return run(rule, D.mT).mT
    return run(rule, D)


@torch.no_grad()
def merge(base, tasks, *, rule, scale, purify=(), vectors="auto", options=None, device="cpu"):
    """Merge state dicts: base + scale * rule(purified task vectors), a new state dict.

    Args:
        base, tasks: name -> tensor, and a list of such with the same names and shapes.
        rule, purify: names in METHODS; options is {name: {option: value}}.
        vectors: what becomes of tensors that are no matrices. "rule": as published, a flat rule acts on
            them too, other rules take scale * mean. "mean": the unscaled mean of the task vectors. "copy":
            nothing. A number: so much of their sum, unscaled. "auto": "mean" where a method acts on
            matrices, there are several tasks and scale is not negative, else "rule".
    """

    def run(method, *inputs):
        return METHODS[method](*inputs, **(options or {}).get(method, {}))

    if vectors == "auto":
        spectral = {rule, *purify}.difference(FLAT)
        vectors = "mean" if spectral and len(tasks) > 1 and scale >= 0 else "rule"
    share = {"mean": 1 / len(tasks), "copy": 0}.get(vectors, vectors)
    kinds = {n: kind(n, x) for n, x in base.items()}
    D, update = {}, {}
    for n in [n for n in base if kinds[n] != "copy"]:
        W0 = wide(base[n], device)
        d = torch.stack([wide(task[n], device) - W0 for task in tasks])
        if kinds[n] == "vector" and vectors != "rule":
            update[n] = share * d.sum(0)
        else:
            D[n] = purified(d, W0, kinds[n], purify, run)
    update |= {n: scale * x for n, x in merged_by(rule, D, kinds, run).items()}
    merged = {n: x.clone() for n, x in base.items()}
    if scale == 0:
        return merged
    return merged | {n: (wide(base[n], device) + x).to(base[n]) for n, x in update.items()}
