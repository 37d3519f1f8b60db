"""What a guard looks at beside the optimizer's step: forward passes, batches, losses, copies, replicas."""
