"""What any stoppable, resumable run needs: its processes, its stop, its schedule, its checkpoints, its figures.

No losses and no models. Nothing is imported here, so that a command that asks for one part loads no other.
"""
