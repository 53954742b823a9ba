"""How a meta-gradient is found, a family of estimators a file, and solvers. Imports the core and the execution."""
