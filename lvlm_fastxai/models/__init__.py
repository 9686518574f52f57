"""A model as a whole: loaded, told apart, found its way around in, prepared and put back."""
