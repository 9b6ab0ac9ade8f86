"""Inverse square roots of covariance matrices, and their derivatives."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _validate
from bnjax._moments import checkpoint_named

# By default, TPUs and GPUs multiply float32 with fewer digits.
matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def whitening_matrix(
    cov: jax.Array,
    *,
    iterations: int | None = 5,
    epsilon: float | jax.Array = 1e-5,
) -> jax.Array:
    r"""The symmetric W for which the covariance of W (x - mean) is about the identity.

    If `iterations` is None, the method is ZCA. With $\Sigma = D \Lambda D^T$,

    $$
    W = D (\Lambda + \epsilon I)^{-1/2} D^T
    $$

    Its derivative is the solution $dW$ of $dW\, R + R\, dW = -W\, d\Sigma\, W$ with
    $R = W^{-1}$. This solution is finite if eigenvalues coincide or vanish, while the
    derivative of an eigendecomposition is not. Derivatives of any order exist. An
    eigenvalue below the rounding error of the largest is set to that error.

    Otherwise, the method is iterative, with $T$ = `iterations` steps of Newton's method
    from $P_0 = I$. With $S = \Sigma + \epsilon I$ and $N = S / \mathrm{tr}(S)$,

    $$
    P_k = (3 P_{k-1} - P_{k-1}^3 N) / 2, \quad W = P_T / \sqrt{\mathrm{tr}(S)}
    $$

    It uses matrix products only, which suits accelerators. A step enlarges $P$ by 3/2
    at most. Directions whose eigenvalue is below $\mathrm{tr}(S) (4/9)^T$ are therefore
    whitened only in part.

    Args:
        cov: covariances, symmetric, shape (..., size, size), float32 or float64. The
            function uses their symmetric part.
        iterations: steps of Newton's method, at least 1; None for ZCA.
        epsilon: added to the diagonal; positive.

    Returns:
        W, of the shape and dtype of `cov`.

    Raises:
        TypeError: if epsilon or iterations is not a number.
        ValueError: if the shape is not (..., size, size), or a number is out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.variants.whitening import whitening_matrix
        >>> cov = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> w = whitening_matrix(cov, iterations=None)
        >>> print((w @ cov @ w).round(3))
        [[1. 0.]
         [0. 1.]]

    References:
        Huang et al. (2018), "Decorrelated Batch Normalization", section 3.2 (ZCA);
        Huang et al. (2019), "Iterative Normalization", Algorithm 1; Higham (2008),
        "Functions of Matrices", section 6.1 (the derivative).
    """
    if cov.ndim < 2 or cov.shape[-1] != cov.shape[-2]:
        raise ValueError(
            f"whitening_matrix: cov has shape {cov.shape}; expected (..., size, size)."
        )
    _validate.check_epsilon(epsilon)
    check_iterations(iterations)
    cov = (cov + cov.mT) / 2
    eye = jnp.broadcast_to(jnp.eye(cov.shape[-1], dtype=cov.dtype), cov.shape)
    epsilon = jnp.asarray(epsilon, cov.dtype)
    if iterations is None:
        values, vectors = jnp.linalg.eigh(lax.stop_gradient(cov))
        least = jnp.finfo(cov.dtype).eps * jnp.max(values, axis=-1, keepdims=True)
        roots = jnp.sqrt(jnp.maximum(values, least) + lax.stop_gradient(epsilon))
        # A remat policy that saves statistics by name saves the decomposition too.
        roots, vectors = checkpoint_named((roots, vectors))
        return _inverse_sqrt(cov + epsilon * eye, roots, vectors)
    cov = cov + epsilon * eye
    trace = jnp.trace(cov, axis1=-2, axis2=-1)[..., None, None]
    # P_k together with N P_k: in exact arithmetic they commute and this is the formula.
    # With P_k alone, rounding errors grow from step to step until they dominate (Higham
    # 2008, section 6.4).
    power, product = eye, cov / trace
    for _ in range(iterations):
        factor = 1.5 * eye - 0.5 * matmul(power, product)
        power, product = matmul(factor, power), matmul(product, factor)
    return power * lax.rsqrt(trace)


def check_iterations(iterations: int | None) -> None:
    """Refuse `iterations` that is neither None nor a positive int."""
    if iterations is None:
        return
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(
            f"batch_norm: iterations={iterations!r}; expected an int, the steps of "
            "Newton's method, such as 5, or None for the eigendecomposition (ZCA)."
        )
    if iterations < 1:
        raise ValueError(
            f"batch_norm: iterations={iterations}; expected at least 1, such as 5, or "
            "None for the eigendecomposition (ZCA)."
        )


@jax.custom_jvp
def _inverse_sqrt(matrix, roots, vectors):
    """The inverse square root of a matrix with given eigenvectors and roots."""
    del matrix
    return matmul(vectors / roots[..., None, :], vectors.mT)


@_inverse_sqrt.defjvp
def _inverse_sqrt_jvp(primals, tangents):
    (matrix, roots, vectors), (dmatrix, *_) = primals, tangents
    roots, vectors = lax.stop_gradient((roots, vectors))
    inverse = _inverse_sqrt(matrix, roots, vectors)
    # W S W = I gives dW (S W) + (W S) dW = -W dS W, and S W = W S is the root. JAX
    # derives the equation, so that a second derivative is as stable.
    root = matmul(matrix, inverse)

    def equation(dinverse):
        return matmul(dinverse, root) + matmul(root, dinverse)

    def solution(_, right):
        right = matmul(vectors.mT, matmul(right, vectors))
        solved = right / (roots[..., :, None] + roots[..., None, :])
        return matmul(vectors, matmul(solved, vectors.mT))

    right = -matmul(inverse, matmul(dmatrix, inverse))
    return inverse, lax.custom_linear_solve(equation, right, solution, symmetric=True)
