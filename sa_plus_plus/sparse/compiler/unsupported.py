"""Constant kernels of a traced network in operations that are not layers, and why they are not."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sa_plus_plus.sparse.compiler.ir import Call, Constant, Traced, Variable

MOST_STEPS = 128  # longest loop that is unrolled
MOST_EXPERTS = 64  # limit on kernels in one batched product; each becomes a layer
MOST_BYTES = 2**28  # limit on kernel bytes that unrolling a loop would duplicate
_PRODUCTS = {"dot_general": "product", "conv_general_dilated": "convolution"}


class Unsupported(NamedTuple):
    """A product with a constant kernel that is not a layer.

    Attributes:
      operation: its name.
      kernel: the constant's shape.
      note: why it is not a layer.
    """

    operation: str
    kernel: tuple[int, ...]
    note: str


def unsupported(call: Call) -> list[Unsupported]:
    """The products of a variable with a constant of at least two axes in an operation, or nested in it."""
    name = call.name
    if name in _PRODUCTS:
        constants = [v for v in call.inputs if isinstance(v, Constant)]
        if len(constants) != 1 or len(constants[0].shape) < 2:
            return []
        return [Unsupported(_PRODUCTS[name], constants[0].shape, _why_not(call, constants[0]))]
    known = [isinstance(v, Constant) for v in call.inputs]
    found = dict.fromkeys(_within(call.name, call.params, known))
    return [Unsupported(_PRODUCTS[inner], shape, _loop(call)) for inner, shape in found]


def _why_not(call: Call, kernel: Constant) -> str:
    if 0 in kernel.shape:
        return "a kernel without weights"
    types = [v.dtype for v in call.inputs]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (*types, call.outputs[0].dtype)):
        return f"computes in {', '.join(dict.fromkeys(np.dtype(dtype).name for dtype in types))}"
    if call.name == "conv_general_dilated":
        constant_image = isinstance(call.inputs[0], Constant)
        return "what is convolved is constant" if constant_image else "a convolution with batch groups"
    (contracted, batch) = call.params["dimension_numbers"]
    side = int(call.inputs[1] is kernel)
    number = int(np.prod([kernel.shape[i] for i in batch[side]]))
    if not contracted[0]:
        return "an outer product"
    return f"{number} kernels in one product" if number > MOST_EXPERTS else "a vector for each element of the batch"


def _loop(call: Call) -> str:
    name = call.name
    if name != "scan":
        return f"within {name}"
    length = call.params["length"]
    return f"within scan, {length} steps" if length > MOST_STEPS else "within scan, too large to be unrolled"


def weights_among(traced: Traced) -> bool:
    """Whether a product or convolution takes its kernel, the second operand, from the network's arguments."""
    arguments = {v for v in traced.inputs if len(v.shape) > 1 and jnp.issubdtype(v.dtype, jnp.floating)}
    for step in traced.steps:
        if not isinstance(step, Call) or not all(isinstance(v, Variable) for v in step.inputs):
            continue
        if step.name in ("transpose", "convert_element_type", "reshape") and step.inputs[0] in arguments:
            arguments.update(step.outputs)
        elif step.name in _PRODUCTS and step.inputs[0] != step.inputs[1] and step.inputs[1] in arguments:
            return True
    return False


def unrolls(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether an operation is a short loop over products with constant kernels; each step becomes a layer."""
    options = eqn.params
    if eqn.primitive.name != "scan" or not {"num_consts", "num_carry", "length", "reverse", "jaxpr"} <= {*options}:
        return False
    if not 0 < options["length"] <= MOST_STEPS or eqn.effects:
        return False
    repeated = [v for v in values[: options["num_consts"]] if isinstance(v, Constant) and len(v.shape) > 1]
    if options["length"] * sum(int(np.prod(v.shape)) * v.dtype.itemsize for v in repeated) > MOST_BYTES:
        return False
    return any(_within("scan", options, [isinstance(v, Constant) for v in values]))


def _within(name: str, options: dict[str, Any], known: Sequence[bool]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Products with constants of at least two axes nested in an operation: their names and the constants' shapes."""
    for program, inputs in _bodies(name, options, known):
        inner = getattr(program, "jaxpr", program)
        constant = {v for v, is_known in zip(inner.invars, inputs, strict=False) if is_known} | {*inner.constvars}
        for eqn in inner.eqns:
            here = [isinstance(atom, core.Literal) or atom in constant for atom in eqn.invars]
            if all(here):
                constant.update(eqn.outvars)
            elif eqn.primitive.name in _PRODUCTS and any(here):
                shape = tuple(eqn.invars[here.index(True)].aval.shape)
                if len(shape) > 1:
                    yield eqn.primitive.name, shape
            else:
                yield from _within(eqn.primitive.name, eqn.params, here)


def _bodies(name: str, options: dict[str, Any], known: Sequence[bool]) -> Iterator[tuple[Any, Sequence[bool]]]:
    """The jaxprs that an operation runs, and which of their arguments are constant."""
    if name == "while":
        first, second = options["cond_nconsts"], options["body_nconsts"]
        yield options["body_jaxpr"], known[first : first + second]  # what is carried varies
    elif name == "scan":
        consts, carried = options.get("num_consts", 0), options.get("num_carry", 0)
        yield options["jaxpr"], [*known[:consts], *[False] * carried, *known[consts + carried :]]
    elif name == "cond":
        for branch in options["branches"]:
            yield branch, known[1:]
    else:
        for value in options.values():
            if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
                yield value, known
