"""What a policy costs, and what smaller ones that do nearly the same cost and lose."""
