"""From an image and a question to an explanation."""
