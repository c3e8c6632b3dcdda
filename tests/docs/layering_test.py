"""Imports go one way, and the library needs nothing but jax, optax and numpy."""

import ast
import sys

import pytest
from commands import ROOT

LIBRARY = (
    "_version",
    "text",
    "timing",
    "progress",
    "files",
    "views",
    "names",
    "layouts",
    "blocks",
    "select",
    "phases",
    "plans",
    "plan_options",
    "cut_off",
    "planning",
    "pruning",
    "sharding",
    "sparsifier",
    "trees",
    "masking",
    "dynamic_sparsity",
    "_composed",
    "compose",
    "registry",
    "algorithms",
    "baselines",
    "recommended",
    "resets",
    "transforms",
    "averages",
    "metrics",
    "checks",
    "shrinking",
    "sparse.csrc.targets",
    "sparse.array",
    "sparse.int8",
    "sparse.arguments",
    "sparse.ops",
    "sparse.ops.activation",
    "sparse.ops.xla",
    "sparse.ops.inference",
    "sparse.ops.native",
    "sparse.ops.pallas",
    "sparse.ops.matmul",
    "sparse.ops.convolution",
    "sparse.compiler",
    "sparse.compiler.ir",
    "sparse.compiler.constants",
    "sparse.compiler.builder",
    "sparse.compiler.unsupported",
    "sparse.compiler.trace",
    "sparse.compiler.conv_geometry",
    "sparse.compiler.attention",
    "sparse.compiler.normalization",
    "sparse.compiler.infer_blocks",
    "sparse.compiler.quantization",
    "sparse.compiler.depthwise",
    "sparse.compiler.planned",
    "sparse.compiler.encodings",
    "sparse.compiler.passes",
    "sparse.compiler.passes.find_layers",
    "sparse.compiler.passes.transpose",
    "sparse.compiler.passes.fold_affine",
    "sparse.compiler.passes.fuse_activation",
    "sparse.compiler.passes.fuse_attention",
    "sparse.compiler.passes.fuse_normalization",
    "sparse.compiler.passes.look_up",
    "sparse.compiler.passes.pooling",
    "sparse.compiler.frontend",
    "sparse.compiler.lowering",
    "sparse.compiler.sequences",
    "sparse.compiler.executor",
    "sparse.compiler.calibration",
    "sparse.compiler.measure",
    "sparse.compiler.autotune",
    "sparse.files",
    "sparse.files.container",
    "sparse.files.codec",
    "sparse.files.serialization",
    "sparse.files.onnx_rewrites",
    "sparse.files.export",
    "sparse.files.programs",
    "sparse.files.serve",
    "sparse.comparison",
    "sparse.network",
    "sparse.specialize",
    "sparse.summaries",
    "sparse",
    "reordering",
    "reordering.factors",
    "reordering.primitives",
    "reordering.walk",
    "reordering.axes",
    "reordering.orders",
    "reordering.states",
    "reordering.exchange",
    "reordering.search",
    "oneshot.uses",
    "oneshot.capture",
    "oneshot.layers",
    "oneshot.read_views",
    "oneshot.obs",
    "oneshot.alps",
    "oneshot.reorder",
    "oneshot.reorder_training",
    "oneshot.prune",
    "oneshot.sensitivities",
    "oneshot.budgets",
    "oneshot",
    "convex.lambert",
    "convex.scaling",
    "convex.groups",
    "convex.penalties",
    "convex.problems",
    "convex.descent",
    "convex.group_lasso",
    "convex.least_squares_path",
    "convex.penalised",
    "convex.masked",
    "convex.greedy",
    "convex.constants",
    "convex",
    "contrib.keras",
    "contrib.torch",
    "contrib",
    "contrib.transformers",
    "contrib.transformers.layers",
    "contrib.transformers.encoder",
    "contrib.transformers.transformer",
    "contrib.transformers.checkpoints",
    "contrib.transformers.directories",
    "contrib.transformers.images",
    "contrib.transformers.text",
    "contrib.transformers.pooling",
    "contrib.transformers.retrieval",
    "contrib.commands",
    "contrib.commands.functions",
    "contrib.commands.options",
    "contrib.commands.checkpoint",
    "contrib.commands.safetensors_files",
    "contrib.commands.numpy_files",
    "contrib.commands.orbax_files",
    "contrib.commands.formats",
    "contrib.commands.plan",
    "contrib.commands.one_shot",
    "contrib.commands.comparison",
    "contrib.commands.measures",
    "contrib.commands.pictures",
    "contrib.commands.page",
    "contrib.commands.report",
    "contrib.prune",
    "contrib.prune.networks",
    "contrib.prune.data",
    "contrib.prune.training",
    "contrib.prune.files",
    "contrib.prune.page",
    "contrib.prune.pipeline",
    "contrib.prune.command",
    "__main__",
    "__init__",
)
OPTIONAL = {  # imported where they are used, with an error that says what to install
    "phases": {"matplotlib"},
    "sparse.files.container": {"safetensors"},
    "sparse.files.export": {"scipy", "jax2onnx", "onnxruntime"},
    "oneshot.sensitivities": {"matplotlib"},
    "oneshot.budgets": {"scipy"},
    "contrib.keras": {"keras"},
    "contrib.torch": {"torch"},
    "contrib.transformers.layers": {"flax"},
    "contrib.transformers.encoder": {"flax"},
    "contrib.transformers.transformer": {"flax"},
    "contrib.transformers.checkpoints": {"flax", "safetensors"},
    "contrib.transformers.directories": {"flax", "safetensors"},
    "contrib.transformers.images": {"PIL"},
    "contrib.transformers.text": {"tokenizers"},
    "contrib.commands.orbax_files": {"orbax"},
    "contrib.commands.pictures": {"matplotlib"},
    "contrib.prune.page": {"matplotlib"},
}
EXPERIMENTS = (
    "utils",
    "utils.files",
    "utils.registry",
    "utils.timing",
    "data.fingerprints",
    "data.sources",
    "data.shuffle",
    "data.pipeline",
    "data.images",
    "data.published",
    "data",
    "data.planted",
    "data.from_mlxtend",
    "data.from_files",
    "data.from_tfds",
    "data.from_folder",
    "data.from_text",
    "data.from_table",
    "data.sentences",
    "data.criteo.columns",
    "data.criteo.prepared",
    "data.criteo",
    "data.catalog",
    "data.criteo.reader",
    "data.criteo.parse",
    "data.criteo.vocabulary",
    "data.criteo.prepare",
    "models.tables",
    "models.small",
    "models.click",
    "models.convolution",
    "models.mobilenet",
    "models.resnet",
    "models.costs",
    "models.sentences",
    "models.published_embeddings",
    "models.narrow",
    "models",
    "tasks",
    "training",
    "training.factories",
    "training.evaluation",
    "training.sharding",
    "training.rows",
    "training.checkpoint",
    "training.weights",
    "training.narrow",
    "training.setup",
    "training.step",
    "training.program",
    "training.reordering",
    "training.loop",
    "training.trained",
    "outputs",
    "outputs.report",
    "outputs.progress",
    "outputs.workdir",
    "outputs.hooks",
    "retrieval",
    "cli",
    "data.criteo.__main__",
    "theory",
    "theory.instances",
    "theory.lemmas",
    "theory.one_group",
    "theory.replacement",
    "theory.recovery",
    "theory.page",
    "theory.__main__",
    "runs",
    "main",
    "inspect",
    "engines",
    "engines.graphs",
    "engines.runtimes",
    "serve_bench",
    "compare",
    "one_shot",
    "embedding_quality",
    "sweeps",
    "sweeps.cells",
    "sweeps.work",
    "sweeps.page",
    "reproduce",
    "__init__",
)


def modules(package):
    """`{dotted name below the package: file}`."""
    folder = ROOT / package
    names = {}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return names


def imported(file):
    """Dotted names that a file imports; `from a import b` counts as both `a` and `a.b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("package", "order"), [("sa_plus_plus", LIBRARY), ("experiments", EXPERIMENTS)])
def test_imports_go_down_the_list_only(package, order):
    files = modules(package)
    assert set(files) == set(order), "a new module belongs in this list, below all that it imports"
    for name, file in files.items():
        for target in imported(file):
            inner = target.removeprefix(f"{package}.")
            if target != inner and inner in order:
                assert order.index(inner) < order.index(name), f"{name} imports {inner}, which stands above it"


def test_library_depends_on_jax_optax_numpy_alone():
    allowed = {*sys.stdlib_module_names, "jax", "optax", "numpy", "sa_plus_plus"}
    for name, file in modules("sa_plus_plus").items():
        found = {target.split(".")[0] for target in imported(file)} - allowed
        assert found <= OPTIONAL.get(name, set()), f"{name} imports {found}"


def imported_at_once(name, files, seen):
    """Packages that importing a module of experiments imports, those inside functions left out."""
    if name in seen:
        return set()
    seen.add(name)
    tree = ast.parse(files[name].read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = set()
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
        found |= {target.split(".")[0] for target in names}
        inner = {target.removeprefix("experiments.") for target in names if target.startswith("experiments.")}
        for module in inner & set(files):
            found |= imported_at_once(module, files, seen)
    return found


@pytest.mark.parametrize("command", ["main", "compare", "inspect"])
def test_commands_start_without_the_extras_that_are_large(command):
    seen: set[str] = set()
    found = imported_at_once(command, modules("experiments"), seen)
    assert {"jax", "flax", "grain", "orbax"} <= found
    assert "data.catalog" in seen
    assert not found & {
        "array_record",
        "onnx",
        "onnxruntime",
        "openvino",
        "pyarrow",
        "tensorflow_datasets",
        "tokenizers",
    }
