"""MixML: who averages with whom, and when; how fast that mixes; and training by it."""
