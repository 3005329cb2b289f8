"""Model merging as equations: every method of minipact, plainly, in one file that needs torch only.

W0 [m, n] is a pre-trained weight, D [T, m, n] its T task matrices W_t - W0; a layer computes W x. A purifier
cleans D, a rule turns it into one update [m, n], and `merge` does both for a whole model:

    merged = merge(base, [cars, signs], rule="tsv_m", purify=["pact"], scale=1.0)

Copy this file. It checks nothing, takes full SVDs, and holds the models in memory; the package has the same
methods, checked, faster, and streamed: with the same names and defaults, and options that are not here, such
as svd="randomized" of matrices or the scope of a purifier.
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


def dare(D, p=0.2, *, rescale=True, generator=None):
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


def awd(D, *, alpha=0.1, lr=0.01, iterations=300):
    """AWD: take off what makes the tasks D [T, ...] alike, all tensors as one vector (Xiong et al. 2024).

    Gradient descent from delta = 0 on mean |cos(D_i - delta, D_j - delta)| + alpha |delta|. All steps stay
    in the span of the tasks: delta = sum_t c_t D_t, and their inner products G are enough.
    """
    flat = D.reshape(len(D), D[0].numel()).double()
    G = flat @ flat.mT
    seen = (G.diagonal().sqrt() > 1e-6).to(G)  # an update of rounding size has no cosine
    pairs = torch.outer(seen, seen).fill_diagonal_(0)
    c = torch.zeros_like(seen)
    for _ in range(iterations):
        X = torch.eye(len(D)).to(G) - c  # row i: D_i - delta
        products = X @ G @ X.mT
        norms = products.diagonal().sqrt().where(seen > 0, 1)[:, None]
        units, cosines = X / norms, products / (norms * norms.mT)
        signs = pairs * cosines.sign().where(cosines.abs() > 1e-12, 0)
        pulls = (signs @ units - (signs * cosines).sum(1, keepdim=True) * units) / norms
        slope = -2 / pairs.sum().clamp(min=1) * pulls.sum(0)
        length = (c @ G @ c).clamp(min=0).sqrt()
        if length > 1e-12 * G.trace().sqrt():
            slope += alpha * c / length
        c = c - lr * slope
    return D - (c @ flat).view_as(D[0]).to(D)


def tatr(D, q=0.99, *, gradient=None):
    """TATR: keep the share q of entries where tasks D [T, ...] disturb each other least (Sun et al. 2025).

    gradient [T, ...] is the mean magnitude of each task's gradients at the base; without data, |D|.
    """
    sizes = D.abs().double()
    slopes = sizes if gradient is None else gradient
    omega = slopes.sum(0) * sizes.sum(0) - (slopes * sizes).sum(0)  # sum_{i != j} g_i |D_j|
    kept = max(1, int(q * omega.numel() + 1e-9))
    return torch.where(omega <= omega.flatten().sort().values[kept - 1], D, 0)


def pave(D, tuned, covariance, *, rho=0.984375, ridge=0.1):
    """PAVE: cut from the tuned weights [T, m, n] what their own inputs hardly use (arXiv 2510.14697).

    covariance [T, n, n] is the mean of x x^T over the inputs x of each task's layer, C below: the weight
    W C C^{-1} keeps r singular directions of W C.
    """
    C = torch.stack([with_ridge(x.double(), ridge) for x in covariance])
    U, S, Vh = torch.linalg.svd(tuned.double() @ C, full_matrices=False)
    ranks = allocated(S / S[:, :1].where(S[:, :1] > 0, 1), rho)
    gone = [u[:, r:] * s[r:] @ v[r:] for u, s, v, r in zip(U, S, Vh, ranks, strict=True)]
    return (D.double() - torch.stack(gone) @ torch.linalg.inv(C)).to(D)


def with_ridge(C, ridge):
    """C + ridge I; the ridge doubles until the inverse is one."""
    eye = torch.eye(len(C)).to(C)
    while (torch.linalg.inv(C + ridge * eye) @ (C + ridge * eye) - eye).norm() >= 5e-2:
        ridge = 2 * ridge
    return C + ridge * eye


def allocated(S, rho):
    """Directions that each task keeps: the smallest of all S [T, r] goes, until less than rho is left."""
    size = S.shape[1]
    least = max(1, size - round(1.5 * (size - round(size * rho))))
    ranks = [size for _ in S]
    while sum(ranks) >= rho * S.numel() and max(ranks) > least:
        free = [t for t, rank in enumerate(ranks) if rank > least]
        ranks[min(free, key=lambda t: S[t, ranks[t] - 1])] -= 1
    return ranks


# ---- Rules: D -> one update ----------------------------------------------------------------------


def task_arithmetic(D, reduce="sum"):
    """The sum or the mean of the task vectors D [T, ...] (Ilharco et al. 2023)."""
    return D.sum(0) if reduce == "sum" else D.mean(0)


def ties(D, density=0.2, reduce="mean"):
    """TIES: trim small entries of D [T, ...], elect a sign, merge what agrees (Yadav et al. 2023)."""
    flat = D.reshape(len(D), D[0].numel())
    kept = min(max(1, int(density * flat.shape[1] + 1e-9)), flat.shape[1])
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


def consensus(D, lambdas=0.4, *, keep=2):
    """Consensus TA: the sum of the tasks D [T, ...], where `keep` of them need it (Wang et al. 2024)."""
    total = D.sum(0)
    votes = (D.abs() > lambdas * (total - D).abs()).sum(0)  # their TALL masks
    return torch.where(votes >= keep, total, 0)


def tsv_m(D, *, rank=None):
    """TSV-M: truncate each task, whiten all singular vectors, add (Gargiulo et al. 2025)."""
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
    counts = {"all": min(D[0].shape), "range": max(1, len(S))}
    return S.sum() / counts[mean_over]


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


def swudi(D, *, time=1e3, rank=None):
    """SWUDI: WUDI by gradient flow for a finite time (arXiv 2606.07289, built from its abstract).

    With G = sum_i D_i^T D_i / |D_i|^2, the factor 1 / g of an eigen-direction becomes (1 - exp(-time g)) / g,
    time being in units of 1 / G's mean eigenvalue; only the `rank` largest stay.
    """
    if not D.any():
        return D.sum(0)
    E = unit(D)
    F = (E @ D.double().mT).flatten(0, 1)
    E = E.flatten(0, 1)  # E^T E = G
    U, S, V = svd(E, roundoff(D), rank)
    g = S.square() / (E.square().sum() / E.shape[1])
    return (F.mT @ U * (1 - torch.exp(-time * g)) / S @ V.mT).to(D)


def regmean(D, covariance, *, off_diagonal=0.9):
    """RegMean: do on each task's inputs what its update does (Jin et al. 2023).

    covariance [T, n, n] is the mean of x x^T over the inputs x of each task's layer.
    """
    C = covariance.double()
    C = off_diagonal * C + (1 - off_diagonal) * torch.diag_embed(C.diagonal(dim1=1, dim2=2))
    e, V = torch.linalg.eigh(C.sum(0))
    kept = e > (1e-12 if D.dtype == torch.float64 else 1e-7) * e[-1:]
    return ((D.double() @ C).sum(0) @ V[:, kept] / e[kept] @ V[:, kept].mT).to(D)


def fisher_merge(D, fisher):
    """Fisher merging: the mean of D [T, ...] weighted by Fisher information (Matena and Raffel 2022)."""
    F = fisher.double()
    F = F.where(F.sum(0) > 0, 1)
    return ((F * D).sum(0) / F.sum(0)).to(D)


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


def knots(D, density=0.2, reduce="mean", *, merge="ties"):
    """KnOTS: TIES in a basis of outputs that all tasks share (Stoica et al. 2024).

    D is [T, m, n], or {name: [T, m, n]}, whose entries are trimmed as one.
    """
    if torch.is_tensor(D):
        return knots({"": D}, density, reduce, merge=merge)[""]
    bases, R = {}, {}
    for n, d in D.items():
        U, S, _ = torch.linalg.svd(torch.cat([*d.double()], dim=1), full_matrices=False)
        bases[n] = U[:, S > 1e-5]
        R[n] = bases[n].mT @ d.double()  # [T, q, n]: D = U R

    def combined(R):
        return ties(R, density, reduce) if merge == "ties" else task_arithmetic(R, reduce)

    merged = as_one(R, combined)
    return {n: (U @ merged[n]).to(D[n]) for n, U in bases.items()}


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


def tall(D, lambdas=0.4, *, merged="sum", density=0.2):
    """TALL masks: the sum of the tasks D [T, ...], and a mask for each of what serves it (Wang et al. 2024).

    lambdas is one number, or one for each task; merged="ties" takes the sum by TIES.
    """
    M = D.sum(0) if merged == "sum" else ties(D, density, "sum")
    lambdas = torch.as_tensor(lambdas).expand(len(D)).to(D).view(-1, *[1] * M.ndim)
    return M, D.abs() > lambdas * (M - D).abs()


def tall_decompress(merged, masks):
    """What each task gets, [T, ...]."""
    return merged * masks


def emr(D):
    """EMR: elect one vector for the tasks D [T, ...], and mask it for each (Huang et al. 2024)."""
    sign = torch.where(D.mean(0) > 0, 1, -1)  # a zero counts as negative, as in the authors' code
    unified = sign * (sign * D).clamp(min=0).amax(0)
    return unified, D * unified > 0


def emr_rescalers(D, rescale="global"):
    """[T]: what brings each task's masked vector to its own length, over all tensors {name: [T, ...]}."""
    own, left = 0, 0
    for d in D.values():
        unified, masks = emr(d)
        share = max(1, unified.numel()) if rescale == "tensor_mean" else 1
        own = own + torch.stack([x.abs().double().sum() for x in d]) / share
        left = left + torch.stack([(unified.abs() * x).double().sum() for x in masks]) / share
    return torch.where(left > 0, own / left, 1)


def emr_decompress(unified, masks, rescalers):
    """What each task gets, [T, ...]."""
    return unified * masks * rescalers.to(unified).view(-1, *[1] * unified.ndim)


# ---- Whole models --------------------------------------------------------------------------------

PURIFIERS = (pact, sift, dare, wiener, awd, tatr, pave)
FLAT_RULES = (task_arithmetic, ties, consensus, fisher_merge)
RULES = (*FLAT_RULES, tsv_m, iso_c, iso_cts, wudi, swudi, ace, regmean, knots)
METHODS = {f.__name__: f for f in (*PURIFIERS, *RULES)}
FLAT = (
    "dare",
    "awd",
    "tatr",
    *(f.__name__ for f in FLAT_RULES),
)  # on all tensors, not on matrices alone
BASED = ("pact", "sift")  # purifiers that look at W0
SIDED = ("wudi", "swudi", "regmean", "ace", "knots")  # rules that tell inputs from outputs
NEEDS = {
    "regmean": "covariance",
    "fisher_merge": "fisher",
    "pave": "covariance",
}  # statistics of data
TABLES = ("text_projection", "token_embedding", "embed_tokens", "word_embeddings", "wte.")
EXPERTS = re.compile(r"(^|\.)experts\.[^.]+(\.weight)?$")
TRANSPOSED = re.compile(r"(^|visual\.)proj$|(^|\.)h\.\d+\.(attn|mlp)\.c_(attn|fc|proj)\.weight")


def kind(name, x):
    """How a tensor is treated: "matrix", "matrix_T" (stored for x @ W), "stack", "vector" or "copy"."""
    if not x.is_floating_point() or name.endswith(("running_mean", "running_var")):
        return "copy"
    if x.ndim == 3 and EXPERTS.search(name):
        return "stack"
    if x.ndim != 2 or name.endswith("bias") or any(table in name for table in TABLES):
        return "vector"
    return "matrix_T" if TRANSPOSED.search(name) else "matrix"


def wide(x, device):
    """x on the device, in float32 or wider."""
    return x.to(device, torch.promote_types(x.dtype, torch.float32))


def as_one(D, run):
    """run(D [T, d]) on all tensors {name: [T, ...]} side by side, cut into tensors again."""
    if not D:
        return D
    rows = [d.reshape(len(d), d[0].numel()) for d in D.values()]
    parts = run(torch.cat(rows, dim=1)).split([row.shape[1] for row in rows], dim=-1)
    pairs = zip(D.items(), parts, strict=True)
    return {n: part.reshape([*part.shape[:-1], *d.shape[1:]]).to(d) for (n, d), part in pairs}


def turned(x, how):
    """x as layers use it, inputs as columns; or back."""
    return x.mT if how == "matrix_T" else x


def apart(state):
    """A state dict with a name for each matrix of the stacks [E, m, n] that mixtures of experts have."""
    found = {}
    for n, x in state.items():
        found |= {f"{n}[{e}]": y for e, y in enumerate(x)} if kind(n, x) == "stack" else {n: x}
    return found


def kinds_of(base):
    """Kind of each tensor, stacks apart, which are stored for x @ W where their shapes together say so."""
    kinds = {n: kind(n, x) for n, x in base.items()}
    for n in [n for n in base if n.endswith("gate_up_proj[0]")]:
        home = n.removesuffix("gate_up_proj[0]")
        down = base.get(f"{home}down_proj[0]", torch.empty(0, 0))
        if base[n].shape == (down.shape[1], 2 * down.shape[0]):
            kinds |= {m: "matrix_T" for m in base if m.startswith(home) and m.endswith("]")}
    return kinds


def purified(D, W0, kinds, states, name, run):
    """All D behind a purifier; a flat one sees them as one, others matrices with inputs as columns.

    PAVE, the first if it is there, takes the tuned weights, and the matrices that all states have.
    """
    if name in FLAT:
        return as_one(D, lambda d: run(name, d))
    clean = dict(D)
    for n in [n for n in D if kinds[n] != "vector"]:
        inputs = (W0(n), D[n]) if name in BASED else (D[n],)
        if name in NEEDS:
            if not all(n in state for state in states):
                continue
            given = torch.stack([state[n].to(D[n]) for state in states])
            inputs = D[n], W0(n) + D[n], given
        clean[n] = turned(run(name, *(turned(x, kinds[n]) for x in inputs)), kinds[n])
    return clean


def merged_by(rule, D, kinds, run):
    """One update for each tensor; a flat rule sees them all as one, a sided one inputs as columns."""
    if rule in FLAT:
        return as_one(D, lambda d: run(rule, d))
    seen = {n: kinds[n] if rule in SIDED else "matrix" for n in D if kinds[n] != "vector"}
    matrices = {n: turned(D[n], how) for n, how in seen.items()}
    updates = {n: d.mean(0) for n, d in D.items() if n not in seen}
    together = rule == "knots"
    merged = run(rule, matrices) if together else {n: run(rule, d) for n, d in matrices.items()}
    return updates | {n: turned(x, seen[n]) for n, x in merged.items()}


def informed(rule, D, kinds, states, run):
    """One update for each tensor by a rule that takes a statistic of data; the mean where there is none."""
    updates = {n: d.mean(0) for n, d in D.items()}
    acts = [n for n in D if rule in FLAT or kinds[n] != "vector"]
    for n in [n for n in acts if all(n in state for state in states)]:
        how = kinds[n] if rule in SIDED else "matrix"
        given = torch.stack([state[n].to(D[n]) for state in states])
        updates[n] = turned(run(rule, turned(D[n], how), given), how)
    return updates


@torch.no_grad()
def serve(base, tasks, *, rule, options=None):
    """A model per known task: what "tsv_compress", "tall" or "emr" keeps of each, a list of state dicts."""
    options = (options or {}).get(rule, {})
    floats = [n for n, x in base.items() if x.is_floating_point()]
    D = {n: torch.stack([wide(t[n], "cpu") - wide(base[n], "cpu") for t in tasks]) for n in floats}
    shared = {n: d for n, d in D.items() if not n.endswith(("running_mean", "running_var"))}
    if rule == "tall":  # what is not shared stays as it is
        D |= as_one(shared, lambda d: tall_decompress(*tall(d, **options)))
    elif rule == "emr":
        rescalers = emr_rescalers(shared, **options)
        D |= {n: emr_decompress(*emr(d), rescalers) for n, d in shared.items()}
    else:
        matrices = {n: d for n, d in shared.items() if d.ndim == 3}
        D |= {n: tsv_decompress(*tsv_compress(d, **options)) for n, d in matrices.items()}
    models = [{n: x.clone() for n, x in base.items()} for _ in tasks]
    for n, deltas in D.items():
        for model, d in zip(models, deltas, strict=True):
            model[n] = (wide(base[n], "cpu") + d).to(base[n])
    return models


@torch.no_grad()
def merge(
    base,
    tasks,
    *,
    rule,
    scale,
    purify=(),
    vectors="auto",
    options=None,
    statistics=None,
    device="cpu",
):
    """Merge state dicts: base + scale * rule(purified task vectors), a new state dict.

    Args:
        base, tasks: name -> tensor, and a list of such with the same names and shapes.
        rule, purify: names in METHODS; options is {name: {option: value}}.
        vectors: what becomes of tensors that are no matrices. "rule": as published, a flat rule acts on
            them too, other rules take scale * mean. "mean": the unscaled mean of the task vectors. "copy":
            nothing. A number: so much of their sum, unscaled. "auto": "mean" where a method acts on
            matrices, there are several tasks and scale is not negative, else "rule".
        statistics: {"covariance": states} or {"fisher": states} for methods in NEEDS, name -> tensor a task.
    """

    def run(method, *inputs):
        return METHODS[method](*inputs, **(options or {}).get(method, {}))

    if vectors == "auto":
        spectral = {rule, *purify}.difference(FLAT)
        vectors = "mean" if spectral and len(tasks) > 1 and scale >= 0 else "rule"
    share = {"mean": 1 / len(tasks), "copy": 0}.get(vectors, vectors)
    packed = [n for n, x in base.items() if kind(n, x) == "stack"]
    base, *tasks = map(apart, (base, *tasks))
    statistics = {k: [apart(state) for state in states] for k, states in (statistics or {}).items()}
    kinds = kinds_of(base)
    D, update = {}, {}
    for n in [n for n in base if kinds[n] != "copy"]:
        W0 = wide(base[n], device)
        D[n] = torch.stack([wide(task[n], device) - W0 for task in tasks])
        if kinds[n] == "vector" and vectors != "rule":
            update[n] = share * D.pop(n).sum(0)
    for name in purify:
        states = statistics.get(NEEDS.get(name))
        D = purified(D, lambda n: wide(base[n], device), kinds, states, name, run)
    if rule in NEEDS:
        found = informed(rule, D, kinds, statistics[NEEDS[rule]], run)
    else:
        found = merged_by(rule, D, kinds, run)
    update |= {n: scale * x for n, x in found.items()}
    merged = {n: x.clone() for n, x in base.items()}
    if scale != 0:
        merged |= {n: (wide(base[n], device) + x).to(base[n]) for n, x in update.items()}
    for n in packed:
        parts = [m for m in base if m.startswith(f"{n}[")]
        merged[n] = torch.stack([merged.pop(m) for m in parts])
    return merged
