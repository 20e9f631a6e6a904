"""What a transformed model does, measured and reported."""
