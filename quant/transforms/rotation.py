"""Random rotations: signs, as of a Hadamard matrix (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 3), and orthogonal matrices.

The same seed gives the same rotation on every device: numbers are drawn on the CPU.

Shape suffixes: n width.
"""

import torch
from torch import Tensor


def random_signs(n: int, seed: int) -> Tensor:
    """1 or -1, each as likely: (n,) float32."""
    return 2.0 * torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) - 1


def random_orthogonal(n: int, seed: int) -> Tensor:
    """An orthogonal matrix, uniform by Haar's measure: (n, n) float64.

    Q of the QR decomposition of a Gaussian matrix with R's diagonal made positive: without that Q is not uniform (F. Mezzadri, "How to generate
    random matrices from the classical compact groups", 2007, section 5).
    """
    return orthonormal(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def orthonormal(matrix_nn: Tensor) -> Tensor:
    """Q of the decomposition Q R with a positive diagonal of R: (n, n). An orthogonal matrix stays the same."""
    Q_nn: Tensor
    Q_nn, R_nn = torch.linalg.qr(matrix_nn)
    return Q_nn * torch.where(R_nn.diagonal() < 0, -1.0, 1.0).to(Q_nn.dtype)
