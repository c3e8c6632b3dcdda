"""The commands for any checkpoint: what goes in and comes out, functions, the report, and bad input."""

import functools
import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT

import sa_plus_plus as sapp
from sa_plus_plus.__main__ import main

safetensors = pytest.importorskip("safetensors.numpy")

from sa_plus_plus.contrib.commands import comparison, formats, functions, measures, pictures  # noqa: E402

pytestmark = pytest.mark.usefixtures("standard_promotion")

MODULE = """
import jax, numpy as np

def network(params):
    def fn(params, x):
        hidden = jax.nn.relu(x @ params["in.weight"].T + params["in.bias"])
        return hidden @ params["out.weight"].T

    return fn, [np.random.default_rng(i).normal(size=(8, 24)).astype(np.float32) for i in range(4)]

def tree(params):
    return lambda params, x: x @ params["in"]["kernel"], [np.ones((2, 24), np.float32)]

def one(params):
    return network(params)[0]

def nothing(params):
    return network(params)[0], []

def failing(params):
    return params["decoder"]

def misfit(params):
    return network(params)[0], [np.ones((2, 5), np.float32)]

def first(path):
    return path == "in.weight"

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a module of functions, forgotten afterwards; nothing is timed or tuned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(MODULE)
    monkeypatch.setattr(
        comparison.timing, "alternate", lambda calls, rounds: {n: _once(call) for n, call in calls.items()}
    )
    monkeypatch.setattr(comparison, "specialized", functools.partial(comparison.specialized, mode="never"))
    yield tmp_path
    sys.modules.pop("nets", None)


def _once(call):
    call()
    return [1e-3]


def weights(dtype=np.float32):
    """As PyTorch's files have them, outputs first; no biases tell of the second."""
    draw = np.random.default_rng(0)
    return {
        "in.weight": draw.normal(size=(40, 24)).astype(dtype),
        "in.bias": np.zeros(40, dtype),
        "out.weight": draw.normal(size=(16, 40)).astype(dtype),
        "steps": np.array(2**40 + 1),
    }


def run(*arguments):
    main([*map(str, arguments)])


PLANNED = ("--block=4,8", "--sparsity=0.5", "--min-blocks=5")


def by_loops(w, block, kept):
    """The largest blocks of a matrix of outputs by inputs, for blocks of inputs by outputs."""
    result, corners = (
        np.zeros_like(w),
        [(r, c) for r in range(0, w.shape[0], block[1]) for c in range(0, w.shape[1], block[0])],
    )
    where = [(slice(r, r + block[1]), slice(c, c + block[0])) for r, c in corners]
    for at in sorted(where, key=lambda at: -np.linalg.norm(w[at].astype(np.float64)))[:kept]:
        result[at] = w[at]
    return result


def expected(params):
    """Half of the blocks of 4 inputs by 8 outputs: of 6 × 5, and of 10 × 2."""
    return params | {
        "in.weight": by_loops(params["in.weight"], (4, 8), 15),
        "out.weight": by_loops(params["out.weight"], (4, 8), 10),
    }


def write_npz(path, params):
    np.savez(path.with_suffix(".npz"), **params)
    return path.with_suffix(".npz")


def write_file(path, params):
    safetensors.save_file(params, path, metadata={"format": "pt"})
    return path


def write_sharded(path, params):
    path.mkdir()
    names = {"a.safetensors": ["in.weight", "in.bias"], "b.safetensors": ["out.weight", "steps"]}
    for file, own in names.items():
        safetensors.save_file({name: params[name] for name in own}, path / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, own in names.items() for name in own}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"dense")
    return path


def write_ours(path, params):
    sapp.save(path, params)
    return path


def write_orbax(path, params):
    with pytest.importorskip("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)
    return path


WRITERS = {
    w.__name__.removeprefix("write_"): w for w in (write_npz, write_file, write_sharded, write_ours, write_orbax)
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_goes_in_comes_out_pruned(kind, dtype, folder, capsys):
    params = weights(jnp.dtype(dtype))
    dense = WRITERS[kind](folder / "dense", params)
    run("one-shot", dense, "--output=pruned", *PLANNED)
    assert "pruned: 2 of 2 kernels pruned, 50.00% of the kernel weights are zero" in capsys.readouterr().out
    got, before = formats.read(folder / "pruned"), formats.read(dense)
    assert got.format == before.format
    assert got.params.keys() == params.keys()
    for name, want in expected(params).items():
        assert (got.params[name].dtype, got.params[name].shape) == (want.dtype, want.shape), name
        np.testing.assert_array_equal(np.asarray(got.params[name]), want, name)
    if kind in ("file", "sharded", "ours"):
        assert got.plan.pruned["in.weight"][:6] == ("in.weight", (40, 24), (4, 8), (6, 5), 15, 0.5)
    if kind == "sharded":
        names = {"a.safetensors", "b.safetensors", "model.safetensors.index.json", "config.json"}
        assert {file.name for file in (folder / "pruned").iterdir()} == names
    if kind == "ours":
        assert sapp.load("pruned")["in.weight"].layout.nse == 15
    assert not [*folder.glob(".*unfinished")]


def test_arrays_keep_their_order(folder):
    arrays = [np.random.default_rng(i).normal(size=(24, 24)).astype(np.float32) for i in range(12)]
    np.savez(folder / "in.npz", *arrays)
    run(
        "one-shot", folder / "in.npz", "--block=4", "--sparsity=0.5", "--min-blocks=1", f"--output={folder / 'out.npz'}"
    )
    with np.load(folder / "out.npz") as found:
        assert list(found) == [f"arr_{i}" for i in range(12)]


def test_files_in_subdirectories_of_a_checkpoint_stay(folder):
    """Those that an index names, and those of other modules."""
    tensors = {name: np.random.default_rng(0).normal(size=(24, 24)).astype(np.float32) for name in ("x", "y", "z")}
    source = folder / "several"
    for name in ("x", "y", "z"):
        (source / name).mkdir(parents=True)
        safetensors.save_file({f"{name}.weight": tensors[name]}, source / name / "m.safetensors")
    index = {"weight_map": {f"{name}.weight": f"{name}/m.safetensors" for name in ("x", "y")}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    output = folder / "pruned"
    run("one-shot", source, "--block=4", "--sparsity=0.5", "--min-blocks=1", f"--output={output}")
    for name, zeros in (("x", 0.5), ("y", 0.5), ("z", 0)):
        (found,) = safetensors.load_file(output / name / "m.safetensors").values()
        assert np.mean(found == 0) == zeros
        np.testing.assert_array_equal(found[found != 0], tensors[name][found != 0])
    assert not (output / "m.safetensors").exists()


def test_the_plan_says_what_is_assumed(folder, capsys):
    file = write_file(folder / "dense", weights())
    run("plan", file, *PLANNED)
    said = capsys.readouterr().out
    assert said.startswith("2 of 2 kernels pruned; 50.00% of 1,600 kernel weights removed (2 scalars and vectors not")
    assert re.search(r"in.weight +40×24 +24×40 +4×8 +6×5 +30 +15 +50.0%", said)
    assert re.search(r"out.weight +16×40 +40×16, assumed", said)
    assert "The reading of 1 of 2 kernels is assumed, such as that of out.weight." in said
    assert "in.bias" not in said
    run("plan", file, *PLANNED, "--all", "--view=*.weight=i o", "--where=in*", "--where=nets:first")
    said = capsys.readouterr().out
    assert re.search(r"in.weight +40×24 +4×8 +10×3", said)
    assert re.search(r"out.weight .* no: excluded by `where`", said)
    assert "in.bias" in said
    assert "assumed" not in said
    run("plan", file, "--sparsity=0.5", "--block=1,all", "--min-blocks=1")
    assert re.search(r"in.weight +40×24 +24×40 +1×40 +24×1 +24 +12", capsys.readouterr().out)


def test_with_a_function_weights_are_adjusted(folder, capsys):
    params = weights()
    file = write_npz(folder / "dense", params)
    run("one-shot", file, "--output=pruned.npz", "--function=nets:network", *PLANNED)
    got = formats.read(folder / "pruned.npz").params
    sys.path.insert(0, str(folder))
    import nets  # noqa: PLC0415

    fn, batches = nets.network(params)
    arrays = jax.tree.map(jnp.asarray, {k: v for k, v in params.items() if k != "steps"})
    views = {"*.weight": "o i -> i o"}
    options = {"block": (4, 8), "sparsity": 0.5, "min_blocks": 5, "views": views}
    want = sapp.one_shot(fn, arrays, batches, **options).params
    for name in ("in.weight", "out.weight"):
        np.testing.assert_array_equal(got[name], want[name])
    assert (got["steps"], got["steps"].dtype) == (2**40 + 1, np.int64)

    def far(network):
        return sum(float(jnp.square(fn(network, x) - fn(arrays, x)).sum()) for x in batches)

    assert far(got) < far(expected(params))
    assert "error" in capsys.readouterr().out


def test_kernels_are_read_as_is_said(folder):
    """A square matrix of PyTorch's file is read as outputs by inputs unless it is said to be the other way round."""
    w = np.random.default_rng(2).normal(size=(24, 24)).astype(np.float32)
    (folder / "square.py").write_text(
        "import numpy as np\n"
        "def network(params):\n"
        "    return lambda params, x: x @ params['x.weight'], [np.eye(24, dtype=np.float32)]\n"
    )
    file = write_npz(folder / "dense", {"x.weight": w})
    options = (*PLANNED, "--view=*.weight=i o", "--method=magnitude")
    for name, function in (("a", ()), ("b", ("--function=square:network",))):
        run("one-shot", file, f"--output={name}.npz", *options, *function)
        got = formats.read(folder / f"{name}.npz").params["x.weight"]
        np.testing.assert_array_equal(got.T, by_loops(w.T, (4, 8), 9))
    run("one-shot", file, "--output=c.npz", *PLANNED)
    np.testing.assert_array_equal(formats.read(folder / "c.npz").params["x.weight"], by_loops(w, (4, 8), 9))


def test_a_nested_tree_of_a_step_of_a_manager(folder):
    orbax = pytest.importorskip("orbax.checkpoint")
    moments = {"mu": jnp.ones((24, 40))}
    state = {"params": {"kernel": jnp.asarray(weights()["in.weight"].T)}, "opt_state": moments, "step": 7}
    with orbax.CheckpointManager(folder.absolute() / "run") as manager:
        manager.save(2, args=orbax.args.StandardSave(state))
        manager.save(10, args=orbax.args.StandardSave(state | {"step": 8}))
    run("one-shot", "run", "--output=pruned", *PLANNED)
    got = formats.read(folder / "pruned").params
    np.testing.assert_array_equal(got["params"]["kernel"].T, by_loops(weights()["in.weight"], (4, 8), 15))
    assert got["opt_state"]["mu"].all()
    assert got["step"] == 8


# The report.


def test_the_report_shows_what_is_left(folder, capsys):
    params = weights()
    dense, pruned = write_file(folder / "dense", params), folder / "pruned"
    run("one-shot", dense, f"--output={pruned}", *PLANNED)
    run("report", pruned, f"--against={dense}", "--function=nets:network")
    assert capsys.readouterr().out.endswith("report.html\n")
    page = (folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("<img ") == 2
    norm, change = (np.linalg.norm(x) / np.linalg.norm(params["in.weight"]) for x in _parts(params))
    row = re.search(r"<tr><td>in.weight</td>.*?</tr>", page)[0]
    for cell in ("40×24", "4×8", "15 of 30", "50.0%", f"{norm:.1%}", f"{change:.1%}", "3.8 kB", "2.0 kB"):
        assert f">{cell}<" in row, cell
    assert "1.00 → 1.00 ms" in page
    assert "Not worth it for speed" in page
    sys.path.insert(0, str(folder))
    import nets  # noqa: PLC0415

    fn, batches = nets.network(params)
    apart = max(float(jnp.abs(fn(expected(params), x) - fn(params, x)).max()) for x in batches)
    assert f"from the dense one's by {apart:.3g}" in page
    assert "weights are NaN" not in page


def _parts(params):
    kept = expected(params)["in.weight"]
    return kept, params["in.weight"] - kept


def test_the_report_without_a_plan_or_with_one_that_is_not_kept(folder):
    params = weights()
    file = write_npz(folder / "pruned", params | {"in.weight": expected(params)["in.weight"]})
    run("report", file, "--output=found.html")
    found = (folder / "found.html").read_text()
    assert "15 of 30" in found
    assert "<td>out.weight</td><td>16×40</td>" in found.partition("Kernels without blocks of zeros")[2]
    assert "planned" not in found.lower()
    run("report", file, "--output=asked.html", *PLANNED)
    asked = (folder / "asked.html").read_text()
    assert "1 of 2 layers keep more blocks than planned" in asked
    assert "20 of 20" in asked


def test_the_report_on_a_file_of_blocks(folder):
    params = {"in": {"kernel": expected(weights())["in.weight"].T}, "out": {"kernel": weights()["out.weight"].T}}
    plan = sapp.plan(params, block=(4, 8), sparsity=0.5, min_blocks=30)
    sapp.save("pruned", sapp.export(params, plan))
    run("report", "pruned")
    page = (folder / "report.html").read_text()
    assert "<td>in/kernel</td><td>24×40</td><td>4×8</td><td class=n>15 of 30</td>" in page
    assert "file of sapp.save" in page


def test_pictures_have_a_pixel_a_block(folder):
    image = pytest.importorskip("PIL.Image")
    mask = np.array([[True, False, True], [False, False, True]])
    norms = np.array([[1.0, 0, 2], [0, 0, 4]])
    pixels = _pixels(image, pictures.picture(norms, mask))
    assert pixels.shape[:2] == mask.shape
    shade = pixels.astype(int).sum(-1)
    assert (shade[~mask] == shade.max()).all()
    assert shade[1, 2] < shade[0, 2] < shade[0, 0] < shade[0, 1]
    large = _pixels(image, pictures.picture(np.ones((1000, 2)), np.arange(2000).reshape(1000, 2) % 2 == 0))
    assert large.shape[:2] == (-(-1000 // 3), 2)
    assert (large[:, 0] == large[0, 0]).all()


def _pixels(image, address):
    import base64  # noqa: PLC0415
    import io  # noqa: PLC0415

    return np.asarray(image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def test_stacked_matrices_are_measured_each(folder):
    stack = np.random.default_rng(1).normal(size=(3, 8, 12)).astype(np.float32)
    stack[1, :4] = 0
    plan = sapp.plan({"w": stack}, block=4, sparsity=0.5, min_blocks=1, views={"w": "[l] i o"})
    [found] = measures.measure({"w": stack}, sapp.summary({"w": stack}), plan, None)
    cut = stack.reshape(3, 2, 4, 3, 4)
    np.testing.assert_allclose(found.norms, np.sqrt(np.square(cut).sum((2, 4))), rtol=1e-6)
    assert (found.kept, found.planned) == (15, 9)


def test_the_commands_on_the_page_run(folder, capsys):
    page = (ROOT / "docs" / "commands.md").read_text()
    exec(compile(re.findall(r"```python\n(.*?)```", page, flags=re.S)[0], "commands.md", "exec"), {})
    lines = re.findall(r"^sapp (.* dense\.npz.*|.*pruned\.npz.*)$", page, flags=re.M)
    assert len(lines) == 3
    for line in lines:
        run(*shlex.split(line))
    assert "report.html" in capsys.readouterr().out
    assert "largest difference of outputs" in (folder / "report.html").read_text()
    sys.modules.pop("small_net")


def test_the_entry_point_is_the_command():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["sapp"]
    module, _, name = script.partition(":")
    assert getattr(importlib.import_module(module), name) is main


# Bad input.


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in said
    return said


def test_what_is_no_checkpoint_is_said(folder, capsys):
    def said(path):
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
        found = refused(capsys, "one-shot", path, "--output=new", "--sparsity=0.5")
        assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
        return found

    assert "there is no missing" in said("missing")
    (folder / "empty").mkdir()
    assert "has no checkpoint: safetensors, .npz and orbax are read; it holds nothing" in said("empty")
    (folder / "text").write_text("once upon a time")
    assert "text is no checkpoint" in said("text")
    (folder / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    assert "is GGUF" in said("a.gguf")
    shutil.copy("a.gguf", "empty/model")
    assert "is GGUF" in said("empty/model")
    for name, remedy in (("a.bin", "save_file"), ("a.h5", "numpy.savez"), ("a.pkl", "pickle"), ("a.npy", "sapp.prune")):
        (folder / name).write_bytes(bytes(40))
        assert remedy in said(name)
    whole = write_file(folder / "whole.safetensors", weights()).read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-20])
    assert "cut.safetensors is damaged" in said("cut.safetensors")
    whole = write_npz(folder / "whole", weights()).read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-300])
    assert "cut.npz is damaged" in said("cut.npz")
    with zipfile.ZipFile("pickled", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert "pickled is a pickle of PyTorch's" in said("pickled")
    np.savez("objects.npz", a=np.array([{}], object))
    assert "objects.npz is damaged, or has other things than arrays" in said("objects.npz")
    shards = write_sharded(folder / "shards", weights())
    (shards / "b.safetensors").unlink()
    assert "shards lacks b.safetensors, one of the 2 files" in said("shards")
    (shards / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in said("shards")
    (folder / "orbax").mkdir()
    (folder / "orbax" / "_METADATA").write_text("{}")
    if importlib.util.find_spec("orbax"):
        assert "orbax is no intact checkpoint of orbax" in said("orbax")


def test_functions_that_do_not_fit_are_said(folder, capsys):
    file = write_npz(folder / "dense", weights())

    def said(function):
        found = refused(capsys, "one-shot", file, "--output=new.npz", f"--function={function}", *PLANNED)
        assert not (folder / "new.npz").exists()
        return found

    assert "must name a function as package.module:function" in said("nets")
    assert "there is no module nowhere" in said("nowhere:network")
    assert "nets has no net: it has network, tree, one" in said("nets:net")
    assert "is no function but int" in said("nets:number")
    assert "must return (fn, examples)" in said("nets:one")
    assert "returned no examples" in said("nets:nothing")
    failing = said("nets:failing")
    assert "KeyError: 'decoder'" in failing
    assert "4 arrays, in.bias [40]" in failing
    assert "its fn(params, float32[2, 5]) failed: TypeError: dot_general" in said("nets:misfit")
    assert "KeyError: 'in'" in said("nets:tree")
    (folder / "broken.py").write_text("import nowhere_else")
    assert "cannot be imported: ModuleNotFoundError: No module named 'nowhere_else'" in said("broken:network")


def test_options_that_do_not_fit_are_said(folder, capsys, monkeypatch):
    file = write_npz(folder / "dense", weights())
    assert "--output=dense.npz is already there" in refused(capsys, "one-shot", file, "--output=dense.npz", *PLANNED)
    assert "there is no directory" in refused(capsys, "one-shot", file, "--output=a/b.npz", *PLANNED)
    assert "is in the directory" in refused(capsys, "one-shot", folder, "--output=new", *PLANNED)
    assert "in [0, 1), got 1.5" in refused(capsys, "plan", file, "--sparsity=1.5")
    assert "nothing to prune with block=(16, 16)" in refused(capsys, "plan", file, "--sparsity=0.5")
    assert "invalid block value: '4,0'" in refused(capsys, "plan", file, "--sparsity=0.5", "--block=4,0")
    assert "is no PATTERN=VIEW" in refused(capsys, "plan", file, *PLANNED, "--view=o i")
    assert "names 3 axes" in refused(capsys, "plan", file, *PLANNED, "--view=*.weight=a b c -> c (a b)")
    assert "--method=obs needs examples" in refused(capsys, "one-shot", file, "--output=n", "--method=obs", *PLANNED)
    assert "give --sparsity too" in refused(capsys, "report", file, "--where=*")
    other = write_npz(folder / "other", {"in.weight": np.ones((3, 4))})
    found = refused(capsys, "report", file, f"--against={other}", *PLANNED)
    assert "--against is another network: the plan has a kernel in.weight of shape (40, 24)" in found
    nan = write_npz(folder / "nan", weights() | {"in.weight": np.full((40, 24), np.nan)})
    assert "in.weight has weights that are NaN" in refused(capsys, "one-shot", nan, "--output=n.npz", *PLANNED)
    for name in ("matplotlib.image", "orbax.checkpoint"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'sa_plus_plus[commands]'" in refused(capsys, "report", file)
    (folder / "orbax").mkdir()
    (folder / "orbax" / "_METADATA").write_text("{}")
    assert "pip install orbax-checkpoint" in refused(capsys, "plan", "orbax", *PLANNED)
    assert not [*folder.glob("*.html")]


def test_functions_are_told_from_patterns():
    assert functions.is_reference("a.b:c")
    assert not any(map(functions.is_reference, ("*attention*", "a:b*", "a.b", ":c", "a/b:c", "3:c")))
