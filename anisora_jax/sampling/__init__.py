"""From noise to films: plans, solvers, guidance and the writer of pictures."""
