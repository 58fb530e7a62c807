"""Sound bounds on pre-activations (interval, CROWN, alpha-CROWN) and witnesses, in torch float64."""
