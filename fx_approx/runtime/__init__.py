"""What lives in a transformed model: sampled layers, shared selections, randomness, and how its forward runs."""
