"""Programs and what is asked of them: forwards, trajectories, autoencoders and solvers (see ``golden.Scene``)."""
