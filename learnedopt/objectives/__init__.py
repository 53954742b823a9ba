"""What the outer level wants, beyond losses: targets and their matchings, regret bounds. Imports the core."""
