"""What ties an algorithm to a training: the `Sparsifier`, and what follows the user's model and optimisers."""
