"""What any stoppable, resumable run needs: processes, schedule, checkpoints. No losses, no models."""
