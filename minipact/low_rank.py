"""Matrices as products of two factors, as LoRA holds them, so that rules need not expand them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix [m, n] = B A from B [m, r] and A [r, n]."""

    b: Tensor
    a: Tensor

    @property
    def shape(self) -> torch.Size:
        """[m, n]."""
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.b.dtype

    @property
    def rank(self) -> int:
        """r, which the rank of the matrix does not exceed."""
        return self.b.shape[1]

    @property
    def mT(self) -> Product:
        """The transpose, A^T B^T."""
        return Product(self.a.mT, self.b.mT)

    def __mul__(self, factor: float) -> Product:
        return Product(self.b * factor, self.a)

    def dense(self) -> Tensor:
        """[m, n]."""
        return self.b @ self.a

    def empty(self) -> Tensor:
        """A tensor of its shape, type and device, of any numbers."""
        return self.b.new_empty(self.shape)

    def thin(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q [m, p], core [p, q] and P [n, q] in float64 with B A = Q core P^T and orthonormal Q, P.

        p and q are r, or m and n where these are less: so the work is O((m + n) r^2), not O(m n min(m, n)).
        """
        q, left = torch.linalg.qr(self.b.double())
        p, right = torch.linalg.qr(self.a.mT.double())
        return q, left @ right.mT, p

    def square(self) -> float:
        """Sum of the squares of all entries."""
        return float(self.thin()[1].square().sum())


class Products:
    """Task matrices D [T, m, n] as a product each, of any ranks; a rule that needs "factors" gets them so."""

    def __init__(self, products: Iterable[Product]) -> None:
        self._products = tuple(products)

    def __iter__(self) -> Iterator[Product]:
        return iter(self._products)

    def __len__(self) -> int:
        return len(self._products)

    def __getitem__(self, task: int) -> Product:
        return self._products[task]

    @property
    def shape(self) -> torch.Size:
        """[T, m, n]."""
        return torch.Size((len(self), *self[0].shape))

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self[0].dtype

    @property
    def mT(self) -> Products:
        """All matrices transposed."""
        return Products(x.mT for x in self)

    def sum(self, dim: int = 0) -> Product:
        """D_1 + .. + D_T as the one product [B_1 .. B_T] [A_1; ..; A_T]."""
        assert dim == 0
        return Product(torch.cat([x.b for x in self], dim=1), torch.cat([x.a for x in self]))

    def mean(self, dim: int = 0) -> Product:
        """The sum over T."""
        return self.sum(dim) * (1 / len(self))

    def dense(self) -> Tensor:
        """[T, m, n]."""
        return torch.stack([x.dense() for x in self])


def expanded(x: Tensor | Product) -> Tensor:
    """A matrix as a tensor."""
    return x.dense() if isinstance(x, Product) else x
