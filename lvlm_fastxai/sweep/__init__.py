"""One forward, then down the layers, top first, with the gradient of every target."""
