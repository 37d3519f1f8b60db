"""What the checks before a training run are made of: take a step, look at it, put everything back."""
