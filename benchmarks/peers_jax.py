"""The competitors in JAX (Bradbury et al. 2018), written by hand: each gradient is compiled as a whole.

Where an inner loop has many steps it is a ``scan``. *Rematerialised* is the same with ``jax.checkpoint`` around an
inner step, which is then run again on the way back instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.networks import Problem, at
from benchmarks.suite import Call, Competitor, Size, peer

Loss = Callable[[list[Any], Any], Any]
"""Of parameters and a batch."""


def rows(build: Callable[[Size, bool], Call]) -> dict[str, Competitor]:
    """Return the rows of a gradient that ``build(size, rematerialised)`` makes ready."""
    return {
        "JAX, jitted": Competitor(lambda size: build(size, False), "jax", warm_at_size=True),
        "JAX, rematerialised": Competitor(lambda size: build(size, True), "jax", warm_at_size=True),
    }


def ready(size: Size) -> Any:
    """Return the package, set to the size's precision."""
    jax = peer("jax")
    jax.config.update("jax_enable_x64", size.dtype == "float64")
    return jax


def array(x: Tensor) -> Any:
    """Return a copy of a tensor as JAX has it."""
    return peer("jax.numpy").asarray(x.detach().numpy())


def tensors(arrays: Sequence[Any]) -> list[Tensor]:
    """Return copies of arrays as torch has them; this waits until they are computed."""
    return [torch.from_numpy(numpy.array(x)) for x in arrays]


def mlp_loss(activation: Callable[[Any], Any]) -> Loss:
    """Return the mean cross-entropy of a multi-layer perceptron, of parameters in torch's order and shapes."""
    jax, np = peer("jax"), peer("jax.numpy")

    def loss(params: list[Any], batch: Any) -> Any:
        x, classes = batch
        for i in range(0, len(params), 2):
            x = x @ params[i].T + params[i + 1]
            x = activation(x) if i < len(params) - 2 else x
        return -np.take_along_axis(jax.nn.log_softmax(x), classes[:, None], axis=1).mean()

    return loss


def maml(problem: Problem, size: Size, lr: float, *, remat: bool) -> Call:
    """Return MAML on an MLP with ReLU: the meta-gradient of a task, added to the sum so far, is one program."""
    jax = ready(size)
    np, loss = peer("jax.numpy"), mlp_loss(jax.nn.relu)
    start = [array(p) for p in problem.start.values()]
    data = [
        [tuple(map(array, at(examples, task))) for examples in (problem.train, problem.valid)]
        for task in range(size.tasks)
    ]

    def final(params: list[Any], train: Any, valid: Any) -> Any:
        def step(params: list[Any]) -> list[Any]:
            return [p - lr * g for p, g in zip(params, jax.grad(loss)(params, train), strict=True)]

        moved = jax.checkpoint(step) if remat else step
        for _ in range(size.steps):
            params = moved(params)
        return loss(params, valid) / size.tasks

    def add(total: list[Any], train: Any, valid: Any) -> list[Any]:
        return [a + b for a, b in zip(total, jax.grad(final)(start, train, valid), strict=True)]

    added = jax.jit(add, donate_argnums=0)

    def call() -> list[Tensor]:
        total = [np.zeros_like(p) for p in start]
        for train, valid in data:
            total = added(total, train, valid)
        return tensors(total)

    return call


def lstm_training(
    start: list[Tensor], loss: Loss, batch: Callable[[Any], Any], weights: list[Tensor], size: Size, num_tasks: int,
    *, remat: bool,
) -> Call:  # fmt: skip
    """Return the meta-training step of the LSTM optimizer with gradients detached.

    Args:
        start: the optimizee's parameters.
        loss: its loss, a sum over ``num_tasks`` tasks.
        batch: what it is evaluated on at an inner step.
        weights: the optimizer's, as ``nn.LSTMCell`` twice and ``nn.Linear`` hold them.
        size: the size.
        num_tasks: tasks in the optimizee.
        remat: whether steps are rematerialised.
    """
    jax = ready(size)
    np, theta, params = peer("jax.numpy"), [array(w) for w in weights], [array(p) for p in start]
    widths = [int(p.size) for p in params]
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]

    def total(theta: list[Any]) -> Any:
        def step(carry: Any, i: Any) -> Any:
            params, states = carry
            value, grads = jax.value_and_grad(loss)(params, batch(i))
            flat = jax.lax.stop_gradient(np.concatenate([g.ravel() for g in grads]))
            deltas, states = lstm_step(theta, flat, states)
            pieces = np.split(deltas, ends)
            return ([p + d.reshape(p.shape) for p, d in zip(params, pieces, strict=True)], states), value

        zero = np.zeros((sum(widths), theta[1].shape[1]), theta[1].dtype)
        moved = jax.checkpoint(step) if remat else step
        (last, _), losses = jax.lax.scan(moved, (params, [(zero, zero)] * 2), np.arange(size.steps))
        return (losses[1:].sum() + loss(last, batch(size.steps))) / num_tasks

    gradient = jax.jit(jax.grad(total))
    return lambda: tensors(gradient(theta))


def lstm_step(theta: list[Any], grads: Any, states: list[Any]) -> tuple[Any, list[Any]]:
    """Return the deltas (num_coordinates,) and the new states of the LSTM optimizer; see ``workloads_lstm.step_of``."""
    np = peer("jax.numpy")
    tiny, magnitude = numpy.exp(-10.0), np.abs(grads)
    large = magnitude >= tiny
    scale = np.where(large, np.log(np.where(large, magnitude, 1.0)) / 10.0, -1.0)
    signal = np.stack([scale, np.where(large, np.sign(grads), grads / tiny)], axis=1).astype(grads.dtype)
    new = []
    for cell, state in zip((theta[:4], theta[4:8]), states, strict=True):
        new.append(_cell(cell, signal, state))
        signal = new[-1][0]
    return 0.1 * (signal @ theta[8].T + theta[9])[:, 0], new


def _cell(weights: list[Any], signal: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
    jax, np = peer("jax"), peer("jax.numpy")
    (inputs, recurrent, bias, second), (hidden, memory) = weights, state
    i, f, g, o = np.split(signal @ inputs.T + hidden @ recurrent.T + (bias + second), 4, axis=1)
    memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * np.tanh(g)
    return jax.nn.sigmoid(o) * np.tanh(memory), memory


def frozen_lstm(grads: Tensor, weights: list[Tensor], size: Size) -> Call:
    """Return one step of the LSTM optimizer on parameters that begin at zero; the memory that it keeps is there."""
    jax = ready(size)
    np, theta, given = peer("jax.numpy"), [array(w) for w in weights], array(grads)
    zero = np.zeros((size.units, theta[1].shape[1]), given.dtype)

    def step(parameter: Any, states: list[Any]) -> Any:
        deltas, states = lstm_step(theta, given, states)
        return parameter + deltas, states

    moved = jax.jit(step, donate_argnums=(0, 1))
    at_now = moved(np.zeros_like(given), [(zero, zero + 0), (zero + 0, zero + 0)])

    def call() -> list[Tensor]:
        nonlocal at_now
        at_now = moved(*at_now)
        return [torch.from_dlpack(at_now[0].block_until_ready())]

    return call


def adam(start: list[Tensor], data: tuple[Tensor, Tensor], hyper: list[float], size: Size, *, remat: bool) -> Call:
    """Return the gradient of the sum of losses for rate, decays and epsilon of Adam, batches taken in a cycle."""
    jax = ready(size)
    np, loss = peer("jax.numpy"), mlp_loss(jax.nn.sigmoid)
    params, batches = [array(p) for p in start], tuple(map(array, data))

    def batch(i: Any) -> Any:
        return tuple(x[i % len(batches[1])] for x in batches)

    def total(hyper: list[Any]) -> Any:
        def step(carry: Any, i: Any) -> Any:
            params, means, squares = carry
            value, grads = jax.value_and_grad(loss)(params, batch(i))
            return _adam_step(hyper, params, means, squares, grads, (i + 1).astype(hyper[0].dtype)), value

        zeros = [np.zeros_like(p) for p in params]
        moved = jax.checkpoint(step) if remat else step
        (last, _, _), losses = jax.lax.scan(moved, (params, zeros, zeros), np.arange(size.steps))
        return losses[1:].sum() + loss(last, batch(size.steps))

    gradient, given = jax.jit(jax.grad(total)), [np.asarray(x, params[0].dtype) for x in hyper]
    return lambda: tensors(gradient(given))


def _adam_step(
    hyper: list[Any], params: list[Any], means: list[Any], squares: list[Any], grads: list[Any], count: Any
) -> tuple[list[Any], list[Any], list[Any]]:
    np, (lr, beta1, beta2, eps) = peer("jax.numpy"), hyper
    means = [beta1 * m + (1 - beta1) * g for m, g in zip(means, grads, strict=True)]
    squares = [beta2 * v + (1 - beta2) * g * g for v, g in zip(squares, grads, strict=True)]
    # The root's derivative at zero is infinite.
    roots = [np.where(v > 0, np.sqrt(np.where(v > 0, v, 1.0)), 0.0) for v in squares]
    correction1, correction2 = 1 - beta1**count, np.sqrt(1 - beta2**count)
    moved = [p - lr * (m / correction1) / (r / correction2 + eps) for p, m, r in zip(params, means, roots, strict=True)]
    return moved, means, squares
