"""What the weights see: text, activations and the statistics that choose codes."""
