"""What a step costs beside one with `clip_grad_norm_` and `LambdaLR`: `python -m rlsched.experiments.cost`."""
