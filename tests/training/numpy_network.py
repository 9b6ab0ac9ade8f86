"""The paper's network and its gradients in NumPy float64, straight from the paper."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def forward(params, stats, images, *, train, momentum=0.99, epsilon=1e-5):
    """Logits, the new statistics, and what the backward pass needs."""
    z = np.asarray(images, np.float64).reshape(len(images), -1)
    kept, new_stats = [], {}
    for i in range(len(params) // 2 if stats else len(params) - 1):
        below = z
        x = below @ params[f"dense_{i}"]["kernel"]
        if not stats:
            z = sigmoid(x + params[f"dense_{i}"]["bias"])
            kept.append((below, z, None, None))
            continue
        name, m = f"bn_{i}", len(x)
        mean, var = stats[name]["mean"], stats[name]["var"]
        if train:
            mu, sigma2 = x.mean(axis=0), ((x - x.mean(axis=0)) ** 2).mean(axis=0)
            new_stats[name] = {
                "mean": momentum * mean + (1 - momentum) * mu,
                "var": momentum * var + (1 - momentum) * sigma2 * m / (m - 1),
            }
            mean, var = mu, sigma2
        inverse = 1 / np.sqrt(var + epsilon)
        xhat = (x - mean) * inverse
        z = sigmoid(params[name]["scale"] * xhat + params[name]["bias"])
        kept.append((below, z, xhat, inverse))
    logits = z @ params["logits"]["kernel"] + params["logits"]["bias"]
    return logits, new_stats, (kept, z)


def loss_and_gradients(params, stats, images, labels, **options):
    """Mean cross-entropy, accuracy, gradients and new statistics of one batch."""
    logits, new_stats, (kept, top) = forward(
        params, stats, images, train=True, **options
    )
    m = len(labels)
    log_probabilities = log_softmax(logits)
    loss = -log_probabilities[np.arange(m), labels].mean()
    accuracy = (logits.argmax(axis=-1) == labels).mean()
    d_logits = np.exp(log_probabilities)
    d_logits[np.arange(m), labels] -= 1
    d_logits /= m
    gradients = {"logits": {"kernel": top.T @ d_logits, "bias": d_logits.sum(axis=0)}}
    dz = d_logits @ params["logits"]["kernel"].T
    for i in reversed(range(len(kept))):
        below, z, xhat, inverse = kept[i]
        dy = dz * z * (1 - z)
        if xhat is None:
            dx = dy
            gradients[f"dense_{i}"] = {"bias": dx.sum(axis=0)}
        else:
            name = f"bn_{i}"
            gradients[name] = {
                "scale": (dy * xhat).sum(axis=0),
                "bias": dy.sum(axis=0),
            }
            dxhat = dy * params[name]["scale"]
            centered = xhat / inverse
            dvar = (dxhat * centered).sum(axis=0) * -0.5 * inverse**3
            dmu = -dxhat.sum(axis=0) * inverse + dvar * (-2 * centered).mean(axis=0)
            dx = dxhat * inverse + dvar * 2 * centered / m + dmu / m
            gradients[f"dense_{i}"] = {}
        gradients[f"dense_{i}"]["kernel"] = below.T @ dx
        dz = dx @ params[f"dense_{i}"]["kernel"].T
    return loss, accuracy, gradients, new_stats
