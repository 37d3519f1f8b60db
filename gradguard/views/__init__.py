"""Ways to look at a run: each turns records into something a person reads."""
