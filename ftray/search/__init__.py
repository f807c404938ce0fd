"""The search: spaces, Optuna, Ray Tune, and the trials that Ray Train runs."""
