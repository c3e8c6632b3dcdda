"""A network for fast inference, as `specialize` makes it."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sa_plus_plus.sparse.arguments import batch_of, instead, jitted, shape_and_type, shapes
from sa_plus_plus.sparse.comparison import Comparison, notes
from sa_plus_plus.sparse.compiler.executor import Program, run
from sa_plus_plus.sparse.compiler.lowering import CompiledLayer
from sa_plus_plus.sparse.compiler.planned import Choice
from sa_plus_plus.sparse.files import serve
from sa_plus_plus.sparse.ops import native
from sa_plus_plus.text import table


class Network:
    """A network for inputs of one shape; call it like the function that it was made from.

    Attributes:
      choices: one for each dense layer, convolution, other operation with a constant kernel, and attention, in order.
      weights: the first argument of `fn`.
      fn: `fn(weights, *inputs)`, pure: can be jitted with other functions, or exported.
      whole: the network beside the function that it was made from; None if it was not measured.
    """

    def __init__(
        self, program: Program, weights: Sequence[Any], choices: Sequence[Choice], whole: Comparison | None = None
    ):
        self._program = program
        self.choices = tuple(choices)
        self.whole = whole
        self.weights = weights
        self.fn = functools.partial(run, program)
        self._wanted = [(batch_of(v.shape, program.pieces), v.dtype) for v in program.inputs]
        self._jitted, self._arrays = jitted(self.fn, self.weights)

    def __call__(self, *inputs: Any) -> Any:
        leaves, tree = jax.tree.flatten(inputs)
        if tree != self._program.input_tree:
            raise ValueError(f"this network was made for arguments like {self._program.input_tree}, got {tree}")
        got = [(x.shape, x.dtype) if isinstance(x, jax.Array) else shape_and_type(x) for x in leaves]
        want = self._wanted
        if got != want:
            raise ValueError(f"this network was made for {shapes(want)}, got {shapes(got)}: {instead(want, got)}")
        return self._jitted(self._arrays, *inputs)

    def lower(self) -> Any:
        """The program of a call, not compiled yet; once it is, calls need no compiling."""
        return self._jitted.lower(self._arrays, *self.examples)

    @property
    def examples(self) -> tuple[Any, ...]:
        """Shapes and dtypes of its arguments."""
        return jax.tree.unflatten(self._program.input_tree, [jax.ShapeDtypeStruct(*v) for v in self._wanted])

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write it to one file, which `sapp.serve.load` reads without the model's code: `sapp.serve.save(path, self)`.

            >>> import os, tempfile, jax.numpy as jnp, sa_plus_plus as sapp
            >>> network = sapp.specialize(lambda x: x @ (2 * jnp.eye(3)), jnp.ones(3))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     size = network.save(os.path.join(folder, "network"))
            ...     print(sapp.serve.load(os.path.join(folder, "network"))(jnp.ones(3)))
            [2. 2. 2.]

        Args:
          path: of the file.

        Returns:
          The file's size in bytes.

        Raises:
          ValueError: if arguments or results are pytrees that `jax.export` cannot write.
          ImportError: without `safetensors` or `flatbuffers`.
        """
        return serve.save(path, self)

    def __reduce__(self) -> Any:
        """The pickle is the file that `save` writes; it unpickles as a `sapp.serve.Loaded`."""
        return serve.reduced(self)

    def __deepcopy__(self, memo: Any) -> "Network":
        return Network(self._program, jax.tree.map(lambda a: a, self.weights), self.choices, self.whole)

    @property
    def steps(self) -> tuple[str, ...]:
        """What it runs, in order: layers as `dense, residual, relu`, `attention`, and names of JAX's primitives."""
        specs: list[Any] = [getattr(step, "spec", step) for step in self._program.steps]
        return tuple(spec.name for spec in specs)

    def __str__(self) -> str:
        rows = [_cells(choice) for choice in self.choices]
        unused = [name for i, name in enumerate(_HEAD) if i >= 5 and not {row[i] for row in rows} - {"", "-"}]
        if self.whole is None:
            return table(_HEAD, rows, omit=unused)
        times = [f"{1e6 * seconds:,.0f}" for seconds in (self.whole.jitted_seconds, self.whole.fast_seconds)]
        last = ["whole network", "", "", "", "", *times, *[""] * (len(_HEAD) - 7)]
        lines = table(_HEAD, [*rows, last], omit=[name for name in unused if name not in _TIMES])
        return "\n".join([lines, *notes(self.whole, self.choices, self._targets())])

    def _targets(self) -> list[str]:
        """The instructions that products run in here, and the type of their left side: `avx512 (float32)`."""
        dtypes = {step.x.dtype for step in self._program.steps if isinstance(step, CompiledLayer)}
        return [f"{native.target(dtype).name} ({dtype.name})" for dtype in sorted(dtypes, key=str)]


_TIMES = ("traced µs", "compiled µs")
_HEAD = ("layer", "kernel", "rows", "block", "kept", *_TIMES, "runs", "precision", "error", "note")


def _cells(choice: Choice) -> tuple[str, ...]:
    block = "-" if choice.block is None else "×".join(map(str, choice.block))
    times = [
        "-" if np.isnan(seconds) else f"{1e6 * seconds:,.0f}"
        for seconds in (choice.traced_seconds, choice.compiled_seconds)
    ]
    kernel, rows = "×".join(map(str, choice.kernel)), f"{choice.rows:,}" if choice.rows else "-"
    kept = "-" if np.isnan(choice.density) else f"{choice.density:.1%}"
    error = "-" if np.isnan(choice.error) else f"{choice.error:.2g}"
    return (
        choice.layer,
        kernel,
        rows,
        block,
        kept,
        *times,
        choice.runs,
        choice.precision,
        error,
        choice.note,
    )
