"""The CPU time of a step of Celo's own rule, the authors' JAX program, on one square matrix.

A program of its own, for a Python that has jax, dm-haiku, flax, optax, chex and gin-config but not this library::

    python benchmarks/celo_jax.py CELO LEARNED_OPTIMIZATION THETA SIZE

with checkouts of github.com/amoudgl/celo and github.com/google/learned_optimization, and a ``theta.state``. What those
import for logging and for data only is replaced by nothing. The step is compiled, its state donated; one thread.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import types
from pathlib import Path
from unittest import mock

SECONDS, LEAST, MOST = 2.0, 2, 40
"""Of timing; steps at least and at most."""
FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def cpu_ms(celo: str, learned_optimization: str, theta: str, size: int) -> float:
    """Return the least CPU time of a step; call it in a process of its own."""
    os.environ.update(XLA_FLAGS=FLAGS, JAX_PLATFORMS="cpu")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the flags leave XLA some threads
    sys.path[:0] = [learned_optimization, celo]
    for name in ("tensorflow", "tensorflow.compat", "tensorflow.compat.v2"):
        sys.modules[name] = mock.MagicMock()
    summary = types.ModuleType("learned_optimization.summary")
    vars(summary)["summary"] = lambda *arguments, **options: None
    vars(importlib.import_module("learned_optimization"))["summary"] = summary
    sys.modules["learned_optimization.summary"] = summary
    jax, serialization = importlib.import_module("jax"), importlib.import_module("flax.serialization")
    rule = importlib.import_module("celo.optimizers.celo").Celo(train_phase=2, lstm_hidden_size=64, param_inits=1)
    weights = rule.init(jax.random.PRNGKey(0))
    read = serialization.from_bytes(weights, Path(theta).read_bytes())
    weights = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(weights), jax.tree_util.tree_leaves(read))
    optimizer, side = rule.opt_fn(weights), math.isqrt(size)
    state = optimizer.init({"weight": jax.random.normal(jax.random.PRNGKey(1), (side, side))}, num_steps=100)
    grads = {"weight": jax.random.normal(jax.random.PRNGKey(2), (side, side))}
    step = jax.jit(lambda state, grads: optimizer.update(state, grads, loss=1.0), donate_argnums=0)
    found: list[float] = []
    for i in range(3 + MOST):
        begun = time.process_time()
        state = jax.block_until_ready(step(state, grads))
        if i >= 3:  # the first are compiled and warm the memory
            found.append(time.process_time() - begun)
        if len(found) >= LEAST and sum(found) > SECONDS:
            break
    return 1e3 * min(found)


if __name__ == "__main__":
    print(json.dumps(cpu_ms(*sys.argv[1:4], int(sys.argv[4]))))
