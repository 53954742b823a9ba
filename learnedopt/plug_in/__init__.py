"""What trains a user's own model in a loop of their own. Imports the core, estimators, objectives, meta-optimizers."""
