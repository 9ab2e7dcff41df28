"""Where to look: selectors, the host's graph and tensors, activations to features."""
