"""How a piece of the inner loop is run and differentiated: eager, compiled, coordinatewise. Imports the core."""
