"""Recipes, one file per kind of run: functions that return a full configuration. Imports the rooms, no rule or family.

A ``Recipe`` is one meta-training, a ``Study`` sets several methods side by side.

A variant calls another and changes a line or two. Each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from learnedopt.core.files import require_name
from learnedopt.core.registry import nearest
from learnedopt.recipes.recipe import HeldOut, MetaLearning, Recipe
from learnedopt.recipes.small import smoke
from learnedopt.recipes.study import Study

_TABLE = {
    "demo": "lstm:demo",
    "lstm-quadratic": "lstm:lstm_quadratic",
    "lstm-mnist": "lstm:lstm_mnist",
    "lstm-mnist-long": "lstm:lstm_mnist_long",
    "tensor-gru-quadratic": "quadratic:tensor_gru_quadratic",
    "pes-quadratic": "evolution:pes_quadratic",
    "es-mnist": "evolution:es_mnist",
    "normalised-mnist": "normalised:normalised_mnist",
    "normalised-mlp-mnist": "normalised:normalised_mlp_mnist",
    "normalised-lstm-mnist": "normalised:normalised_lstm_mnist",
    "general": "general:general",
    "meta-sgd-mnist": "rates:meta_sgd_mnist",
    "bootstrapped-mnist": "bootstrapped:bootstrapped_mnist",
    "meta-sgd-bootstrapped": "bootstrapped:meta_sgd_bootstrapped",
    "recurrent-bootstrapped": "bootstrapped:recurrent_bootstrapped",
    "lstm-mnist-bootstrapped": "bootstrapped:lstm_mnist_bootstrapped",
    "bmg-mnist-permuted": "bmg:bmg_mnist_permuted",
    "bmg-quadratic": "bmg:bmg_quadratic",
    "reweighting-mnist": "reweighting:reweighting_mnist",
    "distill-mnist": "distill:distill_mnist",
    "distill-mnist-ten": "distill:distill_mnist_ten",
    "optimistic-convex": "optimistic:optimistic_convex",
    "ridge": "ridge:ridge",
    "fmrl-convex": "fmrl:fmrl_convex",
    "fmrl-fashion": "fmrl:fmrl_fashion",
    "imaml-regression": "implicit:imaml_regression",
    "learned-loss-sine": "learned_loss:learned_loss_sine",
    "maml-sine": "sine:maml_sine",
    "meta-sgd-sine": "sine:meta_sgd_sine",
    "maml-omniglot": "omniglot:maml_omniglot",
    "maml-omniglot-paper": "omniglot:maml_omniglot_paper",
    "meta-sgd-omniglot": "omniglot:meta_sgd_omniglot",
    "meta-sgd-omniglot-paper": "omniglot:meta_sgd_omniglot_paper",
    "reptile-omniglot": "omniglot:reptile_omniglot",
    "reptile-omniglot-paper": "omniglot:reptile_omniglot_paper",
    "aruba-omniglot": "aruba:aruba_omniglot",
    "imaml-omniglot": "implicit:imaml_omniglot",
    "imaml-omniglot-paper": "implicit:imaml_omniglot_paper",
    "imaml-hf-omniglot": "implicit:imaml_hf_omniglot",
    "imaml-hf-omniglot-paper": "implicit:imaml_hf_omniglot_paper",
    "hyper-fashion": "hyper:hyper_fashion",
    "optimistic-conv": "optimistic_conv:optimistic_conv",
}
"""name -> module in this package:function."""
_registered: dict[str, Callable[[], Recipe | Study]] = {}


def names() -> list[str]:
    """Return the names of all recipes, the users' last."""
    return [*_TABLE, *_registered]


def register(name: str, function: Callable[[], Recipe | Study]) -> None:
    """Add a recipe of your own, so that every command knows it by its name.

    Args:
        name: one that is not taken.
        function: returns the recipe; its first line of documentation says what it trains.

    Raises:
        TypeError: ``name`` is not a string or ``function`` cannot be called.
        ValueError: the name is taken, or could not name a run's folder.

    Example:
        >>> recipes.register("my-lstm", lambda: replace(recipes.meta_training("lstm-quadratic"), name="my-lstm"))
    """
    if not isinstance(cast("object", name), str) or not callable(function):
        raise TypeError(f"register({name!r}, {function!r}): pass a name, and the function that returns the recipe")
    require_name(name, "the recipe's name")
    if name in _TABLE or _registered.get(name, function) is not function:
        raise ValueError(f"the recipe {name!r} is already registered; choose another name")
    _registered[name] = function


def make(name: str) -> Recipe | Study:
    """Return the recipe of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    return _function(name)()


def meta_training(name: str) -> Recipe:
    """Return the recipe of that name, which must be of one meta-training.

    Raises:
        ValueError: there is none, or it is a study.
    """
    recipe = make(name)
    if isinstance(recipe, Study):
        raise ValueError(f"{name!r} is a study of several methods side by side, not one meta-training")
    return recipe


def summary(name: str) -> str:
    """Return what the recipe trains, in one line."""
    return (_function(name).__doc__ or "").partition("\n")[0]


def _function(name: str) -> Callable[[], Recipe | Study]:
    if name in _registered:
        return _registered[name]
    if name not in _TABLE:
        raise ValueError(f"there is no recipe {name!r}{nearest(name, names())} (learnedopt train --list shows all)")
    module, _, function = _TABLE[name].partition(":")
    return getattr(importlib.import_module(f"learnedopt.recipes.{module}"), function)


__all__ = [
    "HeldOut",
    "MetaLearning",
    "Recipe",
    "Study",
    "make",
    "meta_training",
    "names",
    "register",
    "smoke",
    "summary",
]
