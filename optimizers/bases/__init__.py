"""What several rules are built on: hyperparameters as theta, wrapping. Imports the core."""
