"""What inner objectives share: checks of their arguments and the quadratic penalty; imports ``learnedopt.core``."""
