"""What a trained theta is worth: comparisons, few-shot adaptation, plots. Imports the core and the estimators."""
