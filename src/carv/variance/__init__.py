"""Where the variance comes from and what it costs: measurements, predictions from one pilot, comparisons."""
