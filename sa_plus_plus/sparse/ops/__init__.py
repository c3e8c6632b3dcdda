"""Products with block-sparse kernels, by XLA, Pallas or the compiled CPU kernel."""
