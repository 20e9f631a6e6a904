"""From a model and a policy to a transformed model."""
