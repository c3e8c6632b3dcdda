"""ResNet-50 pruned beside smaller dense ResNets: what is read from the results, and the page."""

from benchmarks import resnets, tables


def row(network, engine, rounds, batch=1):
    ms = dict(zip(("q25", "median", "q75"), sorted(rounds), strict=True))
    precision = engine.split()[1]
    return {"network": network, "batch": batch, "engine": engine, "precision": precision, "ms": ms, "rounds": rounds}


def test_the_page_is_that_of_the_results():
    """But for the counts of weights and multiply-adds, which take long."""
    page = resnets.PAGE.read_text()
    found = {processor: resnets.measured(processor) for processor in resnets.RESULTS}
    first, second = found.values()
    for name, lines in (("resnets together", resnets.together(second)), ("resnets against", resnets.against(found))):
        assert f"<!-- {name} -->\n{tables.markdown(lines)}\n<!-- end of {name} -->" in page
    _, _, rest = page.partition("<!-- resnet50 -->")
    table, _, _ = rest.partition("<!-- end of resnet50 -->")
    for network in resnets.networks():
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {network.name} | {network.top1:.1f} |")]
        assert line.removesuffix(" |").split(" | ")[4:] == list(resnets.timed(first, network.name).values())


def test_networks_that_took_turns_are_compared_by_round():
    found = []
    for pruned, dense in resnets.PAIRS:
        for precision in resnets.PRECISIONS:
            found += [row(dense, f"onnxruntime {precision}", [8.0, 6.0, 4.0])]
            found += [row(dense, f"ours {precision}", [9.0, 7.0, 4.0]), row(pruned, f"ours {precision}", [4, 2, 1])]
    found += [row("dense ResNet-34", "openvino int8", [700, 800, 900], 32)]
    one, other = resnets.against({"one": found, "other": []})[:2]
    assert one == {
        "pruned": "ResNet-50, 16 × 16, 80%",
        "against": "dense ResNet-34",
        "processor": "one",
        "batch 1, float32": "3.00 [2.50, 3.50]",
        "batch 1, int8": "3.00 [2.50, 3.50]",
        "batch 32, float32": "-",
        "batch 32, int8": "-",
    }
    assert other["batch 1, int8"] == "-"
    lines = {line["network"]: line for line in resnets.together(found)}
    assert lines["dense ResNet-34"]["ms, batch 1, int8"] == "6.0 [4.0, 8.0] onnxruntime"
    assert lines["dense ResNet-34"]["ms, batch 32, int8"] == "800 [700, 900] openvino"
    assert lines["ResNet-50, 16 × 16, 90%"]["ms, batch 1, float32"] == "2.0 [1.0, 4.0] ours"
    assert lines["ResNet-50, 16 × 16, 90%"]["ms, batch 32, float32"] == "-"
    assert lines["dense MobileNetV2"]["top-1, %"] == "71.9"
    assert "ms, batch 32, int8" not in resnets.together([r for r in found if r["batch"] == 1])[0]
