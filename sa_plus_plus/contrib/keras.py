"""Keras 3 on its JAX backend: an optax transformation as an optimizer for `model.fit`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax

from sa_plus_plus.averages import Ema


def optax_optimizer(tx: optax.GradientTransformation, name: str = "optax", ema: Ema | None = None) -> Any:
    """A Keras optimizer that applies an optax transformation, so that `model.fit` can prune:

        model.compile(optimizer=optax_optimizer(sapp.sparsify(tx, sp)), loss="mse")
        model.fit(x, y, epochs=10)
        params = {v.path: v.value for v in model.trainable_variables}
        sapp.check_pruned(params, sp.plan(params))

    The transformation sees the trainable variables as a dict keyed by path, `dense/kernel`. Its state is held in Keras
    variables, so that it is jitted, donated and saved with the model. The transformation handles the learning rate,
    clipping, weight decay and accumulation: the corresponding Keras options are not available, and callbacks that set
    the learning rate are refused. A transformation is a function and cannot be written to a file, so load a saved model
    with `keras.models.load_model(path, compile=False)`. To resume training, compile the model again, call
    `model.optimizer.build(model.trainable_variables)`, and only then `model.load_weights(path)`.

    Args:
      tx: any optax transformation; for pruning, what `sparsify` returns.
      name: of the optimizer.
      ema: `sapp.ema(0.999)`, for the model to have the average of its weights when `model.fit` ends, as by Keras's own
        `use_ema`, whose average is not pruned.

    Returns:
      A `keras.optimizers.Optimizer`.

    Raises:
      TypeError: if `tx` is not a transformation, or `ema` not what `sapp.ema` returns.
      ImportError: without Keras.
      RuntimeError: if Keras runs on another backend than JAX.
      ValueError: when it is built, if two variables have the same path.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"optax_optimizer takes an optax transformation such as sapp.sparsify(tx, sp), got {tx!r:.80}")
    if not isinstance(ema, Ema | None):
        raise TypeError(f"optax_optimizer takes ema=sapp.ema(0.999) or None, got ema={ema!r:.80}")
    return _optimizer_class()(tx, name, ema)


def _keras() -> Any:
    try:
        import keras  # noqa: PLC0415 - optional: only its users need it
    except ImportError as error:
        raise ImportError("an optimizer for Keras needs the package keras: pip install keras") from error
    if (backend := keras.backend.backend()) != "jax":
        raise RuntimeError(f"Keras runs on {backend}: set the variable KERAS_BACKEND=jax before Keras is imported")
    return keras


@functools.cache
def _optimizer_class() -> Any:
    base: Any = _keras().optimizers.Optimizer

    def refuse(self: Any, learning_rate: Any) -> None:
        raise ValueError(
            f"the learning rate cannot be set to {learning_rate!r}: it is inside the optax transformation; give that "
            "one a schedule, such as optax.cosine_decay_schedule(...)"
        )

    class OptaxOptimizer(base):
        """Passes all variables through one transformation at once; Keras's own optimizers update them one by one."""

        learning_rate = base.learning_rate.setter(refuse)

        def __init__(self, tx: optax.GradientTransformation, name: str, ema: Ema | None):
            super().__init__(learning_rate=1.0, name=name)  # updates are added as they are
            self._ema = ema
            self._start, self._advance = optax.with_extra_args_support(tx)

        def build(self, variables: Sequence[Any]) -> None:
            if self.built:
                return
            super().build(variables)
            params = self._by_path([variable.value for variable in variables])
            state = self._start(params)
            if self._ema is not None:
                state = state, self._ema.init(params)
            self._order = _order(state, [variable.path for variable in variables])
            self._others = len(self.variables)  # Keras's own, before those of the state
            for leaf in self._leaves(state):
                self.add_variable(leaf.shape, initializer=_constant(leaf), dtype=leaf.dtype.name, name="state")
            self._structure = jax.tree.structure(state)

        def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
            """Update all variables; called by Keras inside and outside its stateless scopes."""
            if trainable_variables is not None:
                self.build(list(trainable_variables))
                by_path = {variable.path: grad for variable, grad in zip(trainable_variables, grads, strict=True)}
                if unknown := by_path.keys() - {variable.path for variable in self._trainable_variables}:
                    raise ValueError(
                        f"this optimizer was built without {min(unknown)!r}: make another for these variables"
                    )
                grads = [by_path.get(variable.path) for variable in self._trainable_variables]
            variables, slots = self._trainable_variables, self.variables[self._others :]
            params, (state, average) = self._by_path([variable.value for variable in variables]), self._states()
            updates, state = self._advance(self._by_path(grads), state, params)
            params = optax.apply_updates(params, updates)
            if self._ema is not None:
                state = state, self._ema.update(average, params)
            for variable in variables:
                variable.assign(params[variable.path])
                if variable.constraint is not None:
                    variable.assign(variable.constraint(variable))
            for variable, leaf in zip(slots, self._leaves(state), strict=True):
                variable.assign(leaf)
            self.iterations.assign_add(1)

        def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
            """Called by Keras at the end of `fit`."""
            if self._ema is None:
                return super().finalize_variable_values(var_list)
            present = self._by_path([variable.value for variable in self._trainable_variables])
            averaged = self._ema.params(self._states()[1], present)
            for variable in self._trainable_variables:
                variable.assign(averaged[variable.path])
            return None

        def _states(self) -> tuple[Any, Any]:
            """The state of the transformation, and that of the average or None."""
            slots = self.variables[self._others :]
            values = {place: variable.value for place, variable in zip(self._order, slots, strict=True)}
            state = jax.tree.unflatten(self._structure, [values[place] for place in range(len(values))])
            return (state, None) if self._ema is None else state

        def _by_path(self, values: Sequence[Any]) -> dict[str, Any]:
            paths = [variable.path for variable in self._trainable_variables]
            if doubled := next((path for path in paths if paths.count(path) > 1), None):
                raise ValueError(f"two variables of the model have the path {doubled!r}: give their layers names")
            return dict(zip(paths, values, strict=True))

        def _leaves(self, state: Any) -> list[jax.Array]:
            leaves = jax.tree.leaves(state)
            return [jax.numpy.asarray(leaves[place]) for place in self._order]

        def get_config(self) -> dict[str, Any]:
            return {"name": self.name}

    return OptaxOptimizer


def _order(state: Any, paths: Sequence[str]) -> list[int]:
    """The order of a state's leaves, independent of the variables' names.

    JAX sorts a dict by its keys, and Keras numbers the layers of a process: `dense_10` sorts before `dense_9`. Files
    hold the values in sequence, and must fit the same model created again.
    """
    numbers = {path: f"{number:09}" for number, path in enumerate(paths)}

    def label(keys: tuple[Any, ...]) -> list[str]:
        return [numbers.get(str(getattr(key, "key", "")), str(key)) for key in keys]

    labels = [label(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(state)]
    return sorted(range(len(labels)), key=lambda place: labels[place])


def _constant(value: jax.Array) -> Any:
    return lambda shape, dtype: value
