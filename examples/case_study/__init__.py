"""The case that started gradguard, rebuilt: a published pipeline with its faults as switches."""
