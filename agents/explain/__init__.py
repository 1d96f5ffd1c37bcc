"""Why a policy decided so: what its actions owe to each observation, how they follow it, and rules that come near.

All of this is of the actions as the actor gives them: before they are clipped to [−1, 1], and before the domain's
influence, which scales what is left. What is clipped has no slope, and an action that wants to be 3 is not that of one
that wants to be 1.
"""
