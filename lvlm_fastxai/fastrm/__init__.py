"""The FastRM head, which predicts relevancy maps from the hidden states of the image columns."""
