"""Dense inference engines as a baseline for pruned networks: ONNX Runtime and OpenVINO.

`graphs.graph` converts a network to an ONNX graph; `runtimes.contenders` makes a call for each engine and precision.
"""
