"""What the suites run: decoders of random weights in the shapes of real models, and SmolLM2's real weights."""
