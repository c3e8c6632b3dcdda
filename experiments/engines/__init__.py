"""Dense inference engines, to measure pruned networks against: ONNX Runtime and OpenVINO.

`graphs.graph` writes a network as an ONNX graph; `runtimes.contenders` makes calls of it for each engine and precision.
"""
