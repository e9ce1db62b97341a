"""One clip over several GPUs or machines, and many clips at once."""
