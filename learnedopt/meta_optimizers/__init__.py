"""How theta moves, beside what torch has: online learners, a ``torch.optim.Optimizer`` a file. Imports the core."""
