"""Embedded tasks: generated data, exact judges and tiny models, so that nothing is downloaded.

`reviews` is the demo: a preference task in which over-optimising is visible. `exact` is the
microscope: a task small enough that the optimum of KL-regularised RL is known in closed form.
"""
