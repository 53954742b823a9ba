"""What everything rests on: trees, the contract's abstractions, the inner loop. Imports nothing else of the library."""
