"""A run in several processes: who they are, what they agree on, how the model is divided among them."""
