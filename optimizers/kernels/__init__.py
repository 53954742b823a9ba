"""Steps and adjoints of rules in C and Triton. Imports the core."""
