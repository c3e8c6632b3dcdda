"""The axes of every value in a traced function, operation by operation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from sa_plus_plus.reordering import primitives
from sa_plus_plus.reordering.factors import Array, Axis, Factors

_CALLS = """
    pjit jit closed_call core_call composite remat remat2 checkpoint
    custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
"""


class Step(NamedTuple):
    """One operation.

    Attributes:
      values: the axes of its arguments and results.
      pairs: those that it contracts or that number products; None if it is not a product.
      mixed: those along which it computes elements from others: it contracts them, or their order matters to it.
      loops: the numbers of iterations of the loops around it, which all its values depend on.
    """

    values: tuple[Array, ...]
    pairs: tuple[Axis, ...] | None
    mixed: tuple[Axis, ...]
    loops: Axis


class Walk:
    """Walks through a jaxpr, uniting and pinning factors, and records its steps."""

    def __init__(self) -> None:
        self.factors = Factors()
        self.steps: list[Step] = []

    def run(self, closed: Any, arguments: Sequence[Array], loops: Axis = ()) -> list[Array]:
        """The axes of a jaxpr's results.

        Args:
          closed: the jaxpr, with or without its constants.
          arguments: the axes of its arguments.
          loops: as in `Step`.
        """
        program, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        known: dict[Any, Array] = dict(zip(program.invars, arguments, strict=True))
        known |= {variable: self._constant(value) for variable, value in zip(program.constvars, consts, strict=True)}

        def read(atom: Any) -> Array:
            return self._constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in program.eqns:
            values = [read(atom) for atom in eqn.invars]
            mixed: tuple[Axis, ...] = ()
            found = self._inner(eqn, values, loops)
            if found is None:
                before = len(self.factors.pins)
                found = primitives.results(self.factors, eqn, values)
                mixed = (*primitives.contracted(eqn, values), *self.factors.pins[before:])
            self.steps.append(Step((*values, *found), primitives.pairs(eqn, values), mixed, loops))
            known |= dict(zip(eqn.outvars, found, strict=True))
        return [read(atom) for atom in program.outvars]

    def _inner(self, eqn: Any, values: list[Array], loops: Axis) -> list[Array] | None:
        """The axes of the results of an operation that runs other programs; None for any other."""
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS.split():
            inner = next(params[key] for key in ("call_jaxpr", "fun_jaxpr", "jaxpr") if key in params)
            return self.run(inner, values, loops)
        if name == "scan":
            return self._scan(params, values, loops)
        if name == "while":
            return self._while(params, values, loops)
        if name == "cond":
            self.factors.pin_all(values[:1], "it chooses a branch")
            branches = [self.run(branch, values[1:], loops) for branch in params["branches"]]
            return self._same(branches[0], *branches[1:])
        return None

    def _scan(self, params: Any, values: list[Array], loops: Axis) -> list[Array]:
        consts, carried = params["num_consts"], params["num_carry"]
        initial, over = values[consts : consts + carried], values[consts + carried :]
        steps = self.factors.new(params["length"], "a loop runs over it")
        for array in over:
            self.factors.unite(array[0], steps)
        sliced = [array[1:] for array in over]
        found = self.run(params["jaxpr"], [*values[:consts], *initial, *sliced], loops + steps)
        carry = self._same(initial, found[:carried])
        return [*carry, *((steps, *array) for array in found[carried:])]

    def _while(self, params: Any, values: list[Array], loops: Axis) -> list[Array]:
        first, second = params["cond_nconsts"], params["body_nconsts"]
        carry = values[first + second :]
        self.run(params["cond_jaxpr"], [*values[:first], *carry], loops)
        return self._same(carry, self.run(params["body_jaxpr"], [*values[first : first + second], *carry], loops))

    def _same(self, arrays: Sequence[Array], *others: Sequence[Array]) -> list[Array]:
        for other in others:
            for one, two in zip(arrays, other, strict=True):
                for a, b in zip(one, two, strict=True):
                    self.factors.unite(a, b)
        return list(arrays)

    def _constant(self, value: Any) -> Array:
        """The axes of a constant: pinned where its values differ along them."""
        if not np.shape(value):
            return ()
        reason = "along it a constant of the function varies"
        if jax.dtypes.issubdtype(getattr(value, "dtype", np.dtype(float)), jax.dtypes.extended):
            return self.factors.array(np.shape(value), reason)
        array = np.asarray(value)
        varies = [array.size == 0 or (array != array.take([0], axis)).any() for axis in range(array.ndim)]
        return tuple(self.factors.new(n, reason if v else "") for n, v in zip(array.shape, varies, strict=True))
